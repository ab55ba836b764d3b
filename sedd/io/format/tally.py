"""Count the entries of cells as they pass: totals and hashes of cells, histograms of genes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from sedd.kernels.random_bits import sequence

SMALL = 64
"""Counts below this are tallied in a dense table, the few above as a list."""

MANY = 1 << 22
"""Counts in that list before those that are alike are added up."""


class Tally(NamedTuple):
    """Statistics of a block of cells.

    `keys`, `numbers` are the histogram: `keys = gene << 32 | count`, each once, `numbers` how many entries have it.
    For real values they are empty and `gene_real` holds sum, sum of squares, non-zeros and maximum of each gene.
    `largest` of a cell without entries is 0 for counts, minus infinity for real values.
    """

    row_nnz: np.ndarray
    total: np.ndarray
    largest: np.ndarray
    hashes: np.ndarray
    keys: np.ndarray
    numbers: np.ndarray
    gene_real: np.ndarray


class KeyList:
    """Keys and how often each was seen, added up where they are alike once the list is long."""

    def __init__(self) -> None:
        self._runs = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        self._length = 0

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Add `numbers` to the keys of the same places; both arrays are kept, not copied."""
        self._runs.append((keys, numbers))
        self._length += keys.size
        if self._length > MANY:
            # Half counts again, so that adding up stays rare when few keys are alike.
            self._length = self.merged()[0].size // 2

    def merged(self) -> tuple[np.ndarray, np.ndarray]:
        """Return every key once, ascending, and its number."""
        if len(self._runs) > 1:
            keys, where = np.unique(np.concatenate([keys for keys, _ in self._runs]), return_inverse=True)
            numbers = np.bincount(where, np.concatenate([numbers for _, numbers in self._runs]), keys.size)
            self._runs = [(keys, numbers.astype(np.int64))]  # exact: bincount adds in float64, the numbers are below 2**53
        return self._runs[0]


class Tallier:
    """Counts cells whose entries come in runs; a cell may be spread over several runs.

    Parameters
    ----------
    n_rows, n_vars : cells and genes
    real : values are float32, not counts
    """

    def __init__(self, n_rows: int, n_vars: int, *, real: bool = False) -> None:
        self.n_vars, self.real = n_vars, real
        self._keys = _gene_keys(n_vars)
        self._nnz, self._hashes = np.zeros(n_rows, np.int64), np.zeros(n_rows, np.uint64)
        self._total = np.zeros(n_rows, np.float64 if real else np.int64)
        self._largest = np.full(n_rows, -np.inf, np.float32) if real else np.zeros(n_rows, np.uint32)
        self._gene_real = np.concatenate([np.zeros((3, n_vars)), np.full((1, n_vars), -np.inf)])
        # By count first: most are 1 or 2, and those rows stay in the cache.
        self._table = np.zeros((SMALL, 0 if real else n_vars), np.uint32)
        self._room = np.empty(0, np.int64)
        self._rare = KeyList()
        self._last = -1

    def add(self, bounds: np.ndarray, at: int, indices: np.ndarray, values: np.ndarray, *, first: int = 0) -> bool:
        """Count one run of entries; whether the indices of each cell increase strictly.

        Parameters
        ----------
        bounds : (n + 1,) int64, where the entries of each of some consecutive cells begin and end
        at : place of the run's first entry, counted as in `bounds`
        indices, values : the run, values unsigned or float32
        first : number of the cell that `bounds` begins with
        """
        if not values.size:
            return True
        if at < bounds[0] or at + values.size > bounds[-1] or int(indices.max()) >= self.n_vars:
            raise ValueError("entries of cells or genes that are not there")
        rows = slice(first, first + bounds.size - 1)
        per_row = (self._nnz[rows], self._total[rows], self._largest[rows], self._hashes[rows])
        if self.real:
            bits = values.view(np.uint32)
            ordered = _tally_real(bounds, at, indices, values, bits, self._last, self._keys, *per_row, self._gene_real)
        else:
            if self._room.size < values.size:
                self._room = np.empty(values.size, np.int64)
            ordered, n_rare = _tally(bounds, at, indices, values, self._last, self._keys, *per_row, self._table, self._room)
            if n_rare:
                self._rare.add(self._room[:n_rare].copy(), np.ones(n_rare, np.int64))
        self._last = int(indices[-1])
        return bool(ordered)

    def follow(self, index: int) -> None:
        """Say which index stands before the first run in its cell."""
        self._last = index

    def result(self) -> Tally:
        """Return what was counted so far."""
        keys, numbers = self._rare.merged()
        held = np.flatnonzero(self._table)
        if held.size:
            counts, genes = np.divmod(held, self.n_vars)
            keys = np.concatenate([genes << 32 | counts, keys])
            numbers = np.concatenate([self._table.reshape(-1)[held].astype(np.int64), numbers])
        return Tally(self._nnz, self._total, self._largest, self._hashes, keys, numbers, self._gene_real)


