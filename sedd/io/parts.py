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
from typing import Any, NamedTuple

import numpy as np

from sedd.errors import NotCountsError, UserError
from sedd.io import pack
from sedd.io.files import new_file, save_arrays
from sedd.io.h5ad import H5ad, Matrix
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


def forget() -> None:
    """Drop what `load_plan` and `open_source` hold."""
    load_plan.cache_clear()
    open_source.cache_clear()


def part_path(folder: str, number: int) -> str:
    """Stem of the files of part `number`: `.npz` (written last), `.data`, `.indices`."""
    return f"{folder}/parts/{number:06d}"


def direct_part(folder: str, number: int) -> None:
    """Make part `number` from consecutive rows of tidy CSR input."""
    plan = load_plan(folder)
    source, lo, hi = plan.spans[number]
    src = open_source(folder, source)
    indptr, raw_indices, raw_values = src.matrix.read_major(lo, hi)
    indices = check_indices(src, raw_indices, lo, indptr)
    values, rounded = take_values(plan, src, raw_values, lambda k: (row_of(indptr, k) + lo, int(indices[k])))
    del raw_indices, raw_values
    if pack.first_disorder(indptr, indices) >= 0 or not values.all():
        raise UntidyError
    write_part(folder, number, plan.entries[source] + int(src.matrix.indptr[lo]), indptr, indices, values, rounded)


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
        with new_file(f"{stem}.{name}") as file:
            arrays[f"{name}_sizes"] = encode_chunks(file, array[head:tail], plan.settings["codec"])
        arrays[f"{name}_edges"] = np.concatenate([array[:head], array[tail:]])
    tally = pack.tally(indptr, indices, values, plan.n_vars)
    place = {"first": first, "n": values.size, "head": head, "tail": tail}
    row_nnz = np.diff(indptr).astype(np.int32)
    save_arrays(f"{stem}.npz", **place, **arrays, row_nnz=row_nnz, rounded=rounded, **tally._asdict())


def encode_chunks(file: Any, array: np.ndarray, codec: str) -> np.ndarray:
    """Write whole inner chunks one after the other; their sizes."""
    encoder = Encoder(array.dtype, codec)
    sizes = [file.write(encoder.encode(array[k : k + CHUNK])) for k in range(0, array.size, CHUNK)]
    return np.array(sizes, np.int64)


def row_of(indptr: np.ndarray, k: int) -> int:
    """Row that holds entry `k`."""
    return int(np.searchsorted(indptr, k, side="right")) - 1


def check_indices(src: Source, indices: np.ndarray, lo: int, indptr: np.ndarray) -> np.ndarray:
    """Minor indices in the narrowest type, all of them in range; `lo` is the first row (column of CSC) of the block."""
    axis, limit = ("cells", src.matrix.shape[0]) if src.matrix.layout == "csc" else ("genes", src.matrix.shape[1])
    if indices.size and not (int(indices.min()) >= 0 and int(indices.max()) < limit):
        at = int(np.argmax((indices < 0) | (indices >= limit)))
        major = "gene" if src.matrix.layout == "csc" else "cell"
        raise UserError(
            f"{src.matrix.path}: {src.matrix.name}/indices holds {indices[at]} at {major} {lo + row_of(indptr, at)}, "
            f"but there are {limit} {axis}. The file is damaged: copy or write it again."
        )
    return indices.astype(pack.index_dtype(limit), copy=False)


def take_values(
    plan: Plan, src: Source, raw: np.ndarray, place_of: Callable[[int], tuple[int, int]]
) -> tuple[np.ndarray, int]:
    """Counts in a narrow type (or float32 real values), and how many had to be rounded.

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
        return values, 0
    counts = pack.to_counts(raw, np.dtype(plan.narrow))
    if counts.bad >= 0:
        raise NotCountsError(explain(src.file, src.matrix, raw, counts.bad, place_of))
    return counts.values, counts.n_rounded
