"""Threads that keep batches ready: windows of cells are read ahead, batches are filled from them, in order.

Two pools, because they wait for different things: readers fetch and decode windows, here or on a Dask cluster; makers fill batches
from windows that are there. Both release the GIL while they work. The consumer only ever waits for the next batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from sedd.errors import UserError
from sedd.io.loading.buffers import Slabs, pinned_block
from sedd.io.loading.rows import RowReader, Rows, WholeStore, read_rows_elsewhere
from sedd.io.loading.threads import Task, Threads
from sedd.io.plan import CellList, EpochOrder, RankSteps, Split, noise_times, weighted_ranks
from sedd.kernels.gather import gather_rows, row_pointers
from sedd.kernels.tokens import MaskRule, RowFiller

EPSILON = 1e-3  # of the default noise: the mask probability at time t is (1 - EPSILON) t
_GROUP_ROWS = 4096  # small batches are filled several at a time: a task costs about as much as 20 cells
_FIRST_GROUP_ROWS = 128  # so that the first batch of an epoch is there soon
_GROUP_BYTES = 12 << 20  # where six groups take more than 60 MB, they are filled as slowly as memory takes them
_FIRST_RUN, _RUN = 1024, 8192  # cells read at a time where nothing is read twice; the first few are small, to be quick
_MIN_RUN = 4096  # windows of a rank of many are small: several are read by one task


@dataclass(frozen=True)
class Recipe:
    """What becomes of the cells that were read.

    Attributes
    ----------
    filler : RowFiller
    codes : dict of (n_obs,) int64
        Label codes of all cells of the store.
    mask : {"score_entropy", "masked"} or None
    count : int
        Genes that `masked` hides.
    noise : callable or None
        Mask probability at time t.
    seed : int
    cumulative : (n_cells,) float64 or None
        Running sum of the sampling weights.
    pinned : bool
    """

    filler: RowFiller
    codes: dict[str, np.ndarray]
    mask: str | None
    count: int
    noise: Callable[[Any], Any] | None
    seed: int
    cumulative: np.ndarray | None
    pinned: bool

    def probability(self, t: np.ndarray) -> np.ndarray:
        """Mask probability at the times (B,) float32: taken from the rounded times that the batch carries."""
        exact = t.astype(np.float64)
        if self.noise is None:
            return (1 - EPSILON) * exact
        return np.asarray(self.noise(torch.from_numpy(exact)), dtype=np.float64)


@dataclass(frozen=True)
class _Run:
    """Cells `low .. high - 1` of this rank, being read."""

    low: int
    high: int
    result: Task[tuple[np.ndarray, Rows]]


class Pipeline:
    """Runs epochs of one loader.

    Parameters
    ----------
    recipe : Recipe
    reader : RowReader
    cells : Split or CellList
    threads : int
    memory_budget : int
        Bytes.
    client : dask.distributed.Client or None
    """

    def __init__(
        self,
        recipe: Recipe,
        reader: RowReader,
        cells: Split | CellList,
        *,
        threads: int,
        memory_budget: int,
        client: Any = None,
    ) -> None:
        self.recipe, self.reader, self.cells, self.client = recipe, reader, cells, client
        self.threads, self.memory_budget = threads, memory_budget
        self._slabs = Slabs(keep=4 * threads + 4)
        self._readers = Threads(threads, "sedd-read")
        self._helpers = Threads(max(1, threads - 1), "sedd-read-part")  # of reads that are shared, where there are fewer than threads
        self._makers = Threads(threads, "sedd-make")
        self._cell_list: np.ndarray | None = None

    def close(self) -> None:
        """Stop the threads; what is running is waited for, what is queued is dropped."""
        self._makers.close()
        self._readers.close()
        self._helpers.close()

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def _cell_bytes(self) -> float:
        """Bytes in memory of an average cell that was read."""
        store = self.reader.store
        return max(store.nnz / max(store.n_obs, 1) * self.reader.value_bytes, 1.0)

    def _at_a_time(self, steps: RankSteps, window: int) -> int:
        """Return how many reads are under way: one a thread, or fewer where windows would else be cut, as each cut reads every block again."""
        whole = self.memory_budget * 0.5 / (1.25 * self._cell_bytes) / max(window // steps.world_size, 1)
        fewer = int(whole) - 2
        return fewer if window > 1 and self.client is None and 1 <= fewer < self.threads else self.threads

    def _run_cells(self, steps: RankSteps, window: int) -> int:
        """Cells that one read may bring into memory."""
        per_cell = self._cell_bytes
        if isinstance(self.reader, WholeStore):
            return _RUN
        # A block of 64 cells brings about one chunk more than it needs; readers + 2 runs are in memory at a time.
        most = int(self.memory_budget * 0.5 / (self._at_a_time(steps, window) + 2) / (1.25 * per_cell))
        if most < 1 or self._batch_bytes(steps) * 2 > self.memory_budget // 2:
            need = int(max(2 * (self.threads + 2) * 1.25 * per_cell, self._batch_bytes(steps) * 4)) >> 20
            raise UserError(
                f"memory_budget of {self.memory_budget >> 20} MiB is too small for batches of {steps.batch_size} cells; "
                f"expected {need + 1} MiB or more: raise memory_budget or lower batch_size or threads"
            )
        return most

    def _batch_bytes(self, steps: RankSteps, form: str = "dense") -> int:
        if form == "csr":  # of an average batch, of all genes: indices and values have four bytes each
            return 8 * steps.batch_size * self.reader.store.nnz // max(self.reader.store.n_obs, 1)
        per_gene = self.recipe.filler.dtype.itemsize + (self.recipe.mask is not None)
        return steps.batch_size * self.recipe.filler.n_panel * per_gene

    def _cuts(self, steps: RankSteps, order: EpochOrder) -> Iterator[tuple[int, int]]:
        """Cut this rank's cells into reads, at the ends of the order's windows where they fit into memory."""
        most = self._run_cells(steps, order.window)
        low, size = 0, _FIRST_RUN
        while low < steps.n_mine:
            if order.window > 1:
                high = _window_end(steps, order.window, low)
                while high - low < _MIN_RUN and high < steps.n_mine:
                    high = _window_end(steps, order.window, high)
            else:
                high, size = low + size, min(2 * size, max(_RUN, most if order.mode == "full" else _RUN))
            high = min(high, low + most, steps.n_mine)
            yield low, high
            low = high

    # -- the two kinds of work -----------------------------------------------------------------------------------

    def _cells_at(self, order: EpochOrder, positions: np.ndarray) -> np.ndarray:
        positions = positions % order.n_cells  # padding starts again at the beginning
        if self.recipe.cumulative is not None:
            ranks = weighted_ranks(self.recipe.seed, order.epoch, positions, self.recipe.cumulative)
        else:
            ranks = order.ranks(positions)
        if order.mode == "full":  # single cells all over the split: list it once; it fits, as the store does
            if self._cell_list is None:
                self._cell_list = self.cells.cells()
            return self._cell_list[ranks]
        by_rank = np.argsort(ranks)
        cells = np.empty_like(ranks)
        cells[by_rank] = self.cells.cells(ranks[by_rank])
        return cells

    def _shared(self, calls: list[Callable[[], None]]) -> None:
        """Make the calls of one read, on several threads; none is under way when this returns or raises."""
        others = [self._helpers.submit(call) for call in calls[1:]]
        try:
            calls[0]()
        finally:
            for other in others:
                other.wait()
        for other in others:
            other.result()

    def _start_read(self, steps: RankSteps, order: EpochOrder, low: int, high: int) -> _Run:
        parts = -(-self.threads // self._at_a_time(steps, order.window))

        def read() -> tuple[np.ndarray, Rows]:
            cells = self._cells_at(order, steps.positions(low, high))
            return cells, self.reader.read(cells, self._shared, parts)

        def read_elsewhere() -> tuple[np.ndarray, Rows]:
            cells = self._cells_at(order, steps.positions(low, high))
            task = self.client.submit(read_rows_elsewhere, self.reader.store.path, cells, pure=False)
            return cells, Rows(*task.result())

        return _Run(low, high, self._readers.submit(read if self.client is None else read_elsewhere))

    def _make_dense(
        self, steps: RankSteps, order: EpochOrder, low: int, high: int, runs: list[_Run]
    ) -> list[dict[str, Any]]:
        """Fill the batches of the cells `low .. high - 1`."""
        recipe, n_rows = self.recipe, high - low
        positions = steps.positions(low, high)
        block, whole = self._room_for(n_rows, padded=steps.pad)
        t = noise_times(recipe.seed, order.epoch, positions % order.n_cells).astype(np.float32)
        whole["t"][:] = torch.from_numpy(t)
        tokens, cell = whole["tokens"].numpy(), whole["cell"].numpy()
        masked = None if recipe.mask is None else whole["masked"].numpy()
        probability = recipe.probability(t) if recipe.mask == "score_entropy" else np.empty(0)
        rule = MaskRule(recipe.seed, order.epoch, None if recipe.mask == "score_entropy" else recipe.count)
        library = np.empty(n_rows)
        for run in runs:
            run_cells, rows = run.result.result()
            start, stop = max(low, run.low), min(high, run.high)
            here, there = slice(start - low, stop - low), slice(start - run.low, stop - run.low)
            cell[here] = run_cells[there]
            recipe.filler.fill(
                rows.indices,
                rows.data,
                rows.starts[there],
                rows.stops[there],
                tokens[here],
                library=library[here],
                mask=None if recipe.mask is None else rule,
                cells=cell[here],
                probability=probability[here],
                masked=None if masked is None else masked[here],
            )
        whole["library"][:] = torch.from_numpy(library)
        if steps.pad:
            whole["valid"][:] = torch.from_numpy(positions < steps.n_positions)
        for name, codes in recipe.codes.items():
            whole[f"label {name}"][:] = torch.from_numpy(codes[cell])
        batches = []
        for first in range(0, n_rows, steps.batch_size):
            part = slice(first, first + steps.batch_size)
            fields: dict[str, Any] = {k: whole[k][part] if k in whole else None for k in ("tokens", "masked", "t", "cell", "library", "valid")}
            fields["labels"] = {name: whole[f"label {name}"][part] for name in recipe.codes}
            batches.append({**fields, "block": block})
        return batches

    def _room_for(self, n_rows: int, *, padded: bool) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Return memory for so many cells, by name; if it is page-locked also the block that all of it lies in."""
        recipe, shape = self.recipe, (n_rows, self.recipe.filler.n_panel)
        fields: dict[str, tuple[tuple[int, ...], Any]] = {"tokens": (shape, recipe.filler.dtype)}
        if recipe.mask is not None:
            fields["masked"] = shape, np.bool_
        fields |= {"t": ((n_rows,), np.float32), "cell": ((n_rows,), np.int64), "library": ((n_rows,), np.float32)}
        fields |= {f"label {name}": ((n_rows,), np.int64) for name in recipe.codes} | ({"valid": ((n_rows,), np.bool_)} if padded else {})
        if recipe.pinned:
            return pinned_block(fields)
        take = {name: self._slabs.take if len(shape) > 1 else np.empty for name, (shape, _) in fields.items()}
        return None, {name: torch.from_numpy(take[name](shape, np.dtype(dtype))) for name, (shape, dtype) in fields.items()}

    def _make_csr(
        self, steps: RankSteps, order: EpochOrder, low: int, high: int, runs: list[_Run]
    ) -> list[dict[str, Any]]:
        """Gather the batches of the cells `low .. high - 1` as CSR matrices: views of one block."""
        cell, pieces = np.empty(high - low, np.int64), []
        for run in runs:
            run_cells, rows = run.result.result()
            start, stop = max(low, run.low), min(high, run.high)
            there = slice(start - run.low, stop - run.low)
            cell[start - low : stop - low] = run_cells[there]
            pieces.append(Rows(rows.indices, rows.data, rows.starts[there], rows.stops[there]))
        indptr, indices, data = self._gather(pieces)
        labels = {name: of[cell] for name, of in self.recipe.codes.items()}
        batches = []
        for first in range(0, high - low, steps.batch_size):
            part = slice(first, min(first + steps.batch_size, high - low))
            x = _csr(indptr[part.start : part.stop + 1], indices, data, self.recipe.filler.n_panel)
            batches.append({"x": x, "cell": cell[part], "labels": {name: codes[part] for name, codes in labels.items()}})
        return batches

    def _gather(self, pieces: list[Rows]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copy the rows of all pieces into one block: row pointers, indices, values."""
        filler = self.recipe.filler
        pointers = [
            row_pointers(piece.indices, piece.starts, piece.stops, n_store=filler.n_store, columns=filler.columns)
            for piece in pieces
        ]
        ends = np.cumsum([0, *(int(own[-1]) for own in pointers)])
        indices = self._slabs.take((int(ends[-1]),), np.dtype(np.int32))
        data = self._slabs.take((int(ends[-1]),), np.dtype(np.float32))
        for k, piece in enumerate(pieces):
            gather_rows(
                piece.indices,
                piece.data,
                piece.starts,
                piece.stops,
                columns=filler.columns,
                indptr=pointers[k],
                out_indices=indices[ends[k] : ends[k + 1]],
                out_data=data[ends[k] : ends[k + 1]],
                target_sum=filler.target_sum,
                log1p=filler.log1p,
            )
        return np.concatenate([[0], *(own[1:] + ends[k] for k, own in enumerate(pointers))]), indices, data

    # -- an epoch ------------------------------------------------------------------------------------------------

    def run(self, steps: RankSteps, order: EpochOrder, form: str) -> Generator[dict[str, Any], None, None]:
        """Yield the fields of each batch, `dense` or `csr`, from the first position of `steps` to the end of the epoch.

        Leaving the iterator drops what is queued. An exception in a thread is raised here.
        """
        batch_bytes = max(self._batch_bytes(steps, form), 1)
        room = self.memory_budget // 4
        group_bytes = min(_GROUP_BYTES, room // (self.threads + 2))
        per_group = max(1, min(_GROUP_ROWS // steps.batch_size, group_bytes // batch_bytes))
        if self.recipe.pinned and form == "dense":  # each batch is a block of memory, which is copied as a whole
            per_group = 1
        group = per_group * steps.batch_size
        size = min(group, max(1, _FIRST_GROUP_ROWS // steps.batch_size) * steps.batch_size)  # doubled until it is a whole group's
        groups_ahead = min(self.threads + 2, max(2, room // (batch_bytes * per_group)))
        cuts, readers = self._cuts(steps, order), self._at_a_time(steps, order.window)
        runs: deque[_Run] = deque()
        pending: deque[Task[list[dict[str, Any]]]] = deque()
        asked, read_to = 0, 0
        make = self._make_dense if form == "dense" else self._make_csr

        def read_more() -> bool:
            nonlocal read_to
            cut = next(cuts, None)
            if cut is None:
                return False
            runs.append(self._start_read(steps, order, *cut))
            read_to = cut[1]
            return True

        try:
            while True:
                while asked < steps.n_mine and len(pending) < groups_ahead:
                    stop, size = min(asked + min(size, group), steps.n_mine), 2 * size
                    while read_to < stop:
                        read_more()
                    needed = [run for run in runs if run.low < stop and run.high > asked]
                    pending.append(self._makers.submit(make, steps, order, asked, stop, needed))
                    asked = stop
                    while runs and runs[0].high <= asked:
                        runs.popleft()
                    while len(runs) <= readers and read_more():
                        pass
                if not pending:
                    return
                yield from pending.popleft().result()
        finally:
            for task in pending:
                task.cancel()
            for run in runs:
                run.result.cancel()


def _csr(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_vars: int) -> sp.csr_matrix:
    """Return some rows of a block as a matrix of their own, without a copy.

    The rows come from `gather_rows` and are right; scipy would look through them again, which takes as long as gathering 64
    of them. It copies all indices on each slice when the two index types differ.
    """
    x = sp.csr_matrix((indptr.size - 1, n_vars), dtype=np.float32)
    x.indptr = (indptr - indptr[0]).astype(np.int32)
    x.indices, x.data = indices[indptr[0] : indptr[-1]], data[indptr[0] : indptr[-1]]
    return x


def _window_end(steps: RankSteps, window: int, low: int) -> int:
    """First of this rank's cells, after `low`, that lies in a window after that of cell `low`."""
    (position,) = steps.positions(low, low + 1)
    return steps.before((int(position) // window + 1) * window)
