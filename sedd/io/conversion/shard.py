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
from sedd.io.conversion.runner import check_abandoned
from sedd.io.conversion.spill import first_entries, gather_part, value_dtype
from sedd.io.files import begin_to_sync, new_file, save_arrays
from sedd.io.format.shards import CHUNK, Encoder, Pen, read_shard, shard_length
from sedd.io.format.tally import Tallier


class UntidyError(Exception):
    """CSR input with stored zeros, or indices unsorted or repeated: its entries must be cleaned before they are placed."""


class _TooNarrowError(Exception):
    """A count does not fit the type that was tried for the shard."""


class Stretch(NamedTuple):
    """Consecutive entries of the store, in its types.

    Attributes
    ----------
    row : number of the first cell of `bounds`
    bounds : (n + 1,) where the entries of each cell from there on start and end
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


def n_entries(plan: Plan) -> int:
    """Entries of the store; those of a spill are known when all of it is written."""
    return plan.entries[-1] if plan.direct else int(first_entries(plan)[-1])


def result_path(plan: Plan, number: int) -> str:
    """Return the file that says that shard `number` is made, and what was counted."""
    return f"{plan.folder}/shards/{plan.id}-{number:06d}.npz"


def array_path(plan: Plan, number: int, name: str, dtype: np.dtype[Any]) -> str:
    """Where shard `number` of `X/name` is.

    The type is in the name: a shard that is made twice, or widened, may change its type, and the `.npz` says which one counts.
    """
    return f"{plan.folder}/shards/{plan.id}-{number:06d}.{name}.{dtype.name}"


def make_shard(folder: str, number: int) -> None:
    """Make shard `number`; a task.

    Raises
    ------
    UntidyError
        If the input must be spilled.
    UserError
        At the first value or index that is not right.
    """
    plan = load_plan(folder)
    entries = _FromInput(plan, number) if plan.direct else _FromSpill(plan, number)
    while True:
        try:
            return _make(plan, number, entries, _value_dtype(plan))
        except _TooNarrowError:  # it has left a mark, so that a wider type is tried for this and all later shards
            continue


def _value_dtype(plan: Plan) -> np.dtype[Any]:
    """Return the type to try first for a shard."""
    if not plan.direct:
        return value_dtype(plan)
    if plan.settings["values"] == "real":
        return np.dtype(np.float32)
    for kind in (np.uint32, np.uint16):
        if os.path.exists(_wide_path(plan, np.dtype(kind))):
            return np.dtype(kind)
    return np.dtype(plan.narrow)


def _wide_path(plan: Plan, dtype: np.dtype[Any]) -> str:
    return f"{plan.folder}/shards/{plan.id}-{dtype.name}"


def _make(plan: Plan, number: int, entries: _FromInput | _FromSpill, dtype: np.dtype[Any]) -> None:
    row, n_rows = entries.rows()
    counter = Tallier(n_rows, plan.n_vars, real=dtype.kind == "f")
    counter.follow(entries.index_before())
    rounded = size = 0
    with ExitStack() as stack:
        pens = []
        for name, kind in (("data", dtype), ("indices", index_dtype(plan.n_vars))):
            file = stack.enter_context(new_file(array_path(plan, number, name, kind)))
            pens.append(Pen(file, Encoder(name, kind, plan.settings["codec"]), shard_length(n_entries(plan)) // CHUNK))
        for own in entries.stretches(dtype):
            check_abandoned()
            if own.values.dtype != dtype:
                Path(_wide_path(plan, own.values.dtype)).touch()
                raise _TooNarrowError
            if not counter.add(own.bounds, own.at, own.indices, own.values, first=own.row - row):
                raise UntidyError
            for pen, array in zip(pens, (own.values, own.indices), strict=True):
                pen.write(array)
            rounded, size = rounded + own.rounded, size + own.values.size
        for pen in pens:
            pen.finish()
            begin_to_sync(pen.file)
    save_arrays(result_path(plan, number), row=row, n=size, dtype=dtype.name, rounded=rounded, **counter.result()._asdict())


class _Entries:
    """The entries of a shard, wherever they come from."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan = plan
        n = n_entries(plan)
        self.begin, self.end = number * shard_length(n), min(n, (number + 1) * shard_length(n))


