"""Make the shards of X, each in one task: read its entries, check and count them, encode them.

Both arrays of a shard, `data` and `indices`, are made together. They wait in `OUTPUT.zarr.partial/shards` until all are there, because
only then is it known how wide the counts must be; what was counted on the way lies beside them, in an `.npz` that is written last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sedd.io.conversion.counts import index_dtype
from sedd.io.conversion.inputs import Plan, check_indices, load_plan, open_source, row_of, take_values
from sedd.io.conversion.runner import check_stopped
from sedd.io.conversion.spill import first_entries, gather_part, value_dtype
from sedd.io.files import begin_to_sync, new_file, save_arrays
from sedd.io.format.shards import CHUNK, Encoder, Pen, read_shard, shard_length
from sedd.io.format.tally import Tallier


class UntidyError(Exception):
    """CSR input with stored zeros, or indices unsorted or repeated: its entries must be cleaned before they are placed."""


class _TooNarrowError(Exception):
    """A count does not fit the type that the shard was begun with."""


class Run(NamedTuple):
    """Consecutive entries of the store, in its types.

    Attributes
    ----------
    row : number of the first cell of `bounds`
    bounds : (n + 1,) where the entries of each cell from there on begin and end
    at : place of the first entry, counted as in `bounds`
    indices, values : of the entries
    rounded : values that were not quite integers
    """

    row: int
    bounds: np.ndarray
    at: int
    indices: np.ndarray
    values: np.ndarray
    rounded: int


def n_entries(folder: str, plan: Plan) -> int:
    """Entries of the store; those of a spill are known when all of it is written."""
    return plan.entries[-1] if plan.direct else int(first_entries(folder)[-1])


def result_path(folder: str, number: int) -> str:
    """Return the file that says that shard `number` is made, and what was counted."""
    return f"{folder}/shards/{number:06d}.npz"


def array_path(folder: str, number: int, name: str, dtype: np.dtype[Any]) -> str:
    """Where shard `number` of `X/name` is.

    The type is in the name: a shard that is made twice, or widened, may change its type, and the `.npz` says which one counts.
    """
    return f"{folder}/shards/{number:06d}.{name}.{dtype.name}"


def make_shard(folder: str, number: int) -> None:
    """Make shard `number`; a task.

    Raises
    ------
    UntidyError
        If the input must go through the spill.
    UserError
        At the first value or index that is not right.
    """
    plan = load_plan(folder)
    source = _Input(folder, plan, number) if plan.direct else _Spill(folder, plan, number)
    while True:
        try:
            return _make(folder, plan, number, source, _value_dtype(folder, plan))
        except _TooNarrowError:  # it has left a mark, so that this and all later shards begin wider
            continue


def _value_dtype(folder: str, plan: Plan) -> np.dtype[Any]:
    """Return the type to begin a shard with."""
    if not plan.direct or plan.settings["values"] == "real":
        return value_dtype(folder, plan) if not plan.direct else np.dtype(np.float32)
    for kind in (np.uint32, np.uint16):
        if os.path.exists(_wide_path(folder, np.dtype(kind))):
            return np.dtype(kind)
    return np.dtype(plan.narrow)


def _wide_path(folder: str, dtype: np.dtype[Any]) -> str:
    return f"{folder}/shards/{dtype.name}"


def _make(folder: str, plan: Plan, number: int, source: _Input | _Spill, dtype: np.dtype[Any]) -> None:
    n = n_entries(folder, plan)
    row, n_rows = source.rows()
    counter = Tallier(n_rows, plan.n_vars, real=dtype.kind == "f")
    counter.follow(source.index_before())
    rounded = size = 0
    with ExitStack() as stack:
        pens = []
        for name, kind in (("data", dtype), ("indices", index_dtype(plan.n_vars))):
            file = stack.enter_context(new_file(array_path(folder, number, name, kind)))
            pens.append(Pen(file, Encoder(name, kind, plan.settings["codec"]), shard_length(n) // CHUNK))
        for run in source.runs(dtype):
            check_stopped()
            if run.values.dtype != dtype:
                Path(_wide_path(folder, run.values.dtype)).touch()
                raise _TooNarrowError
            if not counter.add(run.bounds, run.at, run.indices, run.values, first=run.row - row):
                raise UntidyError
            for pen, array in zip(pens, (run.values, run.indices), strict=True):
                pen.write(array)
            rounded, size = rounded + run.rounded, size + run.values.size
        for pen in pens:
            pen.finish()
            begin_to_sync(pen.file)
    save_arrays(result_path(folder, number), row=row, n=size, dtype=dtype.name, rounded=rounded, **counter.result()._asdict())


class _Entries:
    """Where the entries of a shard come from."""

    def __init__(self, folder: str, plan: Plan, number: int) -> None:
        self.folder, self.plan = folder, plan
        n = n_entries(folder, plan)
        self.begin, self.end = number * shard_length(n), min(n, (number + 1) * shard_length(n))


class _Input(_Entries):
    """Straight from tidy CSR input."""

    def __init__(self, folder: str, plan: Plan, number: int) -> None:
        super().__init__(folder, plan, number)
        self.stretches = []
        for source, base in enumerate(plan.entries[:-1]):
            lo, hi = max(self.begin, base) - base, min(self.end, plan.entries[source + 1]) - base
            if lo < hi:
                indptr = open_source(folder, plan, source).matrix.indptr
                first, last = row_of(indptr, lo), int(np.searchsorted(indptr, hi))
                self.stretches.append((source, lo, hi, first, last))

    def rows(self) -> tuple[int, int]:
        """Return the number of the first cell, and how many there are."""
        (source, _, _, first, _), (until, _, _, _, last) = self.stretches[0], self.stretches[-1]
        begin = self.plan.offsets[source] + first
        return begin, self.plan.offsets[until] + last - begin

    def index_before(self) -> int:
        """Index of the entry before the first, -1 if that begins a cell."""
        source, lo, _, first, _ = self.stretches[0]
        matrix = open_source(self.folder, self.plan, source).matrix
        return int(matrix.indices.read(lo - 1, lo)[0]) if lo > matrix.indptr[first] else -1

    def runs(self, dtype: np.dtype[Any]) -> Iterator[Run]:
        """Return the entries; counts as `dtype`, or wider where they need it."""
        for source, lo, hi, first, last in self.stretches:
            src = open_source(self.folder, self.plan, source)
            indptr, row = src.matrix.indptr, self.plan.offsets[source] + first
            for at, raw_indices, raw in src.matrix.entries(lo, hi, self.plan.block):
                indices = check_indices(src, raw_indices, 0, indptr, at)
                place = partial(_place, indptr, indices, at)
                counts = take_values(self.plan, src, raw, dtype, place)
                if counts.n_zero:
                    raise UntidyError
                yield Run(row, indptr[first : last + 1], at, indices, counts.values, counts.n_rounded)


def _place(indptr: np.ndarray, indices: np.ndarray, at: int, k: int) -> tuple[int, int]:
    """Cell and gene of the `k`-th of the entries from `at` on."""
    return row_of(indptr, at + k), int(indices[k])


class _Spill(_Entries):
    """From the spill; its methods are those of `_Input`."""

    def __init__(self, folder: str, plan: Plan, number: int) -> None:
        super().__init__(folder, plan, number)
        self.first = first_entries(folder)
        self.parts = range(
            int(np.searchsorted(self.first[1:], self.begin, side="right")), int(np.searchsorted(self.first[:-1], self.end))
        )

    def rows(self) -> tuple[int, int]:
        begin = self.parts.start * self.plan.step
        return begin, min(self.parts.stop * self.plan.step, self.plan.n_obs) - begin

    def index_before(self) -> int:
        return -1  # the spill is in order

    def runs(self, dtype: np.dtype[Any]) -> Iterator[Run]:
        for part in self.parts:
            indptr, indices, values = gather_part(self.folder, self.plan, part, dtype)
            at = int(self.first[part])
            own = slice(max(self.begin - at, 0), min(self.end - at, values.size))
            if own.start < own.stop:
                yield Run(part * self.plan.step, indptr, own.start, indices[own], values[own], 0)


def widen_shard(folder: str, number: int, dtype: str) -> None:
    """Encode the values of a shard again in a wider type, which another shard turned out to need; a task."""
    plan = load_plan(folder)
    n, wide = n_entries(folder, plan), np.dtype(dtype)
    with np.load(result_path(folder, number)) as result:
        arrays = dict(result)
    was = np.dtype(str(arrays["dtype"]))
    slots = shard_length(n) // CHUNK
    encoder = Encoder("data", wide, plan.settings["codec"])
    with new_file(array_path(folder, number, "data", wide)) as file:
        pen = Pen(file, encoder, slots)
        source = array_path(folder, number, "data", was)
        for values in read_shard(source, Encoder("data", was, plan.settings["codec"]), slots, int(arrays["n"])):
            check_stopped()
            pen.write(values.astype(wide))
        pen.finish()
        begin_to_sync(file)
    # The old file stays: until the new .npz is there, it is the old file that counts.
    save_arrays(result_path(folder, number), **{**arrays, "dtype": wide.name})
