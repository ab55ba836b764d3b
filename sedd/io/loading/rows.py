"""The non-zeros of chosen cells, wherever they lie in the store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sedd.errors import UserError
from sedd.io.format.reader import ChunkReader, chunks_of, side_by_side
from sedd.io.loading.buffers import Slabs
from sedd.io.store import CellStore
from sedd.kernels.gather import take_rows

_ABSENT, _LOADING, _LOADED = 0, 1, 2


@dataclass(frozen=True)
class Rows:
    """Rows in a soup of non-zeros: row `i` is `indices[starts[i]:stops[i]]`, `data[starts[i]:stops[i]]`."""

    indices: np.ndarray
    data: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def compact(self) -> Rows:
        """Return the same rows, back to back and in order: what is worth sending to another machine."""
        bounds, indices, data = take_rows(self.starts, self.stops, self.indices, self.data)
        return Rows(indices, data, bounds[:-1], bounds[1:])


class RowReader:
    """Reads the chunks that hold some cells, each once, into memory of its own for every call.

    Parameters
    ----------
    store : CellStore
    direct : bool
        Read shards directly where that is possible.
    """

    def __init__(self, store: CellStore, *, direct: bool = True) -> None:
        self.store = store
        arrays = store.x_arrays
        self._readers = {
            name: ChunkReader(arrays[name], name=f"{store.path}: X/{name}", direct=direct)
            for name in ("indices", "data")
        }
        self.chunk = self._readers["data"].chunk
        if self._readers["indices"].chunk != self.chunk:
            raise UserError(
                f"{store.path}: X/indices and X/data have chunks of different length; convert the input again"
            )
        self._slabs = Slabs()

    @property
    def direct(self) -> bool:
        """Whether shards are read directly."""
        return all(reader.direct for reader in self._readers.values())

    @property
    def bytes_read(self) -> int:
        """Encoded bytes read so far, when reading directly."""
        return sum(reader.bytes_read for reader in self._readers.values())

    @property
    def value_bytes(self) -> int:
        """Bytes in memory of one non-zero."""
        return sum(reader.dtype.itemsize for reader in self._readers.values())

    def read(self, cells: np.ndarray, shared: Callable[[list[Callable[[], None]]], None] | None = None, parts: int = 1) -> Rows:
        """Read the rows of `cells`.

        Parameters
        ----------
        cells : (k,) int64, in any order, repeats allowed
        shared : callable or None
            Makes several calls, and returns when all have ended.
        parts : int
            Calls that it is to make for each array.

        Returns
        -------
        rows : Rows, one for each cell, in their order
        """
        chunks, starts, stops = side_by_side(*self._bounds(cells), self.chunk)
        places = np.arange(chunks.size, dtype=np.int64) * self.chunk
        soup = {}
        for name, reader in self._readers.items():
            soup[name] = self._slabs.take((chunks.size * self.chunk,), reader.dtype)
            if shared is None or parts < 2:
                reader.read(chunks, soup[name], places)
                continue
            shares = zip(np.array_split(chunks, parts), np.array_split(places, parts), strict=True)
            shared([partial(reader.read, some, soup[name], there) for some, there in shares])
        return Rows(soup["indices"], soup["data"], starts, stops)

    def _bounds(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indptr = self.store.indptr
        return indptr[cells], indptr[cells + 1]


class WholeStore(RowReader):
    """Keeps every chunk that was read, so that none is read twice; for stores that fit in memory.

    The memory is reserved at once and touched chunk by chunk, so a rank that sees few cells holds few.
    """

    def __init__(self, store: CellStore, *, direct: bool = True) -> None:
        super().__init__(store, direct=direct)
        n_chunks = self._readers["data"].n_chunks
        self._soup = {name: np.empty(n_chunks * self.chunk, reader.dtype) for name, reader in self._readers.items()}
        self._state = np.zeros(n_chunks, np.uint8)
        self._changed = threading.Condition()

    def read(self, cells: np.ndarray, shared: Callable[[list[Callable[[], None]]], None] | None = None, parts: int = 1) -> Rows:
        """Read the rows of `cells`; see `RowReader.read`. Never shared: it reads as many at a time as there are threads."""
        starts, stops = self._bounds(cells)
        needed = chunks_of(starts, stops, self.chunk)
        while True:
            with self._changed:
                mine = needed[self._state[needed] == _ABSENT]
                self._state[mine] = _LOADING
            if mine.size:
                self._load(mine)
            with self._changed:
                # What another thread is loading is waited for; if it fails, the chunk is absent again and tried here.
                self._changed.wait_for(lambda: not bool(np.any(self._state[needed] == _LOADING)))
                if bool(np.all(self._state[needed] == _LOADED)):
                    return Rows(self._soup["indices"], self._soup["data"], starts, stops)

    def _load(self, chunks: np.ndarray) -> None:
        outcome = _ABSENT
        try:
            for name, reader in self._readers.items():
                reader.read(chunks, self._soup[name], chunks * self.chunk)
            outcome = _LOADED
        finally:
            with self._changed:
                self._state[chunks] = outcome
                self._changed.notify_all()


def read_rows_elsewhere(path: str, cells: np.ndarray) -> tuple[Any, ...]:
    """Read rows on a worker of a Dask cluster; the store is opened once per worker process."""
    with _OPEN_LOCK:
        reader = _OPEN.get(path)
        if reader is None:
            reader = _OPEN[path] = RowReader(CellStore(path))
    rows = reader.read(cells).compact()
    return rows.indices, rows.data, rows.starts, rows.stops


_OPEN: dict[str, RowReader] = {}
_OPEN_LOCK = threading.Lock()
