"""CSR rows -> dense token rows in one pass over the non-zeros, masks included, into memory that the caller owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numba
import numpy as np

from sedd.errors import DamagedFileError, UserError
from sedd.kernels.discretize import MAX_TABLE, digit, quantile_edges
from sedd.kernels.mask import BUCKETS, exact_row, mask_row, mask_stream, thresholds
from sedd.kernels.rows import BAD_INDEX, check_row, choose, fetch

_EDGES, _QUANTILE, _VALUE = 0, 1, 2
_NO_MASK, _RANDOM, _EXACT = 0, 1, 2


@numba.njit(cache=True, nogil=True)
def _table_row(genes: Any, counts: Any, columns: Any, member: Any, table: Any, chosen: Any, out: Any) -> float:
    """Scatter `table[count]`; return the sum of the counts inside the panel."""
    out[:] = table[0]
    last = np.uint64(table.shape[0] - 1)
    total = np.int64(0)
    # Unsigned subscripts, which `check_row` has seen to be in range: for signed ones Numba adds a test for counting from the end.
    if columns.shape[0] == 0:
        for i in range(counts.shape[0]):
            total += np.int64(counts[i])
        for i in range(genes.shape[0]):
            out[np.uint64(genes[i])] = table[min(np.uint64(counts[i]), last)]
    else:
        for k in range(choose(genes, member, chosen)):
            at = np.uint64(chosen[k])
            total += np.int64(counts[at])
            out[np.uint64(columns[np.uint64(genes[at])])] = table[min(np.uint64(counts[at]), last)]
    return np.float64(total)


@numba.njit(cache=True, nogil=True)
def _value_row(genes: Any, values: Any, columns: Any, member: Any, zero: Any, chosen: Any, out: Any) -> float:
    """Scatter the values themselves; return their sum inside the panel, added up in the type of `zero`."""
    out[:] = 0
    total = zero
    if columns.shape[0] == 0:
        for i in range(genes.shape[0]):
            total += values[i]
            out[np.uint64(genes[i])] = values[i]
    else:
        for k in range(choose(genes, member, chosen)):
            at = np.uint64(chosen[k])
            total += values[at]
            out[np.uint64(columns[np.uint64(genes[at])])] = values[at]
    return np.float64(total)


@numba.njit(cache=True, nogil=True)
def _real_row(
    genes: Any,
    values: Any,
    columns: Any,
    member: Any,
    mode: Any,
    zero: Any,
    edges: Any,
    scratch: Any,
    chosen: Any,
    out: Any,
) -> float:
    """Scatter the bins of real values, or (`_VALUE`) the values themselves; return their sum inside the panel."""
    if mode == _VALUE:
        return _value_row(genes, values, columns, member, zero, chosen, out)
    own_edges = edges
    if mode == _QUANTILE:
        present = np.empty(genes.shape[0], np.float64)
        count = 0
        for i in range(genes.shape[0]):
            gene = np.int64(genes[i])
            if columns.shape[0] > 0:
                gene = np.int64(columns[gene])
            if gene >= 0 and values[i] > 0:
                present[count] = values[i]
                count += 1
        if count > 0:
            quantile_edges(np.sort(present[:count]), scratch)
        own_edges = scratch
    out[:] = digit(0.0, edges) if mode == _EDGES else 0
    total = 0.0
    for i in range(genes.shape[0]):
        gene = np.int64(genes[i])
        if columns.shape[0] > 0:
            gene = np.int64(columns[gene])
        if gene >= 0:
            total += values[i]
            if values[i] > 0:
                out[gene] = digit(np.float64(values[i]), own_edges)
    return total


@numba.njit(cache=True, nogil=True)
def _transform_row(indices: Any, start: Any, stop: Any, columns: Any, scale: Any, log: Any, out: Any) -> None:
    """Scale the non-zeros of a row and take log(1 + x) of them; zeros stay zeros under both."""
    for i in range(start, stop):
        gene = np.int64(indices[i])
        if columns.shape[0] > 0:
            gene = np.int64(columns[gene])
        if gene >= 0:
            value = np.float64(out[gene]) * scale
            out[gene] = np.log1p(value) if log else value


@numba.njit(cache=True, nogil=True)
def _transformed_rows(
    indices: Any, starts: Any, stops: Any, columns: Any, library: Any, target: Any, log: Any, out: Any
) -> None:
    for row in range(starts.shape[0]):
        scale = target / library[row] if target > 0 and library[row] > 0 else 1.0
        _transform_row(indices, starts[row], stops[row], columns, scale, log, out[row])


@numba.njit(cache=True, nogil=True)
def _mask(mask_mode: Any, stream: Any, cell: Any, limit: Any, out: Any) -> None:
    if mask_mode == _RANDOM:
        mask_row(stream, cell, limit, out)
    elif mask_mode == _EXACT:
        exact_row(stream, cell, np.int64(limit), np.empty(out.shape[0], np.uint32), np.empty(BUCKETS, np.int64), out)


@numba.njit(cache=True, nogil=True)
def _table_rows(
    indices: Any, data: Any, starts: Any, stops: Any, n_store: Any, columns: Any, member: Any, table: Any, out: Any, library: Any,
    mask_mode: Any, stream: Any, cells: Any, limits: Any, masked: Any,
) -> None:  # fmt: skip
    for row in range(starts.shape[0]):
        if row + 1 < starts.shape[0]:
            fetch(indices, starts[row + 1], stops[row + 1])
            fetch(data, starts[row + 1], stops[row + 1])
        genes, counts = indices[starts[row] : stops[row]], data[starts[row] : stops[row]]
        library[row] = check_row(genes, counts, n_store)
        if library[row] == 0:
            chosen = np.empty(genes.shape[0] if columns.shape[0] > 0 else 0, np.uint32)
            library[row] = _table_row(genes, counts, columns, member, table, chosen, out[row])
            if mask_mode != _NO_MASK:
                _mask(mask_mode, stream, cells[row], limits[row], masked[row])


@numba.njit(cache=True, nogil=True)
def _real_rows(
    indices: Any, data: Any, starts: Any, stops: Any, n_store: Any, columns: Any, member: Any, mode: Any, zero: Any, edges: Any,
    out: Any, library: Any, mask_mode: Any, stream: Any, cells: Any, limits: Any, masked: Any,
) -> None:  # fmt: skip
    for row in range(starts.shape[0]):
        if row + 1 < starts.shape[0]:
            fetch(indices, starts[row + 1], stops[row + 1])
            fetch(data, starts[row + 1], stops[row + 1])
        genes, values = indices[starts[row] : stops[row]], data[starts[row] : stops[row]]
        library[row] = check_row(genes, values, n_store)
        if library[row] == 0:
            chosen = np.empty(genes.shape[0] if columns.shape[0] > 0 else 0, np.uint32)
            scratch = np.empty(edges.shape[0], np.float64)
            library[row] = _real_row(genes, values, columns, member, mode, zero, edges, scratch, chosen, out[row])
            if mask_mode != _NO_MASK:
                _mask(mask_mode, stream, cells[row], limits[row], masked[row])


@dataclass(frozen=True)
class MaskRule:
    """Which genes a batch hides.

    Attributes
    ----------
    seed, epoch : int
    count : int or None
        Hide exactly this many genes of each cell; None hides each gene with the probability given per cell.
    """

    seed: int
    epoch: int
    count: int | None = None


def panel_columns(n_store: int, genes: np.ndarray | None) -> np.ndarray:
    """Column of each gene of the store in the panel.

    Parameters
    ----------
    n_store : int
        Genes in the store.
    genes : (n_panel,) int64 or None
        The panel's genes, as columns of the store, in the panel's order; None for all of them as they are.

    Returns
    -------
    columns : (n_store,) int32, -1 for genes outside the panel; of length 0 when the panel is the store
    """
    if genes is None:
        return np.empty(0, np.int32)
    genes = np.asarray(genes, dtype=np.int64)
    if genes.size == 0:
        raise UserError("the gene panel is empty; name at least one gene")
    if genes.min() < 0 or genes.max() >= n_store or np.unique(genes).size != genes.size:
        raise UserError(f"the gene panel must name distinct columns from 0 to {n_store - 1} of the store")
    if genes.size == n_store and bool(np.all(genes == np.arange(n_store))):
        return np.empty(0, np.int32)
    columns = np.full(n_store, -1, np.int32)
    columns[genes] = np.arange(genes.size, dtype=np.int32)
    return columns


class Bins(Protocol):
    """What filling rows needs to know of a `sedd.binning.Binning`; its attributes of these names."""

    @property
    def kind(self) -> str: ...  # noqa: D102

    @property
    def n_bins(self) -> int: ...  # noqa: D102

    @property
    def edges(self) -> np.ndarray | None: ...  # noqa: D102

    def dtype_of(self, max_count: int) -> np.dtype: ...  # noqa: D102

    def table(self, max_count: int) -> np.ndarray: ...  # noqa: D102


class RowFiller:
    """Fill dense rows from CSR rows: one binning, one panel, any number of calls and threads.

    Parameters
    ----------
    n_store : int
        Genes in the store; every index must be below it.
    genes : (n_panel,) int64 or None
        Panel; see `panel_columns`.
    binning : Binning or None
        None writes the values themselves as float32.
    max_count : int
        Largest value in the store: the length of the lookup table. Unused for real values.
    target_sum : float
        Without a binning: scale each row to this sum over the panel; 0 leaves rows as they are.
    log1p : bool
        Without a binning: take log(1 + x), after scaling.
    """

    def __init__(
        self,
        n_store: int,
        *,
        genes: np.ndarray | None,
        binning: Bins | None,
        max_count: int = 0,
        target_sum: float = 0.0,
        log1p: bool = False,
    ) -> None:
        if binning is not None and (target_sum or log1p):
            raise UserError("counts that become tokens are not normalised; ask for dtype='float32' to normalise them")
        self.n_store = n_store
        self.columns = panel_columns(n_store, genes)
        self.member = (self.columns >= 0).astype(np.uint8)
        self.n_panel = n_store if genes is None else len(genes)
        self.binning = binning
        self.target_sum, self.log1p = float(target_sum), bool(log1p)
        self.dtype = np.dtype(np.float32) if binning is None else binning.dtype_of(max_count)
        self._table = np.empty(0, self.dtype)
        self._edges = np.empty(0)
        if binning is None or self.dtype == np.int32:
            self._mode = _VALUE
        elif binning.kind == "quantile":
            self._mode = _QUANTILE
            self._edges = np.zeros(binning.n_bins - 1)
        else:
            self._mode = _EDGES
            if binning.edges is None or max_count < MAX_TABLE:
                self._table = binning.table(max_count)
            if binning.edges is not None:
                self._edges = binning.edges

    def fill(
        self,
        indices: np.ndarray,
        data: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        out: np.ndarray,
        *,
        library: np.ndarray | None = None,
        mask: MaskRule | None = None,
        cells: np.ndarray | None = None,
        probability: np.ndarray | None = None,
        masked: np.ndarray | None = None,
    ) -> np.ndarray:
        """Write rows; row `i` has the non-zeros `starts[i] .. stops[i] - 1` of `indices` and `data`.

        Parameters
        ----------
        indices : (nnz,) integers, columns of the store
        data : (nnz,) counts or real values, >= 0
        starts, stops : (B,) int64
        out : (B, n_panel), `dtype`; overwritten
        library : (B,) float64, optional
            Overwritten with the sums of each row over the panel.
        mask : MaskRule, optional
            Needs `cells` (B,) int64 and `masked` (B, n_panel) bool, and `probability` (B,) unless its count is set.

        Returns
        -------
        library : (B,) float64

        Raises
        ------
        ValueError
            If an index is outside the store, a value is negative or NaN, or the arrays do not fit together.
        """
        n_rows = starts.shape[0]
        if out.shape != (n_rows, self.n_panel) or out.dtype != self.dtype:
            raise UserError(f"out is {out.dtype} {out.shape}; expected {self.dtype} {(n_rows, self.n_panel)}")
        if indices.shape != data.shape or stops.shape != starts.shape:
            raise UserError(f"{indices.size} indices, {data.size} values, {n_rows} starts, {stops.size} stops disagree")
        if n_rows and not (int(starts.min()) >= 0 and int(stops.max()) <= data.size):
            raise UserError(f"rows reach from {starts.min()} to {stops.max()} in an array of {data.size} values")
        if library is None:
            library = np.empty(n_rows)
        mode, stream, limits = _NO_MASK, np.uint64(0), np.empty(0, np.uint64)
        if mask is not None:
            if cells is None or masked is None or masked.shape != out.shape or masked.dtype != np.bool_:
                raise UserError(f"a mask needs the cells' numbers and bool memory of shape {out.shape} to write to")
            stream = np.uint64(mask_stream(mask.seed, mask.epoch))
            if mask.count is not None:
                mode, limits = _EXACT, np.full(n_rows, mask.count, np.uint64)
            elif probability is not None:
                mode, limits = _RANDOM, thresholds(probability)
            else:
                raise UserError("a random mask needs the probability of hiding a gene, one per cell")
        tail = (
            out,
            library,
            mode,
            stream,
            np.empty(0, np.int64) if cells is None else cells,
            limits,
            np.empty((0, 0), np.bool_) if masked is None else masked,
        )
        if self._table.size and data.dtype.kind in "ui":
            _table_rows(indices, data, starts, stops, self.n_store, self.columns, self.member, self._table, *tail)
        else:
            if self.binning is not None and self.binning.kind in ("counts", "identity") and data.dtype.kind == "f":
                raise UserError(f"binning '{self.binning.kind}' is for counts; bin real values with linear, log or quantile")
            # Whole numbers are added as such: a processor waits for each sum of floating-point numbers before the next.
            zero = np.float64(0) if data.dtype.kind == "f" else np.int64(0)
            head = (indices, data, starts, stops, self.n_store, self.columns, self.member)
            _real_rows(*head, self._mode, zero, self._edges, *tail)
        if n_rows and float(library.min()) < 0:
            row = int(np.argmin(library))
            at = f"row {row}" if cells is None else f"cell {cells[row]}"
            if library[row] == BAD_INDEX:
                raise DamagedFileError(f"{at}: a gene index is outside the store's {self.n_store} genes; the store is damaged")
            raise UserError(f"{at}: a value is negative or NaN; expected counts >= 0")
        if self.target_sum > 0 or self.log1p:
            _transformed_rows(indices, starts, stops, self.columns, library, self.target_sum, self.log1p, out)
        return library
