"""Kernels of the conversion: narrow, check and place the entries of CSR blocks.

Each public function checks and allocates, and calls one nogil Numba kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from sedd.kernels.rows import lowest_bit

TOLERANCE = 1e-6
"""How far from an integer a value may be and still be taken for a count."""
LARGEST = int(np.iinfo(np.uint32).max)
"""The largest count that a store holds."""


def index_dtype(n_vars: int) -> np.dtype:
    """Narrowest type for gene indices that AnnData and scipy take: uint16, or int32 for more than 65,536 genes."""
    return np.dtype(np.uint16 if n_vars <= 1 << 16 else np.int32)


def count_dtype(largest: int) -> np.dtype:
    """Narrowest unsigned type that holds `largest`."""
    return next(np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32) if largest <= np.iinfo(kind).max)


class Counts(NamedTuple):
    """Outcome of `to_counts`."""

    values: np.ndarray
    n_zero: int
    n_rounded: int
    bad: int
    """Position of the first entry that is no count, -1 when all are."""


def to_counts(values: np.ndarray, narrow: np.dtype, *, rounding: bool = False) -> Counts:
    """Turn stored values into counts of type `narrow`, or of a wider one if they need it.

    Parameters
    ----------
    values : (nnz,) any integer, float or bool dtype
    narrow : uint8, uint16 or uint32, the type to try first
    rounding : whether fractions above 0 are counts, rounded to the nearest whole number
    """
    if values.dtype == np.bool_:
        values = values.view(np.uint8)
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    out = np.empty(values.shape, narrow)
    most = int(np.iinfo(narrow).max)
    if values.dtype.kind == "f":
        limit = values.dtype.type(most)
        if int(limit) > most:  # float32 has no 2**32 - 1
            limit = np.nextafter(limit, values.dtype.type(0))
        tolerance = values.dtype.type(1 if rounding else TOLERANCE)
        wrong, n_zero, n_rounded = _narrow_real(values, out, limit, values.dtype.type(-TOLERANCE), tolerance)
    else:
        wrong, n_zero = _narrow_integers(values, out, values.dtype.type(min(most, np.iinfo(values.dtype).max)))
        n_rounded = 0
    if not wrong:
        return Counts(out, n_zero, n_rounded, -1)
    bad = int(_first_bad(values, 1.0 if rounding else TOLERANCE))
    if bad < 0:
        return to_counts(values, np.dtype(np.uint16 if narrow.itemsize == 1 else np.uint32), rounding=rounding)
    return Counts(out, n_zero, n_rounded, bad)


# The two that follow look at every entry and never leave the loop early, so that the compiler can vectorise them.


@njit(cache=True, nogil=True)
def _narrow_real(values, out, limit, least, tolerance):  # type: ignore[no-untyped-def]
    wrong = 0
    n_zero = 0
    n_rounded = 0
    zero = values.dtype.type(0)
    for i in range(values.size):
        x = values[i]
        r = np.rint(x)
        wrong += not ((abs(x - r) <= tolerance) & (x >= least) & (r <= limit))
        n_zero += r == zero
        n_rounded += x != r
        out[i] = np.int32(r) if out.itemsize < 4 else np.int64(r)
    return wrong, n_zero, n_rounded


@njit(cache=True, nogil=True)
def _narrow_integers(values, out, limit):  # type: ignore[no-untyped-def]
    wrong = 0
    n_zero = 0
    for i in range(values.size):
        x = values[i]
        wrong += (x < 0) | (x > limit)
        n_zero += x == 0
        out[i] = x
    return wrong, n_zero


@njit(cache=True, nogil=True)
def _first_bad(values, tolerance):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        x = float(values[i])
        r = np.rint(x)
        if not (abs(x - r) <= tolerance) or x < -TOLERANCE or r > 4294967295.0:
            return i
    return -1


def first_disorder(indptr: np.ndarray, indices: np.ndarray) -> int:
    """Row whose indices do not strictly increase, -1 when they all do.

    Parameters
    ----------
    indptr : (n_rows + 1,) int64, from 0
    indices : (nnz,) unsigned
    """
    return int(_first_disorder(indptr, indices))


@njit(cache=True, nogil=True)
def _first_disorder(indptr, indices):  # type: ignore[no-untyped-def]
    for row in range(indptr.size - 1):
        own = indices[indptr[row] : indptr[row + 1]]
        falls = 0
        for k in range(1, own.size):  # all of them: a loop that can end early is not vectorised
            falls += own[k] <= own[k - 1]
        if falls:
            return row
    return -1


def dense_rows(block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Non-zeros (NaN included) of a dense block as `(indptr int64, indices int32, values of block.dtype)`."""
    block = np.ascontiguousarray(block)
    indptr = np.zeros(block.shape[0] + 1, np.int64)
    _count_nonzero(block, indptr)
    np.cumsum(indptr, out=indptr)
    indices, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], block.dtype)
    _fill_nonzero(block, indices, values)
    return indptr, indices, values