class _FromInput(_Entries):
    """Straight from tidy CSR input."""

    def __init__(self, plan: Plan, number: int) -> None:
        super().__init__(plan, number)
        self.taken = []
        for source, base in enumerate(plan.entries[:-1]):
            lo, hi = max(self.begin, base) - base, min(self.end, plan.entries[source + 1]) - base
            if lo < hi:
                indptr = open_source(plan, source).matrix.indptr
                first, last = row_of(indptr, lo), int(np.searchsorted(indptr, hi))
                self.taken.append((source, lo, hi, first, last))

    def rows(self) -> tuple[int, int]:
        """Return the number of the first cell, and how many there are."""
        (source, _, _, first, _), (until, _, _, _, last) = self.taken[0], self.taken[-1]
        begin = self.plan.offsets[source] + first
        return begin, self.plan.offsets[until] + last - begin

    def index_before(self) -> int:
        """Index of the entry before the first, -1 if that is the first of a cell."""
        source, lo, _, first, _ = self.taken[0]
        matrix = open_source(self.plan, source).matrix
        return int(matrix.indices.read(lo - 1, lo)[0]) if lo > matrix.indptr[first] else -1

    def stretches(self, dtype: np.dtype[Any]) -> Iterator[Stretch]:
        """Return the entries; counts as `dtype`, or wider where they need it."""
        for source, lo, hi, first, last in self.taken:
            src = open_source(self.plan, source)
            indptr, row = src.matrix.indptr, self.plan.offsets[source] + first
            for at, raw_indices, raw in src.matrix.entries(lo, hi, self.plan.block):
                indices = check_indices(src, raw_indices, 0, indptr, at)
                place = partial(_place, indptr, indices, at)
                counts = take_values(self.plan, src, raw, dtype, place)
                if counts.n_zero:
                    raise UntidyError
                yield Stretch(row, indptr[first : last + 1], at, indices, counts.values, counts.n_rounded)


def _place(indptr: np.ndarray, indices: np.ndarray, at: int, k: int) -> tuple[int, int]:
    """Cell and gene of the `k`-th of the entries from `at` on."""
    return row_of(indptr, at + k), int(indices[k])


class _FromSpill(_Entries):
    """From the spill; its methods are those of `_FromInput`."""

    def __init__(self, plan: Plan, number: int) -> None:
        super().__init__(plan, number)
        self.first = first_entries(plan)
        self.parts = range(
            int(np.searchsorted(self.first[1:], self.begin, side="right")), int(np.searchsorted(self.first[:-1], self.end))
        )

    def rows(self) -> tuple[int, int]:
        begin = self.parts.start * self.plan.step
        return begin, min(self.parts.stop * self.plan.step, self.plan.n_obs) - begin

    def index_before(self) -> int:
        return -1  # the spill is in order

    def stretches(self, dtype: np.dtype[Any]) -> Iterator[Stretch]:
        for part in self.parts:
            indptr, indices, values = gather_part(self.plan, part, dtype)
            at = int(self.first[part])
            own = slice(max(self.begin - at, 0), min(self.end - at, values.size))
            if own.start < own.stop:
                yield Stretch(part * self.plan.step, indptr, own.start, indices[own], values[own], 0)


def widen_shard(folder: str, number: int, dtype: str) -> None:
    """Encode the values of a shard again in a wider type, which another shard turned out to need; a task."""
    plan, wide = load_plan(folder), np.dtype(dtype)
    with np.load(result_path(plan, number)) as result:
        arrays = dict(result)
    was = np.dtype(str(arrays["dtype"]))
    slots = shard_length(n_entries(plan)) // CHUNK
    encoder = Encoder("data", wide, plan.settings["codec"])
    with new_file(array_path(plan, number, "data", wide)) as file:
        pen = Pen(file, encoder, slots)
        source = array_path(plan, number, "data", was)
        for values in read_shard(source, Encoder("data", was, plan.settings["codec"]), slots, int(arrays["n"])):
            check_abandoned()
            pen.write(values.astype(wide))
        pen.finish()
        begin_to_sync(file)
    # The old file stays: until the new .npz is there, it is the old file that counts.
    save_arrays(result_path(plan, number), **{**arrays, "dtype": wide.name})
