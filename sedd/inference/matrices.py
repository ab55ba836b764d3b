"""Rows of a matrix of an AnnData, wherever it is and however it is stored.

Every task reads its counts here. Values are widened before entries that are stored twice are added up: 200 + 200 is 400, also in uint8.
"""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from sedd.errors import UserError
from sedd.io.input.matrix import Matrix

_AT_ONCE = 2048
"""Rows that are read together: a store has many in a chunk."""


class Rows:
    """Rows of a matrix as float64.

    Parameters
    ----------
    matrix : (n, m)
        A NumPy array, a SciPy sparse matrix or array, a Dask array, or a matrix in an open file, as an input or a backed AnnData
        has it. One that is stored by columns is held in memory.
    name
        What messages call the data.
    columns : (m,) bool, optional
        Which columns there are of those in a file; all if None.

    Raises
    ------
    UserError
        If it does not hold real numbers.
    """

    def __init__(self, matrix: Any, name: str = "the AnnData", columns: np.ndarray | None = None) -> None:
        self.shape: tuple[int, int] = matrix.shape
        self._name, self._columns = name, columns
        self._compressed: tuple[Any, Any, np.ndarray] | None = None
        self._dense: Any = None
        if isinstance(matrix, Matrix) and matrix.layout == "csc":
            indptr, indices, data = matrix.read_major(0, matrix.n_major)
            self._compressed = _by_rows(data, indices, indptr, self.shape)
        elif isinstance(matrix, ad.abc.CSRDataset):
            self._compressed = matrix.group["data"], matrix.group["indices"], matrix.group["indptr"][...]
        elif isinstance(matrix, ad.abc.CSCDataset):
            data, indices, indptr = (matrix.group[part][...] for part in ("data", "indices", "indptr"))
            self._compressed = _by_rows(data, indices, indptr, self.shape)
        elif sp.issparse(matrix):
            self._compressed = _compressed(matrix)
        else:
            self._dense = matrix
        dtype = np.dtype(matrix.dtype)
        if dtype.kind not in "biuf":
            raise UserError(f"{name}: the matrix holds {dtype}; expected numbers.")

    def take(self, rows: np.ndarray) -> sp.csr_matrix:
        """Return rows by their numbers, which increase."""
        if not rows.size:
            return sp.csr_matrix((0, self.shape[1] if self._columns is None else int(self._columns.sum())))
        found = []
        edges = np.searchsorted(rows // _AT_ONCE, np.unique(rows // _AT_ONCE))
        for chosen in np.split(rows, edges[1:]):
            lo, hi = int(chosen[0]), int(chosen[-1]) + 1
            block = self._between(lo, hi)
            found.append(block if len(chosen) == hi - lo else block[chosen - lo])
        whole = sp.vstack(found, format="csr") if len(found) > 1 else found[0]
        return whole if self._columns is None else whole[:, np.flatnonzero(self._columns)]

    def _between(self, lo: int, hi: int) -> sp.csr_matrix:
        if isinstance(self._dense, Matrix):
            indptr, indices, data = self._dense.read_rows(lo, hi)
        elif self._compressed is None:
            block = self._dense[lo:hi]
            block = block.compute() if hasattr(block, "compute") else block
            if not sp.issparse(block):
                return sp.csr_matrix(np.ma.filled(np.ma.asarray(block).astype(np.float64), np.nan))
            data, indices, indptr = _compressed(block)
        else:
            data, indices, pointers = self._compressed
            start, stop = int(pointers[lo]), int(pointers[hi])
            data, indices, indptr = data[start:stop], indices[start:stop], pointers[lo : hi + 1] - start
        if len(indices) and (indices.min() < 0 or indices.max() >= self.shape[1]):
            raise UserError(
                f"{self._name}: the matrix has an entry in column {indices[(indices < 0) | (indices >= self.shape[1])][0]}, and there are "
                f"{self.shape[1]} genes; expected columns from 0 on."
            )
        return sp.csr_matrix((np.asarray(data, np.float64), indices, indptr), shape=(hi - lo, self.shape[1]))


def _compressed(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return data, indices and row pointers of a sparse matrix, entries that are stored twice as they are."""
    if matrix.format == "csr":
        return matrix.data, matrix.indices, matrix.indptr
    if matrix.format == "csc":
        return _by_rows(matrix.data, matrix.indices, matrix.indptr, matrix.shape)
    entries = matrix.astype(np.float64).tocsr()
    return entries.data, entries.indices, entries.indptr


def _by_rows(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a matrix that is stored by columns, by rows; SciPy knows no half precision."""
    wide = data.astype(np.float32) if data.dtype == np.float16 else data
    csr = sp.csc_matrix((wide, indices, indptr), shape=shape).tocsr()
    return csr.data, csr.indices, csr.indptr
