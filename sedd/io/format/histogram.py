"""Histograms of counts, and what follows from them: variable genes without a second look at the cells."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from scipy import sparse
from tqdm.auto import tqdm

from sedd.errors import UserError
from sedd.io.format.shards import CHUNK
from sedd.io.format.tally import SMALL, KeyList, tally

BLOCK = 1 << 22
"""Stored values read at once."""


class Store(Protocol):
    """What counting needs of a `sedd.io.store.CellStore`; its attributes of these names."""

    @property
    def n_obs(self) -> int: ...  # noqa: D102

    @property
    def n_vars(self) -> int: ...  # noqa: D102

    @property
    def max_value(self) -> float: ...  # noqa: D102

    def gene_histogram(self) -> sparse.csr_array: ...  # noqa: D102

    @property
    def indptr(self) -> np.ndarray: ...  # noqa: D102

    def read_cells(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...  # noqa: D102


def histogram(
    store: Store, cells: np.ndarray | None = None, *, without: np.ndarray | None = None, progress: bool = False
) -> sparse.csr_array:
    """Count histogram of each gene over some cells; zeros are column 0.

    What all cells have was counted by the conversion, so what is read is only the cells asked for, or only the others if those are fewer.

    Parameters
    ----------
    store : a store of counts
    cells : (n,) int64, ascending; None for all cells, which costs no read
    without : (n,) int64, ascending, in the place of `cells`: for all cells but these
    progress : show a bar

    Returns
    -------
    hist : (n_vars, max_value + 1) int64; `hist[g, v]` cells have `v` counts of gene `g`
    """
    whole = store.gene_histogram()
    if cells is None and without is None:
        return whole
    subtract = cells is None
    read = np.asarray(without if subtract else cells, np.int64)
    if read.size and (read[0] < 0 or read[-1] >= store.n_obs or (np.diff(read) <= 0).any()):
        raise UserError(f"cells must ascend within 0..{store.n_obs - 1}.")
    n_cells = store.n_obs - read.size if subtract else read.size
    if read.size > store.n_obs // 2:
        chosen = np.zeros(store.n_obs, bool)
        chosen[read] = True
        read, subtract = np.flatnonzero(~chosen), not subtract
    counted = _tally_cells(store, read, progress)
    if subtract:
        rest = (whole[:, 1:] - counted).tocsr()
        rest.eliminate_zeros()
        counted = sparse.csr_array(rest)
    return with_zeros(counted, n_cells)


def with_zeros(nonzero: sparse.csr_array, n_cells: int) -> sparse.csr_array:
    """Put the column of zeros in front of the histogram of non-zeros, whose rows then sum to `n_cells`."""
    zeros = n_cells - np.asarray(nonzero.sum(axis=1)).reshape(-1)
    return sparse.csr_array(sparse.hstack([sparse.csr_array(zeros[:, None]), nonzero], format="csr"), dtype=np.int64)


class KeyCounter:
    """Adds up histograms given as the keys and numbers of a `Tally`.

    The many small counts are added in a dense table, the few large ones kept as a list and merged now and then.
    """

    def __init__(self, n_vars: int) -> None:
        self.n_vars = n_vars
        self._table = np.zeros(n_vars * SMALL, np.int64)
        self._rare = KeyList()

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Add one histogram, whose keys are all different."""
        count = keys & 0xFFFFFFFF
        small = count < SMALL
        self._table[(keys[small] >> 32) * SMALL + count[small]] += numbers[small]
        self._rare.add(keys[~small], numbers[~small])

    def histogram(self, largest: int) -> sparse.csr_array:
        """Histogram of non-zeros `(n_vars, largest)`; column `v - 1` is count `v`."""
        place = np.flatnonzero(self._table)
        genes, counts = place // SMALL, place % SMALL
        rare, numbers = self._rare.merged()
        rows, columns = np.concatenate([genes, rare >> 32]), np.concatenate([counts, rare & 0xFFFFFFFF]) - 1
        values = np.concatenate([self._table[place], numbers])
        return sparse.csr_array((values, (rows, columns)), shape=(self.n_vars, max(1, largest)), dtype=np.int64)


