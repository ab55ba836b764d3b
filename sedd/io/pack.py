"""Kernels of the conversion: narrow, check, count and place the entries of CSR blocks.

Each public function checks and allocates, and calls one nogil Numba kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

TOLERANCE = 1e-6
"""How far from an integer a value may be and still be taken for a count."""

SMALL = 64
"""Counts below this are tallied in a dense table, the few above as a list."""


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


def to_counts(values: np.ndarray, narrow: np.dtype) -> Counts:
    """Turn stored values into counts of type `narrow`, or of a wider one if they need it.

    Parameters
    ----------
    values : (nnz,) any integer, float or bool dtype
    narrow : uint8, uint16 or uint32, the type to try first
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
        wrong, n_zero, n_rounded = _narrow_real(values, out, limit, values.dtype.type(TOLERANCE))
    else:
        wrong, n_zero = _narrow_integers(values, out, values.dtype.type(min(most, np.iinfo(values.dtype).max)))
        n_rounded = 0
    if not wrong:
        return Counts(out, n_zero, n_rounded, -1)
    bad = int(_first_bad(values))
    if bad < 0:
        return to_counts(values, np.dtype(np.uint16 if narrow.itemsize == 1 else np.uint32))
    return Counts(out, n_zero, n_rounded, bad)


# The two that follow look at every entry and never leave the loop early, so that the compiler can vectorise them.


@njit(cache=True, nogil=True)
def _narrow_real(values, out, limit, tolerance):  # type: ignore[no-untyped-def]
    wrong = 0
    n_zero = 0
    n_rounded = 0
    zero = values.dtype.type(0)
    for i in range(values.size):
        x = values[i]
        r = np.rint(x)
        wrong += not ((abs(x - r) <= tolerance) & (r >= zero) & (r <= limit))
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
def _first_bad(values):  # type: ignore[no-untyped-def]
    for i in range(values.size):
        x = float(values[i])
        r = np.rint(x)
        if not (abs(x - r) <= TOLERANCE) or r < 0 or r > 4294967295.0:
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


class Tally(NamedTuple):
    """Statistics of a block of cells, gathered in one pass over its entries.

    `keys`, `numbers` are the histogram: `keys = gene << 32 | count`, each once, `numbers` how many entries have it.
    For real values they are empty and `gene_real` holds sum, sum of squares, non-zeros and maximum of each gene.
    """

    total: np.ndarray
    largest: np.ndarray
    hashes: np.ndarray
    keys: np.ndarray
    numbers: np.ndarray
    gene_real: np.ndarray


