"""What a task makes, part by part, in memory or in a folder beside the output.

Several processes put their parts into that folder, and a task that was stopped is resumed from it. A part is a few whole batches. Which cells a batch holds depends on nothing but the number of cells, so the parts of
two processes, or of a first and a second run, are bit for bit those of a single one.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from sedd import __version__
from sedd.errors import UserError, warn_user
from sedd.inference.pretrained import Pretrained
from sedd.io.files import new_file, obs_digest, save_arrays
from sedd.io.input.opening import input_fingerprint
from sedd.io.outputs import clear, only_writer, partial_folder
from sedd.processes import Processes

_VALUES = 1 << 22  # in a layer of a part, at most
_CELLS = 2048  # in a part, at most
_MADE_OF = "made of"  # name of an array beside those of a part
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
    def add(self, lo: int, made_of: Callable[[], bytes] = bytes, /, **blocks: Any) -> None:
        """Take in the cells from `lo` on: named matrices of equal length, dense or sparse; `made_of` gives a digest of what they were made of."""

    def compare(self, digest: Callable[[int, int], bytes]) -> None:  # noqa: B027, in memory there is nothing of before
        """Compare parts that were made of other data with what the data say now; those that would be the same are used.

        Parameters
        ----------
        digest
            Of what cells lo .. hi - 1 are made of.
        """

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

    def add(self, lo: int, made_of: Callable[[], bytes] = bytes, /, **blocks: Any) -> None:
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
    resumable
        Keep parts when the task ends before it is done.
    """

    def __init__(
        self, output: Path, made_from: dict[str, Any], *, n_obs: int, n_vars: int, batch_size: int, resume: bool, resumable: bool = True
    ) -> None:
        self._output, self._made_from, self._resume, self._resumable = output, made_from, resume, resumable
        self._folder = Path(partial_folder(output))
        self._processes = Processes.here()
        wanted = min(_CELLS, _VALUES // max(1, n_vars), -(-n_obs // _PARTS))
        size = max(1, wanted // batch_size) * batch_size
        self._size, self._n_obs = size, n_obs
        self._all = [(lo, min(lo + size, n_obs)) for lo in range(0, n_obs, size)]
        self.writes = self._processes.index == 0
        self._batch_size = batch_size
        self._waiting: list[dict[str, Any]] = []
        self._made_of: list[bytes] = []
        self._stack = ExitStack()
        settings = {name: value for name, value in made_from.items() if name != "data"}
        # In the names: a process of an earlier task that is still at work makes nothing of this one.
        self._key, self._data_key = _short_digest([settings, size, n_obs]), _short_digest(made_from.get("data"))

    def __enter__(self) -> Parts:
        if self.writes:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(only_writer(self._output, wait=False))
            with self._stack:  # let go of the lock if the folder is not what it should be
                self._prepare()
                self._stack = self._stack.pop_all()
        self._processes.wait()
        mine = [self._all[i] for i in self._processes.share(len(self._all))]
        self._set_share(mine)
        return self

    def _set_share(self, mine: list[tuple[int, int]]) -> None:
        self._mine = mine
        self.spans = [span for span in mine if not self._path(span[0]).exists()]
        self.done = sum(hi - lo for lo, hi in mine) - sum(hi - lo for lo, hi in self.spans)

    def _prepare(self) -> None:
        """Check that the parts that are there can be used, or start without any."""
        plan = self._folder / "task.json"
        if self._resume and plan.exists():
            before = json.loads(plan.read_text())
            changed = [name for name, value in self._made_from.items() if before.get(name) != value and name != "data"]
            if changed:
                raise UserError(
                    f"{self._folder}: cannot be resumed, for its parts were made with other {', '.join(changed)}. Repeat the "
                    "command that made them, or pass --overwrite without --resume to start again."
                )
            return
        clear(str(self._folder))
        with new_file(str(plan)) as file:
            file.write(json.dumps(self._made_from, indent=1).encode())

    def _path(self, lo: int, data_key: str | None = None) -> Path:
        return self._folder / f"{self._key}-{lo:012d}-{data_key or self._data_key}.npz"

    def compare(self, digest: Callable[[int, int], bytes]) -> None:
        """Compare parts that were made of other data, such as a file that was mended since, with what the data say now.

        Raises
        ------
        UserError
            If there are such parts and none would be the same.
        """
        found = [(lo, hi, path) for lo, hi in self.spans for path in self._folder.glob(self._path(lo, "*").name)]
        n_same = 0
        for lo, hi, path in found:
            with np.load(path, allow_pickle=False) as arrays:
                before = arrays[_MADE_OF].tobytes()
            starts = range(lo, hi, self._batch_size)
            if before == b"".join(digest(start, min(start + self._batch_size, hi)) for start in starts):
                os.replace(path, self._path(lo))
                n_same += 1
        if found and not n_same:
            raise UserError(
                f"{self._folder}: cannot be resumed, for its parts were made with other data. Repeat the "
                "command that made them, or pass --overwrite without --resume to start again."
            )
        if found:
            warn_user(f"the data changed since: of {len(found)} parts {n_same} are of cells that are as before, and are used.")
        self._set_share(self._mine)

    def add(self, lo: int, made_of: Callable[[], bytes] = bytes, /, **blocks: Any) -> None:
        """Take in the cells from `lo` on; the file is written when its last cells are there."""
        self._waiting.append(blocks)
        self._made_of.append(made_of())
        start = lo // self._size * self._size
        if lo + next(iter(blocks.values())).shape[0] < min(start + self._size, self._n_obs):
            return
        arrays: dict[str, np.ndarray] = {_MADE_OF: np.frombuffer(b"".join(self._made_of), np.uint8)}
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
        self._made_of.clear()

    def complete(self) -> None:
        """Wait for the other processes."""
        self._processes.wait()

    def all(self) -> Iterator[dict[str, Any]]:
        """Blocks of all cells."""
        for lo, _ in self._all:
            with np.load(self._path(lo), allow_pickle=False) as arrays:
                names = dict.fromkeys(name.partition("/")[0] for name in arrays.files if name != _MADE_OF)
                yield {name: _matrix(arrays, name) for name in names}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Drop the parts when they are no longer needed, let go of the lock, and wait for the process that writes."""
        keep = kind is not None and self._resumable and any(self._folder.glob("*.npz"))
        if self.writes:
            if not keep:
                clear(str(self._folder))
            self._stack.close()
        if kind is None:
            self._processes.wait()
        elif keep and issubclass(kind, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; pass --resume to complete it, or delete {self._folder}") from None
        elif keep and isinstance(error, UserError):
            raise type(error)(
                f"{error} The parts that are done are kept in {self._folder}: mend that and pass --resume to complete {self._output}, or "
                "delete them."
            ) from error
        elif keep and isinstance(error, OSError):
            raise OSError(
                f"{self._output}: is not complete ({error.strerror or error}). What is done so far is in {self._folder}: make "
                "room and pass --resume to complete it, or delete it."
            ) from error
        elif isinstance(error, OSError):
            raise OSError(f"{self._output}: cannot be written ({error.strerror or error}). Make room there, or name another output.") from error
        elif keep and error is not None:
            error.add_note(f"What is done so far is in {self._folder}: pass --resume to complete {self._output}, or delete it.")


def _short_digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=6).hexdigest()


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
    """
    output, resume, batch_size = (arguments[name] for name in ("output", "resume", "batch_size"))
    check_batch_size(batch_size)
    if output is None:
        return PartsInMemory(n_obs)
    origin = made_from(task, model, arguments)
    resumable = not isinstance(arguments.get("data"), ad.AnnData)  # of cells in memory nobody knows later whether they are the same
    return PartsInFolder(
        Path(output), origin, n_obs=n_obs, n_vars=len(model.genes), batch_size=batch_size, resume=resume, resumable=resumable
    )


# Arguments whose value as such does not determine the parts: new genes are a part of the model by now, and what cells are compared with is
# looked at when all parts are there.
_NO_SETTINGS = ("model", "data", "new_genes", "gene_embeddings", "reference", "output", "resume", "overwrite", "progress")


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
    return input_fingerprint(str(data)) if Path(data).exists() else None
