"""Rows from anywhere in a soup of non-zeros -> one compact CSR block, in the types that scipy and others expect."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from sedd.errors import DamagedFileError, UserError
from sedd.kernels.rows import choose, fetch, inside

EXACT_FLOAT32 = 1 << 24
"""Up to it float32 has all whole numbers."""


@numba.njit(cache=True, nogil=True)
def _count(indices: Any, starts: Any, stops: Any, n_store: Any, columns: Any, indptr: Any) -> bool:
    """Write the row pointers; return whether all indices are inside the store."""
    fine = True
    indptr[0] = 0
    for row in range(starts.shape[0]):
        if row + 1 < starts.shape[0]:
            fetch(indices, starts[row + 1], stops[row + 1])
        genes = indices[starts[row] : stops[row]]
        kept: Any = genes.shape[0]
        if not inside(genes, n_store):
            fine = False
        elif columns.shape[0] > 0:
            kept = 0
            for i in range(genes.shape[0]):
                kept += columns[np.uint64(genes[i])] >= 0
        indptr[row + 1] = indptr[row] + kept
    return fine


@numba.njit(cache=True, nogil=True)
def _gather(
    indices: Any, data: Any, starts: Any, stops: Any, columns: Any, member: Any, indptr: Any, out_indices: Any, out_data: Any
) -> None:
    for row in range(starts.shape[0]):
        if row + 1 < starts.shape[0]:
            fetch(indices, starts[row + 1], stops[row + 1])
            fetch(data, starts[row + 1], stops[row + 1])
        # Rows are cut out first: a subscript that may be negative keeps a loop from being vectorised.
        genes, values = indices[starts[row] : stops[row]], data[starts[row] : stops[row]]
        own_indices, own_data = out_indices[indptr[row] : indptr[row + 1]], out_data[indptr[row] : indptr[row + 1]]
        if columns.shape[0] == 0:
            for i in range(genes.shape[0]):
                own_indices[i] = genes[i]
            for i in range(genes.shape[0]):
                own_data[i] = values[i]
        else:
            chosen = np.empty(genes.shape[0], np.uint32)
            for k in range(choose(genes, member, chosen)):
                at = np.uint64(chosen[k])
                own_indices[k] = columns[np.uint64(genes[at])]
                own_data[k] = values[at]


@numba.njit(cache=True, nogil=True)
def _transform(indptr: Any, data: Any, target: Any, log: Any) -> None:
    for row in range(indptr.shape[0] - 1):
        total = 0.0
        for i in range(indptr[row], indptr[row + 1]):
            total += data[i]
        scale = target / total if target > 0 and total > 0 else 1.0
        for i in range(indptr[row], indptr[row + 1]):
            value = np.float64(data[i]) * scale
            data[i] = np.log1p(value) if log else value


def row_pointers(
    indices: np.ndarray, starts: np.ndarray, stops: np.ndarray, *, n_store: int, columns: np.ndarray
) -> np.ndarray:
    """Row pointers of the block that `gather_rows` would write.

    Parameters
    ----------
    indices : (nnz,) integers, columns of the store
    starts, stops : (B,) int64; row `i` is `indices[starts[i]:stops[i]]`
    n_store : int
        Genes in the store.
    columns : (n_store,) int32
        Column of each gene in the panel, -1 outside it; of length 0 for all genes.

    Returns
    -------
    indptr : (B + 1,) int64

    Raises
    ------
    ValueError
        If a row reaches outside `indices` or an index outside the store.
    """
    if starts.size and not (int(starts.min()) >= 0 and int(stops.max()) <= indices.size):
        raise UserError(f"rows reach from {starts.min()} to {stops.max()} in an array of {indices.size} values")
    indptr = np.empty(starts.size + 1, np.int64)
    if not _count(indices, starts, stops, n_store, columns, indptr):
        raise DamagedFileError(f"a gene index is outside the store's {n_store} genes; the store is damaged")
    return indptr


def gather_rows(
    indices: np.ndarray,
    data: np.ndarray,
    starts: np.ndarray,
    stops: np.ndarray,
    *,
    columns: np.ndarray,
    indptr: np.ndarray,
    out_indices: np.ndarray,
    out_data: np.ndarray,
    target_sum: float = 0.0,
    log1p: bool = False,
) -> None:
    """Copy rows into one compact block.

    Parameters
    ----------
    indices, data, starts, stops, columns
        As for `row_pointers`.
    indptr : (B + 1,) int64 from `row_pointers`
    out_indices : (indptr[-1],) integers, overwritten
    out_data : (indptr[-1],) any type, overwritten
    target_sum : float
        Scale each row to this sum; 0 leaves rows as they are. Needs floating `out_data`, as `log1p` does.
    log1p : bool
        Take log(1 + x), after scaling.
    """
    if out_indices.size != indptr[-1] or out_data.size != indptr[-1]:
        raise UserError(f"out arrays hold {out_indices.size} and {out_data.size} values; expected {indptr[-1]}")
    if (target_sum or log1p) and out_data.dtype.kind != "f":
        raise UserError(f"{out_data.dtype} values cannot be normalised; ask for floating point")
    _gather(indices, data, starts, stops, columns, (columns >= 0).astype(np.uint8), indptr, out_indices, out_data)
    if target_sum or log1p:
        _transform(indptr, out_data, float(target_sum), log1p)


def take_rows(
    starts: np.ndarray, stops: np.ndarray, indices: np.ndarray, data: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows back to back, in the order asked for.

    Parameters
    ----------
    starts, stops : (B,) int64; row `i` is `starts[i]:stops[i]` of `indices` and `data`
    indices, data : (nnz,) any types

    Returns
    -------
    indptr, indices, data : of the rows, in the same types
    """
    out = np.concatenate([[0], np.cumsum(stops - starts)])
    indices_out, data_out = np.empty(out[-1], indices.dtype), np.empty(out[-1], data.dtype)
    gather_rows(
        indices, data, starts, stops, columns=np.empty(0, np.int32), indptr=out, out_indices=indices_out, out_data=data_out
    )
    return out, indices_out, data_out
