"""What a conversion does, and its inputs held open: entries are read, checked and narrowed here.

A conversion has a folder, `OUTPUT.zarr.partial`, that holds its `Plan` and everything done so far. Its tasks are functions of
(folder, number), so that a Dask worker anywhere needs nothing else; each makes one result file, which appears by one rename: what
exists is complete, and a conversion that was killed is resumed with what does not exist yet.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sedd.errors import DamagedFileError, UserError
from sedd.io.conversion.counts import Counts, first_disorder, index_dtype, to_counts
from sedd.io.conversion.explain import explain, no_counts
from sedd.io.files import new_file
from sedd.io.format.codec import keep_freed_memory
from sedd.io.input.base import Input
from sedd.io.input.features import close_matrices
from sedd.io.input.matrix import Matrix
from sedd.io.input.opening import opened_as


@dataclass(frozen=True, eq=False)  # as the key of a cache, a plan is itself and no other
class Plan:
    """What a conversion does, as written to `plan.json`.

    Attributes
    ----------
    folder : where the plan and all that is unfinished are
    id : in the names of the tasks' results, so that a task of an abandoned plan that still runs somewhere makes nothing of this one
    sources : (path, layer, raw) of each input
    fingerprints : of the inputs
    settings : everything else that the result depends on
    n_obs, n_vars : cells and genes of the store
    direct : whether shards come straight from the input
    narrow : the type to try first for counts
    block : stored values that a task may hold
    spans : stretches of input that are spilled, (source, first, last) in rows, or in columns for CSC; none when direct
    step : cells in a part of the spill: consecutive cells of the store
    offsets : number of the first cell of each source, all cells counted in input order
    entries : number of the first entry of each source and, last, of all entries taken; for CSR input only
    """

    folder: str
    id: str
    sources: tuple[tuple[str, str | None, bool], ...]
    fingerprints: tuple[str, ...]
    settings: dict[str, Any]
    n_obs: int
    n_vars: int
    direct: bool
    narrow: str
    block: int
    spans: tuple[tuple[int, int, int], ...]
    step: int
    offsets: tuple[int, ...]
    entries: tuple[int, ...]

    def save(self) -> None:
        """Write `plan.json`."""
        fields = asdict(self)
        del fields["folder"]
        with new_file(f"{self.folder}/plan.json") as file:
            file.write(json.dumps(fields).encode())

    @property
    def n_parts(self) -> int:
        """How many parts the spill has."""
        return -(-self.n_obs // self.step)


def load_plan(folder: str) -> Plan:
    """Read `plan.json`, once while it stays as it is: a Dask worker may see several conversions to one output."""
    stat = os.stat(f"{folder}/plan.json")
    return _load_plan(folder, (stat.st_mtime_ns, stat.st_ino))


@lru_cache(maxsize=4)
def _load_plan(folder: str, _: tuple[int, int]) -> Plan:
    with open(f"{folder}/plan.json") as file:
        raw: dict[str, Any] = json.load(file)
    for key in ("sources", "spans"):
        raw[key] = [tuple(item) for item in raw[key]]
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    return Plan(folder=folder, **fields)


class Source(NamedTuple):
    """An input held open, the new numbers of its genes (None: unchanged) and the places of its cells in the store (None: in order)."""

    file: Input
    matrix: Matrix
    genes: np.ndarray | None
    places: np.ndarray | None


_OPEN: dict[str, weakref.WeakSet[Input]] = {}
"""Inputs that are open, by the folder of their conversion."""


@lru_cache(maxsize=64)
def open_source(plan: Plan, number: int) -> Source:
    """Open input `number`, once for all tasks of this process."""
    keep_freed_memory()
    path, layer, raw = plan.sources[number]
    file = opened_as(path, plan.settings)
    _OPEN.setdefault(plan.folder, weakref.WeakSet()).add(file)
    matrix = file.matrix(layer, raw)
    genes, places = f"{plan.folder}/genes-{number}.npy", f"{plan.folder}/places.npy"
    own = slice(plan.offsets[number], plan.offsets[number] + matrix.shape[0])
    return Source(
        file,
        matrix,
        np.load(genes) if os.path.exists(genes) else None,
        np.array(np.load(places, mmap_mode="r")[own]) if os.path.exists(places) else None,
    )


def close_inputs(folder: str) -> None:
    """Let go of the plans and inputs that `load_plan` and `open_source` hold, and close those of the conversion in `folder`.

    Else the traceback of an error would hold them open, and their owner could not write them anew.
    """
    _load_plan.cache_clear()
    open_source.cache_clear()
    for file in _OPEN.pop(folder, ()):
        file.close()
    close_matrices()


class Block(NamedTuple):
    """Rows of CSR input in narrow types; `untidy` when entries are zero, out of order or repeated."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    rounded: int
    untidy: bool


