"""What is on disk after training, and how it is read back safely.

A checkpoint is one file of tensors and plain containers: the model, its averaged weights, the optimizer, the position in
the data, and everything a user of the model needs (genes, binning, split). It appears under its name only when complete,
and loading it executes nothing and reads nothing outside it: `torch.load(weights_only=True)` on a zip archive whose checksums
were verified, and whose list of contents was found to ask for no more than is in the file (`sedd.io.format.pickled`).
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import scipy.sparse as sp
import torch

from sedd.errors import DamagedFileError, MissingFileError, UserError, WrongFileError, check_permitted, warn_user
from sedd.io.files import new_file
from sedd.io.format.pickled import check_contents
from sedd.io.plan import Split

T = TypeVar("T")

FORMAT = 6
"""Older ones are not read: in format 5 all weights are fitted at one rate, in 4 the weights of readouts lie in another order, in 3 models answer no labels."""
_NUMBERED = re.compile(r"(epoch|step)_(\d+)\.pt$")


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, whole or not at all.

    Parameters
    ----------
    path
        The file; an existing one is replaced in one rename.
    state
        Tensors, numbers, strings, None, and lists and dicts of them.

    Raises
    ------
    OSError
        If the disk is full or the directory cannot be written; the old file is then still whole and no part is left.
    TypeError
        If `state` holds anything else, so that it could not be loaded again.
    """
    path = Path(path)
    try:
        with new_file(path, sync=True) as file:
            torch.save(state, file)
            file.flush()
            check_contents(Path(file.name))  # what cannot be loaded is no checkpoint
            torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, ValueError) as error:
        raise TypeError(f"{path}: the state holds something other than tensors and plain data; nothing was written.") from error
    except RuntimeError as error:  # torch reports a failed write of the archive as one of its own, after the disk's error
        cause = error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error).splitlines()[0])
        raise OSError(cause.errno, f"could not be written: {cause.strerror or cause}", str(path)) from error


def load(path: str | Path, *, header: bool = False) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU, verifying every checksum and executing nothing.

    Parameters
    ----------
    path
        The file.
    header
        Read only what is no tensor, verifying nothing else: the tensors are those of the file, mapped and not looked at.

    Raises
    ------
    UserError
        If the file is missing, damaged, not a checkpoint of `sedd`, or holds anything but tensors and plain containers.
    """
    path = Path(path)
    check_permitted(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such checkpoint; expected a .pt file or the directory of a run.")
    try:
        check_contents(path)
        if not header:
            _verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=header)
    except pickle.UnpicklingError as error:
        # Not with torch's words: they advise to load it all the same.
        raise UserError(
            f"{path}: holds objects that are not plain data, which could run a program; nothing of it was loaded. Expected "
            "a checkpoint written by sedd."
        ) from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(f"{path}: the checkpoint is damaged or not one ({reason[:200]}).") from error
    if not isinstance(state, dict) or state.get("sedd_format") != FORMAT:
        found = state.get("sedd_format") if isinstance(state, dict) else type(state).__name__
        if isinstance(found, int):
            raise WrongFileError(
                f"{path}: was written by another version of sedd (format {found}; this one reads {FORMAT}). Train again, or use that version."
            )
        raise WrongFileError(f"{path}: is not a sedd checkpoint (found {found!r} where its format should be).")
    return state


def find(path: str | Path) -> Path:
    """Return the checkpoint that `path` names: a file, or of a run's directory the best, else the final, else the newest.

    Raises
    ------
    UserError
        If there is none.
    """
    path = Path(path)
    check_permitted(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingFileError(f"{path}: no such file or directory; expected a checkpoint or the directory of a run.")
    for name in ("best.pt", "final.pt"):
        if (path / name).is_file():
            return path / name
    numbered = numbered_checkpoints(path)
    if not numbered:
        raise MissingFileError(f"{path}: holds no checkpoint (best.pt, final.pt or epoch_N.pt); train a model there first.")
    return numbered[-1]


def numbered_checkpoints(directory: str | Path, kind: str | None = None) -> list[Path]:
    """`epoch_N.pt` and `step_N.pt` files (or one `kind` of them), oldest first."""
    found = []
    for path in Path(directory).glob("*.pt"):
        if (m := _NUMBERED.match(path.name)) and kind in (None, m[1]):
            with contextlib.suppress(FileNotFoundError):  # a run that is at work has just deleted it
                found.append((path.stat().st_mtime_ns, path.name, path))
    return [path for _, _, path in sorted(found)]


def load_newest(directory: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint of a run and its state, passing over damaged ones with a warning; None if there is none."""
    return next(_passing_over_damaged(_newest_first(directory), load), None)


def find_newest(directory: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run as `load_newest` does, without holding it in memory."""
    return next((path for path, _ in _passing_over_damaged(_newest_first(directory), _verify)), None)


def _passing_over_damaged(paths: Iterable[Path], look: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    for path in paths:
        try:
            found = look(path)
        except UserError as error:
            warn_user(f"passed over {error}")
        else:
            yield path, found


def _newest_first(directory: str | Path) -> list[Path]:
    """Return the checkpoints of a run whose headers can be read, by the progress that these tell; no tensor is read for it."""
    directory = Path(directory)
    found = [p for p in directory.glob("*.pt") if p.name in ("best.pt", "final.pt") or _NUMBERED.match(p.name)]
    headers = _passing_over_damaged(sorted(found), functools.partial(load, header=True))
    # best.pt is a copy of an epoch's end: of equal progress the others are as good.
    progress = [((state["step"], state["epoch"], path.name != "best.pt"), path) for path, state in headers]
    return [path for _, path in sorted(progress, reverse=True)]


def _verify(path: Path) -> None:
    """Check every checksum of a file.

    Raises
    ------
    UserError
        If one is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise DamagedFileError(f"{path}: the checkpoint is damaged or not one ({error}).") from error
    if damaged is not None:
        raise DamagedFileError(f"{path}: the checkpoint is damaged (checksum of {damaged}); use another one of the run.")


def split_of(state: dict[str, Any], part: str) -> Split:
    """Return the cells of `part` ("train" or "val") of the run that a checkpoint is of."""
    split = state["split"]
    # Checkpoints of before have no limit of validation cells.
    return Split(
        split["n_obs"], split["val_fraction"], split["seed"], part, split["limit"][part], split.get("most"), split.get("block", 1)
    )


def pack_histogram(histogram: sp.csr_array) -> dict[str, Any]:
    """Return a sparse integer matrix as tensors, for a checkpoint."""
    return {
        "shape": list(histogram.shape),
        "indptr": torch.from_numpy(histogram.indptr.astype(np.int64)),
        "indices": torch.from_numpy(histogram.indices.astype(np.int32)),
        "data": torch.from_numpy(histogram.data.astype(np.int64)),
    }


def unpack_histogram(packed: dict[str, Any]) -> sp.csr_array:
    """Return the inverse of `pack_histogram`.

    Raises
    ------
    ValueError
        If an entry lies outside the matrix: compiled code would read or write there.
    """
    parts = tuple(packed[name].numpy() for name in ("data", "indices", "indptr"))
    found = sp.csr_array(parts, shape=tuple(packed["shape"]))
    found.check_format(full_check=True)
    return found