def tally(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, n_vars: int) -> Tally:
    """Count a CSR block: per cell the total, the largest value and a hash of its entries; per gene the histogram.

    Parameters
    ----------
    indptr : (n_rows + 1,) int64, from 0
    indices : (nnz,), or more, which are not looked at
    values : (nnz,) unsigned counts, or float32 real values
    """
    counter = Tallier(indptr.size - 1, n_vars, real=values.dtype.kind == "f")
    counter.add(indptr, 0, indices[: indptr[-1]], values[: indptr[-1]])
    return counter.result()


def _gene_keys(n: int) -> np.ndarray:
    """Return a random odd 64-bit number for each of at least `n` genes (splitmix64): the weights of the cells' hashes."""
    global _KEYS
    keys = _KEYS
    if keys.size < n:
        keys = _KEYS = sequence(0, 2 * n) | np.uint64(1)
    return keys


_KEYS = np.empty(0, np.uint64)


@njit(cache=True, nogil=True, inline="always")
def _hash_row(keys, genes, bits):  # type: ignore[no-untyped-def]
    """Sum of key times value modulo 2**64: odd keys make every change of a single value or gene change it."""
    total = np.uint64(0)
    for k in range(genes.size):
        total += keys[np.uint32(genes[k])] * np.uint64(bits[k])
    return total


@njit(cache=True, nogil=True, inline="always")
def _falls(genes):  # type: ignore[no-untyped-def]
    """How often the genes of a cell do not increase; all are looked at, as a loop that can end early is not vectorised."""
    falls = 0
    for k in range(1, genes.size):
        falls += genes[k] <= genes[k - 1]
    return falls


@njit(cache=True, nogil=True)
def _tally(bounds, at, indices, values, last, keys, nnz, total, largest, hashes, table, rare):  # type: ignore[no-untyped-def]
    n_rare, falls, start = 0, 0, 0
    small = np.uint32(table.shape[0])
    row = np.searchsorted(bounds, at, side="right") - 1
    if bounds[row] < at and np.int64(indices[0]) <= last:
        falls += 1
    while start < indices.size:
        stop = min(np.int64(indices.size), bounds[row + 1] - at)
        genes, counts = indices[start:stop], values[start:stop]
        row_total = np.int64(0)
        row_max = values.dtype.type(0)
        for value in counts:
            row_total += np.int64(value)
            row_max = max(row_max, value)
        nnz[row] += genes.size
        total[row] += row_total
        largest[row] = max(largest[row], np.uint32(row_max))
        hashes[row] += _hash_row(keys, genes, counts)
        falls += _falls(genes)
        for k in range(genes.size):
            value = np.uint32(counts[k])
            if value < small:
                table[value, np.uint32(genes[k])] += np.uint32(1)
            else:
                rare[n_rare] = np.int64(genes[k]) << 32 | np.int64(value)
                n_rare += 1
        start, row = stop, row + 1
    return falls == 0, n_rare


@njit(cache=True, nogil=True)
def _tally_real(bounds, at, indices, values, bits, last, keys, nnz, total, largest, hashes, gene_real):  # type: ignore[no-untyped-def]
    falls, start = 0, 0
    row = np.searchsorted(bounds, at, side="right") - 1
    if bounds[row] < at and np.int64(indices[0]) <= last:
        falls += 1
    while start < indices.size:
        stop = min(np.int64(indices.size), bounds[row + 1] - at)
        for k in range(start, stop):
            gene = np.int64(indices[k])
            x = np.float64(values[k])
            total[row] += x
            largest[row] = max(largest[row], values[k])
            gene_real[0, gene] += x
            gene_real[1, gene] += x * x
            gene_real[2, gene] += 1
            gene_real[3, gene] = max(gene_real[3, gene], x)
        nnz[row] += stop - start
        hashes[row] += _hash_row(keys, indices[start:stop], bits[start:stop])
        falls += _falls(indices[start:stop])
        start, row = stop, row + 1
    return falls == 0


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
