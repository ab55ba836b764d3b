"""The tasks of a conversion. Each reads one piece of the input, writes one result file, and can be repeated.

A conversion has a folder, `OUTPUT.zarr.partial`, that holds its `Plan` and everything done so far; a task is a function of
(folder, number), so that a Dask worker anywhere needs nothing else. A result appears by one rename: what exists is complete,
and a conversion that was killed goes on with what does not exist yet.

A *part* is a run of consecutive cells of the store. `direct_part` takes it straight from tidy CSR input; all other input
goes through `spill.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sedd.errors import NotCountsError, UserError
from sedd.io import pack
from sedd.io.files import new_file, save_arrays
from sedd.io.h5ad import H5ad, Matrix
from sedd.io.native import keep_freed_memory
from sedd.io.shards import CHUNK, Encoder
from sedd.io.values import explain


class UntidyError(Exception):
    """CSR input with stored zeros, or indices unsorted or repeated: its entries must be cleaned before they are placed."""


@dataclass(frozen=True)
class Plan:
    """What a conversion does, as written to `plan.json`.

    Attributes
    ----------
    sources : (path, layer, raw) of each input
    fingerprints : of the inputs
    settings : everything else that the result depends on
    n_vars : genes of the store
    direct : whether parts come straight from the input; then span and part are the same thing
    narrow : the type to try first for counts
    spans : stretches of input, (source, first, last) in rows, or in columns for CSC
    edges : cut the cells of the store into parts
    step : cells in a part, unless direct
    offsets : number of the first cell of each source, all cells counted in input order
    entries : number of the first entry of each source, when direct
    """

    sources: tuple[tuple[str, str | None, bool], ...]
    fingerprints: tuple[str, ...]
    settings: dict[str, Any]
    n_vars: int
    direct: bool
    narrow: str
    spans: tuple[tuple[int, int, int], ...]
    edges: tuple[int, ...]
    step: int
    offsets: tuple[int, ...]
    entries: tuple[int, ...]

    def save(self, folder: str) -> None:
        """Write `plan.json`."""
        with new_file(f"{folder}/plan.json") as file:
            file.write(json.dumps(asdict(self)).encode())

    @property
    def n_parts(self) -> int:
        """How many parts the store is made of."""
        return len(self.edges) - 1


@lru_cache(maxsize=4)
def load_plan(folder: str) -> Plan:
    """Read `plan.json`."""
    with open(f"{folder}/plan.json") as file:
        raw: dict[str, Any] = json.load(file)
    for key in ("sources", "spans"):
        raw[key] = [tuple(item) for item in raw[key]]
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    return Plan(**fields)


class Source(NamedTuple):
    """An input held open, the new numbers of its genes (None: unchanged) and the places of its cells in the store (None: in order)."""

    file: H5ad
    matrix: Matrix
    genes: np.ndarray | None
    places: np.ndarray | None


@lru_cache(maxsize=64)
def open_source(folder: str, number: int) -> Source:
    """Open input `number`, once for all tasks of this process."""
    plan = load_plan(folder)
    keep_freed_memory()
    path, layer, raw = plan.sources[number]
    file = H5ad(path)
    matrix = file.matrix(layer, raw)
    genes, places = f"{folder}/genes-{number}.npy", f"{folder}/places.npy"
    first = plan.offsets[number]
    return Source(
        file,
        matrix,
        np.load(genes) if os.path.exists(genes) else None,
        np.load(places)[first : first + matrix.shape[0]] if os.path.exists(places) else None,
    )


def first_entries(folder: str) -> np.ndarray:
    """Place in the store of each part's first entry, and their number, when parts come straight from the input."""
    plan = load_plan(folder)
    first = [plan.entries[source] + int(open_source(folder, source).matrix.indptr[lo]) for source, lo, _ in plan.spans]
    source, _, hi = plan.spans[-1]
    return np.array([*first, plan.entries[source] + int(open_source(folder, source).matrix.indptr[hi])])


def forget() -> None:
    """Drop what `load_plan` and `open_source` hold."""
    load_plan.cache_clear()
    open_source.cache_clear()


def part_path(folder: str, number: int) -> str:
    """Stem of the files of part `number`: `.npz` (written last), and an encoded file for each array (`encoded_path`)."""
    return f"{folder}/parts/{number:06d}"


def encoded_path(folder: str, number: int, name: str, dtype: np.dtype[Any]) -> str:
    """Where the encoded chunks of a part of `X/name` are.

    The type is in the name: a part that is made twice, or widened, may change its type, and its `.npz` says which one counts.
    """
    return f"{part_path(folder, number)}.{name}.{dtype.name}"


