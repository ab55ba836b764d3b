"""What a task makes, part by part, in memory or in a folder beside the output.

Several processes put their parts into that folder, and a task that was stopped is resumed from it. A part is a few whole batches. Which cells a batch holds depends on nothing but the number of cells, so the parts of
two processes, or of a first and a second run, are bit for bit those of a single one.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from sedd import __version__
from sedd.errors import UserError
from sedd.inference.pretrained import Pretrained
from sedd.io.files import fingerprint, new_file, obs_digest, save_arrays
from sedd.io.outputs import clear, only_writer, partial_folder
from sedd.processes import Processes, is_main

_VALUES = 1 << 22  # in a layer of a part, at most
_CELLS = 2048  # in a part, at most
_PARTS = 64  # of a short task, so that several processes have something to do and little is done again


def is_mostly_full(block: Any) -> bool:
    """Whether a matrix of which this is a part is kept dense: where most entries are not zero that is smaller."""
    nnz = block.nnz if sp.issparse(block) else np.count_nonzero(block)
    return bool(nnz > 0.5 * np.prod(block.shape))


def check_batch_size(batch_size: int) -> None:
    """Check the number of cells that go through the network together.

    Raises
    ------
    UserError
        If it is no number of cells.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size is {batch_size}; expected at least 1.")