def read_rows(plan: Plan, src: Source, lo: int, hi: int) -> Block:
    """Read rows `lo:hi` of CSR input, checking and narrowing each slice while it is in the processor's cache."""
    matrix = src.matrix
    start, stop = int(matrix.indptr[lo]), int(matrix.indptr[hi])
    indptr = matrix.indptr[lo : hi + 1] - start
    indices = np.empty(stop - start, index_dtype(matrix.shape[1]))
    for at, raw in matrix.slices("indices", start, stop):
        indices[at : at + raw.size] = check_indices(src, raw, lo, indptr, at)
    narrow = np.dtype(plan.narrow)
    values = np.empty(stop - start, np.float32 if plan.settings["values"] == "real" else narrow)
    rounded = n_zero = 0
    for at, raw in matrix.slices("data", start, stop):
        own = take_values(plan, src, raw, narrow, lambda k, at=at: (row_of(indptr, at + k) + lo, int(indices[at + k])))  # type: ignore[misc]
        narrow = own.values.dtype
        if narrow != values.dtype:
            values = values.astype(narrow)
        values[at : at + raw.size] = own.values
        rounded, n_zero = rounded + own.n_rounded, n_zero + own.n_zero
    return Block(indptr, indices, values, rounded, n_zero > 0 or first_disorder(indptr, indices) >= 0)


def row_of(indptr: np.ndarray, k: int) -> int:
    """Row that holds entry `k`."""
    return int(np.searchsorted(indptr, k, side="right")) - 1


def check_indices(src: Source, indices: np.ndarray, lo: int, indptr: np.ndarray, first: int = 0) -> np.ndarray:
    """Minor indices in the narrowest type, all of them in range.

    `lo` is the first row (column of CSC) of the block, `first` the place of the indices in it.
    """
    axis, limit = ("cells", src.matrix.shape[0]) if src.matrix.layout == "csc" else ("genes", src.matrix.shape[1])
    if indices.size and not (int(indices.min()) >= 0 and int(indices.max()) < limit):
        at = int(np.argmax((indices < 0) | (indices >= limit)))
        major = "gene" if src.matrix.layout == "csc" else "cell"
        raise DamagedFileError(
            f"{src.matrix.path}: {src.matrix.name}/indices holds {indices[at]} at {major} {lo + row_of(indptr, first + at)}, "
            f"but there are {limit} {axis}. The file is damaged: copy or write it again."
        )
    return indices.astype(index_dtype(limit), copy=False)


def take_values(
    plan: Plan, src: Source, raw: np.ndarray, narrow: np.dtype[Any], place_of: Callable[[int], tuple[int, int]]
) -> Counts:
    """Return the counts in type `narrow` or a wider one, or float32 real values.

    Raises
    ------
    UserError
        At the first value that is no count; `place_of` maps its position to (cell, gene).
    """
    if plan.settings["values"] == "real":
        values = raw.astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            raise UserError(explain(src.file, src.matrix, raw, int(np.argmin(finite)), place_of))
        return Counts(values, int((values == 0).sum()), 0, -1)
    counts = to_counts(raw, narrow, rounding=plan.settings["round"])
    if counts.bad >= 0:
        raise no_counts(src.file, src.matrix, raw, counts.bad, place_of)
    return counts