@njit(cache=True, nogil=True)
def _count_nonzero(block, indptr):  # type: ignore[no-untyped-def]
    for row in range(block.shape[0]):
        n = 0
        for col in range(block.shape[1]):
            n += block[row, col] != 0
        indptr[row + 1] = n


@njit(cache=True, nogil=True)
def _fill_nonzero(block, indices, values):  # type: ignore[no-untyped-def]
    k = 0
    for row in range(block.shape[0]):
        for col in range(block.shape[1]):
            if block[row, col] != 0:
                indices[k] = col
                values[k] = block[row, col]
                k += 1


class LargeSumError(Exception):
    """Entries of one cell and gene, whose sum is no count that a store holds."""

    def __init__(self, row: int, gene: int, value: int) -> None:
        super().__init__(row, gene, value)
        self.row, self.gene, self.value = row, gene, value


def clean_rows(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, n_vars: int, genes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Rows made canonical: genes renamed, sorted, duplicates summed, zeros dropped.

    Parameters
    ----------
    indptr, indices, values : a CSR block, `values` unsigned or float32
    n_vars : genes of the result
    genes : (genes of the block,) int32, the new number of each gene or -1 to drop it; None keeps the numbers

    Returns
    -------
    indptr : (n_rows + 1,) int64
    indices : (nnz,) of `index_dtype(n_vars)`
    values : (nnz,) uint32, or float32
    n_summed : how many entries were added to another of the same cell and gene

    Raises
    ------
    LargeSumError
        At the first sum of counts that is larger than uint32 holds.
    """
    if genes is None:
        genes = np.arange(n_vars, dtype=np.int32)
    real = values.dtype.kind == "f"
    scratch = np.zeros(n_vars, np.float32 if real else np.int64)
    seen = np.zeros(n_vars // 64 + 1, np.uint64)
    out_indptr = np.zeros_like(indptr)
    out_indices = np.empty(indices.size, index_dtype(n_vars))
    out_values = np.empty(indices.size, np.float32 if real else np.uint32)
    limit = np.inf if real else float(LARGEST)
    n_summed, row, gene = _clean_rows(indptr, indices, values, genes, scratch, seen, out_indptr, out_indices, out_values, limit)
    if row >= 0:
        raise LargeSumError(int(row), int(gene), int(scratch[gene]))
    n = int(out_indptr[-1])
    return out_indptr, out_indices[:n], out_values[:n], int(n_summed)


@njit(cache=True, nogil=True)
def _clean_rows(indptr, indices, values, genes, scratch, seen, out_indptr, out_indices, out_values, limit):  # type: ignore[no-untyped-def]
    n = 0
    n_summed = 0
    six, last, one = np.uint64(6), np.uint64(63), np.uint64(1)
    for row in range(indptr.size - 1):
        low, high = np.int64(seen.size), np.int64(-1)
        for k in range(indptr[row], indptr[row + 1]):
            new = genes[indices[k]]
            if new < 0 or values[k] == 0:
                continue
            own = np.uint64(new)
            word, bit = np.int64(own >> six), one << (own & last)
            n_summed += (seen[word] & bit) != 0
            seen[word] |= bit
            scratch[own] += values[k]
            low, high = min(low, word), max(high, word)
        for k in range(low, high + 1):  # a bit a gene: of many genes few are seen in a cell
            rest, seen[k] = seen[k], 0
            while rest:
                gene = (np.uint64(k) << six) | lowest_bit(rest)
                rest &= rest - one
                if scratch[gene] > limit:
                    return n_summed, row, np.int64(gene)
                if scratch[gene] != 0:
                    out_indices[n] = gene
                    out_values[n] = scratch[gene]
                    n += 1
                scratch[gene] = 0
        out_indptr[row + 1] = n
    return n_summed, -1, -1


def deal_columns(
    indptr: np.ndarray, rows: np.ndarray, values: np.ndarray, genes: np.ndarray, places: np.ndarray | None, first: int,
    step: int, n_parts: int, dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Sort the entries of CSC columns by the part that their cell belongs to; within a part, columns stay in order.

    Parameters
    ----------
    indptr, rows, values : columns of CSC, `indptr` from 0
    genes : (n_columns,) int32, number of each column's gene in the store, or -1 to drop it
    places : (n_obs,) place of each cell in the store, -1 to drop it; None means `first + row`
    first : place of row 0 when `places` is None
    step : cells in a part
    dtype : of gene indices

    Returns
    -------
    cuts : (n_parts + 1,) int64, where each part's entries begin
    local : (nnz,) uint32, row within the part
    indices, values : of the entries kept; zeros are dropped
    """
    if places is None:
        places = np.empty(0, np.int64)
    cursor = np.zeros(n_parts + 1, np.int64)
    _count_deal(indptr, rows, values, genes, places, first, step, cursor)
    cuts = np.cumsum(cursor)
    n = int(cuts[-1])
    local, indices, out = np.empty(n, np.uint32), np.empty(n, dtype), np.empty(n, values.dtype)
    _deal_columns(indptr, rows, values, genes, places, first, step, cuts[:-1].copy(), local, indices, out)
    return cuts, local, indices, out


@njit(cache=True, nogil=True)
def _count_deal(indptr, rows, values, genes, places, first, step, counts):  # type: ignore[no-untyped-def]
    for column in range(indptr.size - 1):
        if genes[column] < 0:
            continue
        for k in range(indptr[column], indptr[column + 1]):
            place = places[rows[k]] if places.size else np.int64(rows[k]) + first
            if place >= 0 and values[k] != 0:
                counts[place // step + 1] += 1


@njit(cache=True, nogil=True)
def _deal_columns(indptr, rows, values, genes, places, first, step, cursor, local, indices, out):  # type: ignore[no-untyped-def]
    for column in range(indptr.size - 1):
        gene = genes[column]
        if gene < 0:
            continue
        for k in range(indptr[column], indptr[column + 1]):
            place = places[rows[k]] if places.size else np.int64(rows[k]) + first
            if place < 0 or values[k] == 0:
                continue
            part = place // step
            at = cursor[part]
            local[at] = place - part * step
            indices[at] = gene
            out[at] = values[k]
            cursor[part] = at + 1


def append_rows(
    cursor: np.ndarray, rows: np.ndarray, lengths: np.ndarray, own: tuple[np.ndarray, np.ndarray],
    target: tuple[np.ndarray, np.ndarray],
) -> None:  # fmt: skip
    """Append groups of entries to the rows of a block under construction.

    Parameters
    ----------
    cursor : (n_rows,) int64, where the next entry of each row goes; advanced
    rows : (n_groups,) the row of each group
    lengths : (n_groups,) entries of each group, or empty when each has one
    own : indices and values to append
    target : indices and values of the block
    """
    _append_rows(cursor, rows, lengths, *own, *target)


@njit(cache=True, nogil=True)
def _append_rows(cursor, rows, lengths, indices, values, out_indices, out_values):  # type: ignore[no-untyped-def]
    n = np.int64(0)
    for group in range(rows.size):
        row = rows[group]
        at = cursor[row]
        length = np.int64(lengths[group]) if lengths.size else np.int64(1)
        for k in range(length):
            out_indices[at + k] = indices[n + k]
            out_values[at + k] = values[n + k]
        n += length
        cursor[row] = at + length