def tally(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, n_vars: int) -> Tally:
    """Count a CSR block: per cell the total, the largest value and a hash of its entries; per gene the histogram.

    Parameters
    ----------
    indptr : (n_rows + 1,) int64, from 0
    indices : (nnz,)
    values : (nnz,) unsigned counts, or float32 real values
    """
    n_rows = indptr.size - 1
    hashes, keys = np.zeros(n_rows, np.uint64), _gene_keys(n_vars)
    if values.dtype.kind == "f":
        total, largest = np.zeros(n_rows, np.float64), np.zeros(n_rows, np.float32)
        gene_real = np.zeros((4, n_vars))
        gene_real[3] = -np.inf
        _tally_real(indptr, indices, values, values.view(np.uint32), keys, total, largest, hashes, gene_real)
        none = np.empty(0, np.int64)
        return Tally(total, largest, hashes, none, none, gene_real)
    total, largest = np.zeros(n_rows, np.int64), np.zeros(n_rows, np.uint32)
    table = np.zeros((SMALL, n_vars), np.uint32)  # by count first: most are 1 or 2, and those rows stay in the cache
    rare = np.empty(max(1024, values.size // 32), np.int64)
    while (n_rare := int(_tally(indptr, indices, values, keys, total, largest, hashes, table, rare))) > rare.size:
        rare = np.empty(n_rare, np.int64)
        table[:] = 0
    held = np.flatnonzero(table)
    genes, counts = held % n_vars, held // n_vars
    rare_keys, rare_numbers = np.unique(rare[:n_rare], return_counts=True)
    held_keys = np.concatenate([genes << 32 | counts, rare_keys])
    numbers = np.concatenate([table.reshape(-1)[held].astype(np.int64), rare_numbers])
    return Tally(total, largest, hashes, held_keys, numbers, np.empty((4, 0)))


def _gene_keys(n: int) -> np.ndarray:
    """A random odd 64-bit number for each of at least `n` genes (splitmix64): the weights of the cells' hashes."""
    global _KEYS
    keys = _KEYS
    if keys.size < n:
        with np.errstate(over="ignore"):
            h = (np.arange(1, 2 * n + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            keys = _KEYS = (h ^ (h >> np.uint64(31))) | np.uint64(1)
    return keys


_KEYS = np.empty(0, np.uint64)


@njit(cache=True, nogil=True, inline="always")
def _hash_row(keys, genes, bits):  # type: ignore[no-untyped-def]
    """Sum of key times value modulo 2**64: odd keys make every change of a single value or gene change it."""
    total = np.uint64(0)
    for k in range(genes.size):
        total += keys[np.uint32(genes[k])] * np.uint64(bits[k])
    return total


@njit(cache=True, nogil=True)
def _tally(indptr, indices, values, keys, total, largest, hashes, table, rare):  # type: ignore[no-untyped-def]
    n_rare = 0
    small = np.uint32(table.shape[0])
    for row in range(indptr.size - 1):
        genes = indices[indptr[row] : indptr[row + 1]]
        counts = values[indptr[row] : indptr[row + 1]]
        row_total = np.int64(0)
        row_max = values.dtype.type(0)
        for value in counts:
            row_total += np.int64(value)
            row_max = max(row_max, value)
        total[row] = row_total
        largest[row] = row_max
        hashes[row] = _hash_row(keys, genes, counts)
        for k in range(genes.size):
            value = np.uint32(counts[k])
            if value < small:
                table[value, np.uint32(genes[k])] += np.uint32(1)
            else:
                if n_rare < rare.size:
                    rare[n_rare] = np.int64(genes[k]) << 32 | np.int64(value)
                n_rare += 1
    return n_rare


@njit(cache=True, nogil=True)
def _tally_real(indptr, indices, values, bits, keys, total, largest, hashes, gene_real):  # type: ignore[no-untyped-def]
    for row in range(indptr.size - 1):
        row_total = 0.0
        for k in range(indptr[row], indptr[row + 1]):
            gene = np.int64(indices[k])
            x = np.float64(values[k])
            row_total += x
            if k == indptr[row] or values[k] > largest[row]:
                largest[row] = values[k]
            gene_real[0, gene] += x
            gene_real[1, gene] += x * x
            gene_real[2, gene] += 1
            gene_real[3, gene] = max(gene_real[3, gene], x)
        total[row] = row_total
        hashes[row] = _hash_row(keys, indices[indptr[row] : indptr[row + 1]], bits[indptr[row] : indptr[row + 1]])


def cell_hashes(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Hash of the entries of each row, independent of their order; what `tally` returns as `hashes`.

    Entries of a row that are hashed in several calls add up to the hash of the row.
    """
    hashes = np.zeros(indptr.size - 1, np.uint64)
    bits = values.astype(np.float32, copy=False).view(np.uint32) if values.dtype.kind == "f" else values
    _hash_rows(indptr, indices, bits, _gene_keys(int(indices.max(initial=0)) + 1), hashes)
    return hashes


@njit(cache=True, nogil=True)
def _hash_rows(indptr, indices, bits, keys, hashes):  # type: ignore[no-untyped-def]
    for row in range(indptr.size - 1):
        hashes[row] = _hash_row(keys, indices[indptr[row] : indptr[row + 1]], bits[indptr[row] : indptr[row + 1]])


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
    """
    if genes is None:
        genes = np.arange(n_vars, dtype=np.int32)
    real = values.dtype.kind == "f"
    scratch = np.zeros(n_vars, np.float32 if real else np.int64)
    seen = np.zeros(n_vars, np.uint8)
    out_indptr = np.zeros_like(indptr)
    out_indices = np.empty(indices.size, index_dtype(n_vars))
    out_values = np.empty(indices.size, np.float32 if real else np.uint32)
    n_summed = _clean_rows(indptr, indices, values, genes, scratch, seen, out_indptr, out_indices, out_values)
    n = int(out_indptr[-1])
    return out_indptr, out_indices[:n], out_values[:n], int(n_summed)


@njit(cache=True, nogil=True)
def _clean_rows(indptr, indices, values, genes, scratch, seen, out_indptr, out_indices, out_values):  # type: ignore[no-untyped-def]
    n = 0
    n_summed = 0
    for row in range(indptr.size - 1):
        low, high = seen.size, -1
        for k in range(indptr[row], indptr[row + 1]):
            gene = genes[indices[k]]
            if gene < 0 or values[k] == 0:
                continue
            n_summed += seen[gene]
            seen[gene] = 1
            scratch[gene] += values[k]
            low, high = min(low, gene), max(high, gene)
        for gene in range(low, high + 1):
            if seen[gene]:
                if scratch[gene] != 0:
                    out_indices[n] = gene
                    out_values[n] = scratch[gene]
                    n += 1
                seen[gene] = 0
                scratch[gene] = 0
        out_indptr[row + 1] = n
    return n_summed


def gather_rows(indptr: np.ndarray, order: np.ndarray, *vectors: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rows of a CSR block in another order: the lengths of the rows and each vector rearranged."""
    lengths = np.diff(indptr)[order]
    outs = [np.empty_like(vector) for vector in vectors]
    for vector, out in zip(vectors, outs, strict=True):
        _gather_rows(indptr, order, vector, out)
    return lengths, outs


@njit(cache=True, nogil=True)
def _gather_rows(indptr, order, vector, out):  # type: ignore[no-untyped-def]
    n = 0
    for row in order:
        for k in range(indptr[row], indptr[row + 1]):
            out[n] = vector[k]
            n += 1


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


def place_runs(
    cursor: np.ndarray, rows: np.ndarray, lengths: np.ndarray, piece: tuple[np.ndarray, np.ndarray],
    target: tuple[np.ndarray, np.ndarray],
) -> None:  # fmt: skip
    """Append runs of entries to the rows of a block under construction.

    Parameters
    ----------
    cursor : (n_rows,) int64, where the next entry of each row goes; advanced
    rows : (n_runs,) the row of each run
    lengths : (n_runs,) entries of each run, or empty when each has one
    piece : indices and values to place
    target : indices and values of the block
    """
    _place_runs(cursor, rows, lengths, *piece, *target)


@njit(cache=True, nogil=True)
def _place_runs(cursor, rows, lengths, indices, values, out_indices, out_values):  # type: ignore[no-untyped-def]
    n = np.int64(0)
    for run in range(rows.size):
        row = rows[run]
        at = cursor[row]
        length = np.int64(lengths[run]) if lengths.size else np.int64(1)
        for k in range(length):
            out_indices[at + k] = indices[n + k]
            out_values[at + k] = values[n + k]
        n += length
        cursor[row] = at + length