def _tally_cells(store: Store, cells: np.ndarray, progress: bool) -> sparse.csr_array:
    """Histogram of the non-zeros of the cells, which ascend, reading only the chunks that hold some."""
    counter = KeyCounter(store.n_vars)
    starts, stops = store.indptr[cells] // CHUNK, -(-store.indptr[cells + 1] // CHUNK)
    before = np.concatenate([[0], np.maximum.accumulate(stops)[:-1]]) if cells.size else stops
    decoded = np.cumsum(np.maximum(0, stops - np.maximum(starts, before)) * CHUNK)  # entries of all chunks up to each cell's last
    edges = np.flatnonzero(np.diff(decoded // BLOCK)) + 1
    for some in tqdm(np.split(cells, edges), desc="histogram", unit="block", disable=not progress):
        if some.size:
            block = tally(*store.read_cells(some), store.n_vars)
            counter.add(block.keys, block.numbers)
    return counter.histogram(int(store.max_value))


def rows_with(hist: sparse.csr_array, count: int) -> np.ndarray:
    """How many cells have this count of each gene, (n_vars,) int64; scipy's own selection makes a table as long as the largest count."""
    entries = sparse.csr_array(hist).tocoo()
    here = entries.col == count
    return np.bincount(entries.row[here], entries.data[here], hist.shape[0]).astype(np.int64)


def less_zeros(hist: sparse.csr_array, absent: np.ndarray) -> sparse.csr_array:
    """Return a histogram whose zeros (column 0) are `absent` (n_vars,) fewer: those of cells in which nobody counted the gene."""
    rows = np.flatnonzero(absent)
    taken = sparse.csr_array((absent[rows], (rows, np.zeros(rows.size, np.int64))), shape=hist.shape)
    found = sparse.csr_array(hist - taken, dtype=np.int64)
    found.eliminate_zeros()
    return found


def select_genes(hist: sparse.csr_array, n_top: int) -> np.ndarray:
    """Return the `n_top` most variable genes, as scanpy's `highly_variable_genes(flavor="seurat_v3")` chooses them.

    The standardised variance needs only how often each gene has each count, so no cell is read.

    Parameters
    ----------
    hist : (n_vars, V) from `histogram`; of how many cells is the sum of a row
    n_top : genes wanted; genes seen in fewer than 3 cells are passed over

    Returns
    -------
    genes : (<= n_top,) int64, ascending
    """
    try:
        from skmisc.loess import loess
    except ImportError as error:
        raise UserError("choosing variable genes needs scikit-misc: pip install 'sedd[scanpy]'.") from error
    if n_top < 1:
        raise UserError(f"the number of genes to choose must be positive, not {n_top}.")
    hist = sparse.csr_array(hist)
    n_obs = np.asarray(hist.sum(axis=1)).ravel()
    entries = hist.tocoo()  # entry by entry: a table of all numbers up to the largest count may not fit into memory
    counts = entries.col.astype(np.float64)
    total, squares = (np.bincount(entries.row, counts**power * entries.data, hist.shape[0]) for power in (1, 2))
    mean = total / np.maximum(1, n_obs)
    variance = (squares - total * mean) / np.maximum(1, n_obs - 1)
    seen = n_obs - rows_with(hist, 0)
    usable = np.flatnonzero(seen >= 3)
    varying = usable[variance[usable] > 0]
    if varying.size <= n_top:
        return np.sort(varying).astype(np.int64)
    x, y = np.log10(mean[varying]), np.log10(variance[varying])
    model = loess(x, y, span=0.3, degree=2)
    try:
        model.fit()
    except ValueError as error:  # of few cells, most genes share a handful of means
        raise UserError(
            f"the {n_obs.max()} cells are too few to choose {n_top} variable genes by: the trend of variance against mean cannot be fitted. "
            "Give more cells, --genes all, or a list of genes."
        ) from error
    deviation, n_obs = np.sqrt(10**model.outputs.fitted_values), n_obs[varying]
    limit = deviation * np.sqrt(n_obs) + mean[varying]
    rows = hist[varying].tocoo()
    clipped = np.minimum(rows.col, limit[rows.row]) * rows.data
    clipped_sum = np.bincount(rows.row, clipped, varying.size)
    clipped_squares = np.bincount(rows.row, clipped * np.minimum(rows.col, limit[rows.row]), varying.size)
    score = n_obs * mean[varying] ** 2 + clipped_squares - 2 * clipped_sum * mean[varying]
    score /= (n_obs - 1) * deviation**2
    order = np.argsort(-score, kind="stable")[:n_top]
    return np.sort(varying[order]).astype(np.int64)