def direct_part(folder: str, number: int) -> None:
    """Make part `number` from consecutive rows of tidy CSR input."""
    plan = load_plan(folder)
    source, lo, hi = plan.spans[number]
    src = open_source(folder, source)
    block = read_rows(folder, src, lo, hi)
    if block.untidy:
        raise UntidyError
    indptr, indices, values, rounded = block[:4]
    if values.dtype.itemsize > np.dtype(plan.narrow).itemsize and values.dtype.kind == "u":
        Path(_wide_path(folder, values.dtype)).touch()
    write_part(folder, number, plan.entries[source] + int(src.matrix.indptr[lo]), indptr, indices, values, rounded)


class Block(NamedTuple):
    """Rows of CSR input in narrow types; `untidy` when entries are zero, out of order or repeated."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    rounded: int
    untidy: bool


def read_rows(folder: str, src: Source, lo: int, hi: int) -> Block:
    """Read rows `lo:hi` of CSR input, checking and narrowing each piece while it is in the processor's cache."""
    plan, matrix = load_plan(folder), src.matrix
    start, stop = int(matrix.indptr[lo]), int(matrix.indptr[hi])
    indptr = matrix.indptr[lo : hi + 1] - start
    indices = np.empty(stop - start, pack.index_dtype(matrix.shape[1]))
    for at, raw in matrix.pieces("indices", start, stop):
        indices[at : at + raw.size] = check_indices(src, raw, lo, indptr, at)
    narrow = narrow_dtype(folder)
    values = np.empty(stop - start, np.float32 if plan.settings["values"] == "real" else narrow)
    rounded = n_zero = 0
    for at, raw in matrix.pieces("data", start, stop):
        piece = take_values(plan, src, raw, narrow, lambda k, at=at: (row_of(indptr, at + k) + lo, int(indices[at + k])))  # type: ignore[misc]
        narrow = piece.values.dtype
        if narrow != values.dtype:
            values = values.astype(narrow)
        values[at : at + raw.size] = piece.values
        rounded, n_zero = rounded + piece.n_rounded, n_zero + piece.n_zero
    return Block(indptr, indices, values, rounded, n_zero > 0 or pack.first_disorder(indptr, indices) >= 0)


def narrow_dtype(folder: str) -> np.dtype[Any]:
    """The type to try first for counts: the plan's guess, or a wider one that a part made so far turned out to need.

    Parts made narrower than the others are encoded again in the end.
    """
    for kind in (np.uint32, np.uint16):
        if os.path.exists(_wide_path(folder, np.dtype(kind))):
            return np.dtype(kind)
    return np.dtype(load_plan(folder).narrow)


def _wide_path(folder: str, dtype: np.dtype[Any]) -> str:
    return f"{folder}/parts/{dtype.name}"


def write_part(
    folder: str, number: int, first: int, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, rounded: int = 0
) -> None:
    """Encode a block of cells and count it.

    Whole inner chunks go to the files `.data` and `.indices`; entries of chunks shared with a neighbour are kept as they are.

    Parameters
    ----------
    first : place of the block's first entry in the store
    indptr, indices, values : the block, tidy CSR, in the types of the store
    rounded : values that were not quite integers
    """
    plan = load_plan(folder)
    stem = part_path(folder, number)
    head, tail = -(-first // CHUNK) * CHUNK - first, (first + values.size) // CHUNK * CHUNK - first
    if tail <= head:
        head = tail = values.size
    arrays = {}
    for name, array in (("data", values), ("indices", indices)):
        with new_file(encoded_path(folder, number, name, array.dtype)) as file:
            arrays[f"{name}_sizes"] = encode_chunks(file, name, array[head:tail], plan.settings["codec"])
        arrays[f"{name}_edges"] = np.concatenate([array[:head], array[tail:]])
    tally = pack.tally(indptr, indices, values, plan.n_vars)
    place = {"first": first, "n": values.size, "head": head, "tail": tail}
    row_nnz = np.diff(indptr).astype(np.int32)
    save_arrays(f"{stem}.npz", **place, **arrays, row_nnz=row_nnz, rounded=rounded, **tally._asdict())


def encode_chunks(file: Any, name: str, array: np.ndarray, codec: str) -> np.ndarray:
    """Write whole inner chunks of `X/name` one after the other; their sizes."""
    encoded, sizes = Encoder(name, array.dtype, codec).encode_all(array)
    file.write(encoded)
    return sizes


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
        raise UserError(
            f"{src.matrix.path}: {src.matrix.name}/indices holds {indices[at]} at {major} {lo + row_of(indptr, first + at)}, "
            f"but there are {limit} {axis}. The file is damaged: copy or write it again."
        )
    return indices.astype(pack.index_dtype(limit), copy=False)


def take_values(
    plan: Plan, src: Source, raw: np.ndarray, narrow: np.dtype[Any], place_of: Callable[[int], tuple[int, int]]
) -> pack.Counts:
    """Counts in type `narrow` or a wider one, or float32 real values.

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
        return pack.Counts(values, int((values == 0).sum()), 0, -1)
    counts = pack.to_counts(raw, narrow)
    if counts.bad >= 0:
        raise NotCountsError(explain(src.file, src.matrix, raw, counts.bad, place_of))
    return counts
