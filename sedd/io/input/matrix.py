"""One matrix of an input, read by blocks of rows, or of columns where those lie together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from sedd.errors import DamagedFileError, UserError, WrongFileError
from sedd.io.input.faults import reading
from sedd.io.input.slices import Reader, is_array

_DAMAGED = "The file is damaged: copy or write it again."


class Matrix:
    """One matrix of an input: `layout` is "csr", "csc" or "dense"; `shape` is (cells, genes).

    Parameters
    ----------
    path : of the input, for messages
    node : an array, or a group of `data`, `indices` and `indptr`
    name : where it is, `X`, `layers/counts` or `raw/X`
    remote : whether each read costs a round trip over a network
    layout, shape : of a sparse matrix whose attributes do not say it
    transposed : whether rows of an array are genes

    Attributes
    ----------
    dtype : of the values as stored
    nnz : stored values, None when dense
    """

    def __init__(
        self, path: str, node: Any, name: str, *, remote: bool = False, layout: str | None = None,
        shape: tuple[int, int] | None = None, transposed: bool = False,
    ) -> None:  # fmt: skip
        self.path, self.name, self._remote = path, name, remote
        self.data: Reader
        self.nnz: int | None
        if is_array(node):
            self._open_dense(node, transposed)
        else:
            self._open_sparse(node, layout, shape)

    def _open_dense(self, node: Any, transposed: bool) -> None:
        if node.ndim != 2:
            raise UserError(f"{self.path}: {self.name} has {node.ndim} dimensions, expected 2 (cells x genes).")
        self.layout, self.nnz = "dense", None
        self.data = self._reader(node, transposed)
        self.shape = (int(self.data.shape[0]), int(self.data.shape[1]))
        self.dtype = self.data.dtype

    def _open_sparse(self, node: Any, layout: str | None, shape: Any) -> None:
        missing = [key for key in ("data", "indices", "indptr") if not is_array(node.get(key))]
        encoding = f"{layout}_matrix"
        if layout is None:
            encoding = _text(node.attrs.get("encoding-type", b"")) or _text(node.attrs.get("h5sparse_format", b"")) + "_matrix"
            shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
        if encoding not in ("csr_matrix", "csc_matrix") or shape is None or missing:
            found = f"encoding {encoding!r}" + (f" without {', '.join(missing)}" if missing else "")
            raise WrongFileError(f"{self.path}: {self.name} is not a matrix ({found}); expected csr, csc or a dense array.")
        self.layout = encoding[:3]
        if np.size(shape) != 2 or min(int(n) for n in shape) < 0:
            raise UserError(f"{self.path}: {self.name} has the shape {shape}, expected (cells, genes).")
        self.shape = (int(shape[0]), int(shape[1]))
        self.data, self.indices = self._reader(node["data"]), self._reader(node["indices"])
        self._indptr = self._reader(node["indptr"])
        self.dtype = self.data.dtype
        if any(array.dtype.kind not in "iu" for array in (self.indices, self._indptr)):
            raise UserError(f"{self.path}: {self.name} has indices that are not integers.")
        if any(len(array.shape) != 1 for array in (self.data, self.indices, self._indptr)):
            raise UserError(f"{self.path}: the arrays of {self.name} are not one-dimensional.")
        self.nnz = self.data.shape[0]
        if self.indices.shape[0] != self.nnz:
            raise DamagedFileError(
                f"{self.path}: {self.name} has {self.nnz} values but {self.indices.shape[0]} indices. {_DAMAGED}"
            )

    def _reader(self, node: Any, transposed: bool = False) -> Reader:
        if node.dtype.kind not in "iufb":
            raise UserError(f"{self.path}: {self.name} holds {node.dtype}, expected numbers.")
        return Reader(node, remote=self._remote, transposed=transposed)

    @property
    def n_major(self) -> int:
        """Rows of CSR and dense, columns of CSC: what `read_major` counts in."""
        return self.shape[1] if self.layout == "csc" else self.shape[0]

    @cached_property
    def indptr(self) -> np.ndarray:
        """Row (CSR) or column (CSC) pointers, int64, checked to increase from 0 to the number of values."""
        with reading(self.path, f"{self.name}/indptr"):
            raw = self._indptr.read(0, self._indptr.shape[0])
        indptr = raw.astype(np.int64)
        axis = "genes" if self.layout == "csc" else "cells"
        if indptr.size != self.n_major + 1:
            raise DamagedFileError(
                f"{self.path}: {self.name} has {self.n_major} {axis} but {indptr.size} row pointers. {_DAMAGED}"
            )
        steps = np.diff(indptr)
        if indptr[0] != 0 or indptr[-1] != self.nnz or (steps < 0).any():
            at = int(np.argmax(steps < 0)) if (steps < 0).any() else 0 if indptr[0] else indptr.size - 1
            raise DamagedFileError(
                f"{self.path}: {self.name}/indptr does not increase from 0 to {self.nnz} (see position {at}). {_DAMAGED}"
            )
        return indptr

    def read_major(self, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of CSR, or columns of CSC, `lo:hi` as `(indptr, indices, data)`, dtypes as stored, `indptr` from 0."""
        start, stop = int(self.indptr[lo]), int(self.indptr[hi])
        with reading(self.path, f"{self.name}/indices [{start}:{stop}]"):
            indices = self.indices.read(start, stop)
        with reading(self.path, f"{self.name}/data [{start}:{stop}]"):
            data = self.data.read(start, stop)
        return self.indptr[lo : hi + 1] - start, indices, data

    def slices(self, name: str, start: int, stop: int, at_most: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Entries `start:stop` of `indices` or `data` slice by slice, as `(place after start, values)`."""
        reader = self.indices if name == "indices" else self.data
        with reading(self.path, f"{self.name}/{name} [{start}:{stop}]"):
            yield from reader.slices(start, stop, at_most or stop - start)

    def entries(self, start: int, stop: int, at_most: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Entries `start:stop` slice by slice, as `(place, indices, data)`; hardly more than `at_most` in memory."""
        both = [self.slices(name, start, stop, at_most) for name in ("indices", "data")]
        indices = data = np.empty(0)
        while start < stop:
            indices, data = (own if own.size else next(more)[1] for own, more in zip((indices, data), both, strict=True))
            n = min(indices.size, data.size)  # chunks of the two may differ
            yield start, indices[:n], data[:n]
            start, indices, data = start + n, indices[n:], data[n:]

    def read_dense(self, lo: int, hi: int) -> np.ndarray:
        """Rows `lo:hi` of a dense matrix."""
        with reading(self.path, f"{self.name} rows [{lo}:{hi}]"):
            return self.data.read(lo, hi)

    def read_rows(self, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows `lo:hi` of any layout as CSR. For CSC this reads the whole matrix, in bounded steps."""
        if self.layout == "csr":
            return self.read_major(lo, hi)
        if self.layout == "dense":
            block = self.read_dense(lo, hi)
            rows, cols = np.nonzero(block)
            indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=hi - lo))])
            return indptr.astype(np.int64), cols, block[rows, cols]
        blocks = [self._rows_of_columns(lo, hi, *span) for span in self.spans(1 << 22)]
        rows, cols, data = (np.concatenate(part) for part in zip(*blocks, strict=True))
        order = np.argsort(rows, kind="stable")
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=hi - lo))])
        return indptr.astype(np.int64), cols[order], data[order]

    def _rows_of_columns(self, lo: int, hi: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indptr, rows, data = self.read_major(first, last)
        wanted = (rows >= lo) & (rows < hi)
        cols = np.repeat(np.arange(first, last), np.diff(indptr))
        return rows[wanted].astype(np.int64) - lo, cols[wanted], data[wanted]

    def spans(self, n_values: int) -> list[tuple[int, int]]:
        """Cut the rows (columns for CSC) into spans of about `n_values` stored values, at least one row each."""
        if self.layout == "dense":
            step = max(1, n_values // max(1, self.shape[1]))
            edges = np.arange(0, self.n_major, step)
        else:
            marks = np.arange(0, max(1, self.nnz or 0), max(1, n_values))
            edges = np.unique(np.searchsorted(self.indptr[:-1], marks, side="right") - 1)
            edges[:1] = 0
        stops = np.append(edges[1:], self.n_major)
        return [(int(lo), int(hi)) for lo, hi in zip(edges, stops, strict=True) if hi > lo]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