def check_output(output: str, *, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output before any work is done.

    Raises
    ------
    UserError
        If it exists or is unfinished and neither `overwrite` nor `resume` allows that, or its directory cannot be written.
    """
    if not is_main():  # the main process may be at work on it already
        return
    target, unfinished = Path(output), Path(partial_folder(output))
    if target.exists() and not overwrite:
        raise UserError(f"{output}: exists already; pass --overwrite to replace it, or another name.")
    if unfinished.exists() and not (overwrite or resume):
        raise UserError(f"{unfinished}: holds an unfinished output; pass --resume to complete it or --overwrite to start again.")
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{output}: {parent} is not a directory that can be written; choose another output.")


class Parts(ABC):
    """Blocks of successive cells; a context manager that drops or keeps what was not finished.

    Attributes
    ----------
    spans : list of (lo, hi)
        Successive cells that are still to be made by this process.
    done : int
        How many cells of its share are made already.
    writes : bool
        Whether this process writes the result.
    """

    spans: list[tuple[int, int]]
    done: int = 0
    writes: bool = True

    @abstractmethod
    def add(self, lo: int, **blocks: Any) -> None:
        """Take in the cells from `lo` on: named matrices of equal length, dense or sparse."""

    def complete(self) -> None:  # noqa: B027, one process has nothing to wait for
        """Wait until every process has made its own."""

    @abstractmethod
    def all(self) -> Iterator[dict[str, Any]]:
        """Blocks of all cells in their order, once they are complete; for the process that writes."""

    def __enter__(self) -> Parts:
        return self

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Leave."""


class PartsInMemory(Parts):
    """All blocks of one process.

    Parameters
    ----------
    n_obs
        How many cells there will be.
    """

    def __init__(self, n_obs: int) -> None:
        self.spans = [(0, n_obs)]
        self._blocks: list[dict[str, Any]] = []

    def add(self, lo: int, **blocks: Any) -> None:
        """Take in the next cells."""
        self._blocks.append({k: v if is_mostly_full(v) else sp.csr_matrix(v) for k, v in blocks.items()})

    def all(self) -> Iterator[dict[str, Any]]:
        """Blocks of all cells."""
        yield from self._blocks

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._blocks.clear()


class PartsInFolder(Parts):
    """Parts as files in `OUTPUT.partial`, each whole or not there.

    Parameters
    ----------
    output
        What they become part of.
    made_from
        What determines the result (`made_from`); parts that are there are used only if theirs is the same.
    n_obs, n_vars
        Size of the result.
    batch_size
        Of the network.
    resume
        Use parts that are there.
    """

    def __init__(
        self, output: Path, made_from: dict[str, Any], *, n_obs: int, n_vars: int, batch_size: int, resume: bool
    ) -> None:
        self._output, self._made_from, self._resume = output, made_from, resume
        self._folder = Path(partial_folder(output))
        self._processes = Processes.here()
        wanted = min(_CELLS, _VALUES // max(1, n_vars), -(-n_obs // _PARTS))
        size = max(1, wanted // batch_size) * batch_size
        self._size, self._n_obs = size, n_obs
        self._all = [(lo, min(lo + size, n_obs)) for lo in range(0, n_obs, size)]
        self.writes = self._processes.index == 0
        self._waiting: list[dict[str, Any]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Parts:
        if self.writes:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(only_writer(self._output, wait=False))
            with self._stack:  # let go of the lock if the folder is not what it should be
                self._prepare()
                self._stack = self._stack.pop_all()
        self._processes.wait()
        mine = [self._all[i] for i in self._processes.share(len(self._all))]
        self.spans = [span for span in mine if not self._path(span[0]).exists()]
        self.done = sum(hi - lo for lo, hi in mine) - sum(hi - lo for lo, hi in self.spans)
        return self

    def _prepare(self) -> None:
        """Check that the parts that are there can be used, or start without any."""
        plan = self._folder / "task.json"
        if self._resume and plan.exists():
            before = json.loads(plan.read_text())
            changed = [name for name, value in self._made_from.items() if before.get(name) != value]
            if changed:
                raise UserError(
                    f"{self._folder}: cannot be resumed, for its parts were made with other {', '.join(changed)}. Repeat the "
                    "command that made them, or pass --overwrite without --resume to start again."
                )
            return
        clear(str(self._folder))
        with new_file(str(plan)) as file:
            file.write(json.dumps(self._made_from, indent=1).encode())

    def _path(self, lo: int) -> Path:
        return self._folder / f"{lo:012d}.npz"

    def add(self, lo: int, **blocks: Any) -> None:
        """Take in the cells from `lo` on; the file is written when its last cells are there."""
        self._waiting.append(blocks)
        start = lo // self._size * self._size
        if lo + next(iter(blocks.values())).shape[0] < min(start + self._size, self._n_obs):
            return
        arrays: dict[str, np.ndarray] = {}
        for name in blocks:
            gathered = [one[name] for one in self._waiting]
            if all(map(is_mostly_full, gathered)):
                arrays[name] = np.concatenate([b.toarray() if sp.issparse(b) else b for b in gathered])
            else:
                csr = sp.vstack([sp.csr_matrix(b) for b in gathered], format="csr")
                fields = {"data": csr.data, "indices": csr.indices, "indptr": csr.indptr, "shape": np.array(csr.shape)}
                arrays.update({f"{name}/{field}": value for field, value in fields.items()})
        save_arrays(str(self._path(start)), **arrays)
        self._waiting.clear()

    def complete(self) -> None:
        """Wait for the other processes."""
        self._processes.wait()

    def all(self) -> Iterator[dict[str, Any]]:
        """Blocks of all cells."""
        for lo, _ in self._all:
            with np.load(self._path(lo), allow_pickle=False) as arrays:
                names = dict.fromkeys(name.partition("/")[0] for name in arrays.files)
                yield {name: _matrix(arrays, name) for name in names}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Drop the parts when they are no longer needed or no good, let go of the lock, and wait for the process that writes."""
        keep = kind is not None and not issubclass(kind, UserError) and any(self._folder.glob("*.npz"))
        if self.writes:
            if not keep:
                clear(str(self._folder))
            self._stack.close()
        if kind is None:
            self._processes.wait()
        elif keep and issubclass(kind, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; pass --resume to complete it, or delete {self._folder}") from None
        elif keep and isinstance(error, OSError):
            raise OSError(
                f"{self._output}: is not complete ({error.strerror or error}). What is done so far is in {self._folder}: make "
                "room and pass --resume to complete it, or delete it."
            ) from error


def _matrix(arrays: Any, name: str) -> Any:
    if name in arrays:
        return arrays[name]
    data, indices, indptr, shape = (arrays[f"{name}/{field}"] for field in ("data", "indices", "indptr", "shape"))
    return sp.csr_matrix((data, indices, indptr), shape=tuple(shape))


def open_parts(task: str, model: Pretrained, arguments: dict[str, Any], n_obs: int) -> Parts:
    """Parts in memory, or in a folder beside the output.

    Parameters
    ----------
    task
        Its name.
    model
        The loaded model.
    arguments
        All arguments of the task; its `output` says where the parts are.
    n_obs
        How many cells there will be.

    Raises
    ------
    UserError
        If there is nothing to resume from, or the name of the output does not end in .h5ad or .zarr.
    """
    output, resume, batch_size = (arguments[name] for name in ("output", "resume", "batch_size"))
    check_batch_size(batch_size)
    if output is None:
        if resume:
            raise UserError("resume completes an unfinished output; give its name as output.")
        return PartsInMemory(n_obs)
    path = Path(output)
    if path.suffix not in (".h5ad", ".zarr"):
        raise UserError(f"{output}: a result is an .h5ad file or a .zarr store; expected a name that ends so.")
    if resume and isinstance(arguments.get("data"), ad.AnnData):
        raise UserError("resume needs the cells in a file, to know that they are the same as before; give a path.")
    origin = made_from(task, model, arguments)
    return PartsInFolder(path, origin, n_obs=n_obs, n_vars=len(model.genes), batch_size=batch_size, resume=resume)


_NO_SETTINGS = ("model", "data", "output", "resume", "progress")  # arguments whose value as such does not determine the result
_METADATA = ("zarr.json", ".zmetadata", ".zgroup")  # of a store; rewritten whenever the store is


def made_from(task: str, model: Pretrained, arguments: dict[str, Any]) -> dict[str, Any]:
    """Name all that determines the output of a task, as JSON has it; of the arguments, all that are settings."""
    settings = {f"--{name}": value for name, value in arguments.items() if name not in _NO_SETTINGS}
    origin = {"version": __version__, "task": task, "model": _model(model), "data": _data(arguments.get("data")), **settings}
    return dict(json.loads(json.dumps(origin, default=lambda value: np.asarray(value).tolist())))


def _model(model: Pretrained) -> str:
    digest = hashlib.blake2b("\0".join(map(str, model.genes)).encode(), digest_size=16)
    for name, tensor in model.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


def _data(data: ad.AnnData | str | Path | None) -> str | None:
    if data is None:
        return None
    if isinstance(data, ad.AnnData):
        return obs_digest(data.obs_names)
    path = Path(data)
    if path.is_dir():
        path = next((path / name for name in _METADATA if (path / name).exists()), path)
    return None if not path.is_file() else fingerprint(str(path))
