"""The tasks of a conversion. Each reads one piece of the input, writes one result file, and can be repeated.

A conversion has a folder, `OUTPUT.zarr.partial`, that holds its `Plan` and everything done so far; a task is a function of
(folder, number), so that a Dask worker anywhere needs nothing else. A result appears by one rename: what exists is complete,
and a conversion that was killed goes on with what does not exist yet.

A *part* is a run of consecutive cells of the store: `direct_part` takes it straight from CSR input. When cells are shuffled, genes
matched, or the input is CSC or dense, `scatter_window` first deals the entries of a stretch of input out to the parts (*spill*), and
`gather_part` puts one part together.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sedd.errors import UserError
from sedd.io import pack
from sedd.io.h5ad import H5ad, Matrix
from sedd.io.shards import CHUNK, Encoder
from sedd.io.values import explain


class NotCanonicalError(Exception):
    """CSR input with zeros stored, or indices unsorted or repeated: its entries must be cleaned before they are placed."""


@dataclass(frozen=True)
class Plan:
    """What a conversion does, as written to `plan.json`.

    `spans` are the stretches of input, `(source, first, last)` in rows (columns of CSC). `edges` cut the cells of the store
    into parts. `offsets[i]` is the first cell of source `i` in input order. When `direct`, span and part are the same thing.
    """

    sources: tuple[tuple[str, str | None, bool], ...]
    fingerprints: tuple[str, ...]
    settings: dict[str, Any]
    n_vars: int
    direct: bool
    narrow: str
    spans: tuple[tuple[int, int, int], ...]
    edges: tuple[int, ...]
    offsets: tuple[int, ...]

    def save(self, folder: str) -> None:
        """Write `plan.json`."""
        write_file(f"{folder}/plan.json", json.dumps(asdict(self)).encode())

    @property
    def n_parts(self) -> int:
        """How many parts the store is made of."""
        return len(self.edges) - 1


@lru_cache(maxsize=4)
def load_plan(folder: str) -> Plan:
    """Read `plan.json`."""
    with open(f"{folder}/plan.json") as file:
        raw = json.load(file)
    for key in ("sources", "spans"):
        raw[key] = tuple(tuple(item) for item in raw[key])
    return Plan(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})


class Source(NamedTuple):
    """An input matrix held open, the new numbers of its genes, and the places of its cells in the store."""

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
    genes = f"{folder}/genes-{number}.npy"
    places = f"{folder}/places.npy"
    first = plan.offsets[number]
    return Source(
        file,
        matrix,
        np.load(genes) if os.path.exists(genes) else None,
        np.load(places, mmap_mode="r")[first : first + matrix.shape[0]] if os.path.exists(places) else None,
    )


def forget() -> None:
    """Drop what `load_plan` and `open_source` hold."""
    load_plan.cache_clear()
    open_source.cache_clear()


def write_file(path: str, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def save_arrays(path: str, **arrays: Any) -> None:
    """Write an `.npz` whole or not at all."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def part_path(folder: str, number: int) -> str:
    """Stem of the files of part `number`: `.npz` (written last), `.data`, `.indices`."""
    return f"{folder}/parts/{number:06d}"


def window_path(folder: str, number: int) -> str:
    """Stem of the files of spilled window `number`: `.npz` (written last) and `.bin`."""
    return f"{folder}/spill/{number:06d}"


def direct_part(folder: str, number: int) -> None:
    """Make part `number` from consecutive rows of CSR input that is canonical already."""
    plan = load_plan(folder)
    source, lo, hi = plan.spans[number]
    src = open_source(folder, source)
    indptr, raw_indices, raw_values = src.matrix.read_major(lo, hi)
    indices = _narrow_indices(src, lo, indptr, raw_indices)
    values, rounded = _values(plan, src, raw_values, lambda k: (_row_of(indptr, k) + lo, int(indices[k])))
    del raw_indices, raw_values
    if pack.first_disorder(indptr, indices) >= 0 or not values.all():
        raise NotCanonicalError
    first = sum(int(open_source(folder, s).matrix.nnz or 0) for s in range(source)) + int(src.matrix.indptr[lo])
    write_part(folder, number, first, indptr, indices, values, rounded=rounded)


def scatter_window(folder: str, number: int) -> None:
    """Deal the entries of one stretch of input out to the parts they belong to."""
    plan = load_plan(folder)
    source, lo, hi = plan.spans[number]
    src = open_source(folder, source)
    first = plan.offsets[source]
    n_summed = 0
    edges = np.asarray(plan.edges)
    if src.matrix.layout == "csc":
        indptr, raw_rows, raw_values = src.matrix.read_major(lo, hi)
        entry_rows = _checked(src, raw_rows, src.matrix.shape[0], "cells")
        values, rounded = _values(plan, src, raw_values, lambda k: (int(entry_rows[k]), _row_of(indptr, k) + lo))
        if pack.first_disorder(indptr, entry_rows) >= 0:
            indptr, entry_rows, values, n_summed = pack.clean_rows(indptr, entry_rows, values, src.matrix.shape[0], None)
        genes = np.arange(lo, hi) if src.genes is None else src.genes[lo:hi]
        indices = np.repeat(genes.astype(np.int32), np.diff(indptr))
        keep = (indices >= 0) & (values != 0)
        if not keep.all():
            entry_rows, indices, values = entry_rows[keep], indices[keep], values[keep]
        places = entry_rows.astype(np.int64) + first if src.places is None else src.places[entry_rows].astype(np.int64)
        bucket = np.searchsorted(edges, places, side="right") - 1
        order = np.argsort(bucket, kind="stable")
        rows, lengths = places[order], np.empty(0, np.int64)
        indices, values = indices[order], values[order]
        row_cuts = entry_cuts = np.searchsorted(bucket[order], np.arange(plan.n_parts + 1))
    else:
        if src.matrix.layout == "dense":
            indptr, raw_indices, raw_values = pack.dense_rows(src.matrix.read_dense(lo, hi))
        else:
            indptr, raw_indices, raw_values = src.matrix.read_major(lo, hi)
        indices = _narrow_indices(src, lo, indptr, raw_indices)
        values, rounded = _values(plan, src, raw_values, lambda k: (_row_of(indptr, k) + lo, int(indices[k])))
        if src.genes is not None or pack.first_disorder(indptr, indices) >= 0 or not values.all():
            indptr, indices, values, n_summed = pack.clean_rows(indptr, indices, values, plan.n_vars, src.genes)
        places = np.arange(lo, hi) + first if src.places is None else src.places[lo:hi].astype(np.int64)
        order = np.argsort(places, kind="stable")
        rows = places[order]
        lengths, (indices, values) = pack.gather_rows(indptr, order, indices, values)
        row_cuts = np.searchsorted(rows, edges)
        entry_cuts = np.concatenate([[0], np.cumsum(lengths)])[row_cuts]
    starts = np.repeat(edges[:-1], np.diff(row_cuts))
    arrays = {
        "rows": (rows - starts).astype(np.uint32),
        "lengths": lengths.astype(np.uint32),
        "indices": indices.astype(pack.index_dtype(plan.n_vars), copy=False),
        "values": values if values.dtype.kind == "f" else _narrowest(values),
    }
    stem = window_path(folder, number)
    with open(f"{stem}.bin", "wb") as file:
        for array in arrays.values():
            file.write(memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b"")
    save_arrays(
        f"{stem}.npz",
        row_cuts=row_cuts,
        entry_cuts=entry_cuts,
        sizes=np.array([array.size for array in arrays.values()]),
        dtypes=np.array([array.dtype.str for array in arrays.values()]),
        rounded=rounded,
        summed=n_summed,
        largest=0 if values.dtype.kind == "f" or not values.size else int(values.max()),
    )


def read_piece(folder: str, window: int, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `window` holds for `part`: local rows, lengths of their runs, indices, values."""
    stem = window_path(folder, window)
    with np.load(f"{stem}.npz") as meta:
        rows, entries = meta["row_cuts"][part : part + 2], meta["entry_cuts"][part : part + 2]
        sizes, dtypes = meta["sizes"], [np.dtype(str(name)) for name in meta["dtypes"]]
    starts = np.concatenate([[0], np.cumsum(sizes * [dtype.itemsize for dtype in dtypes])])
    out = []
    for start, size, dtype, (lo, hi) in zip(starts, sizes, dtypes, (rows, rows, entries, entries), strict=False):
        if size == 0:
            out.append(np.empty(0, dtype))
            continue
        offset = int(start + lo * dtype.itemsize)
        out.append(np.fromfile(f"{stem}.bin", dtype, int(hi - lo), offset=offset))
    if sizes[1] == 0:
        out[1] = np.ones(out[0].size, np.uint32)
    return out[0], out[1], out[2], out[3]


def gather_part(folder: str, number: int, first: int, largest: int) -> None:
    """Put part `number` together from what the windows hold for it; `first` is the place of its first entry."""
    plan = load_plan(folder)
    n_rows = plan.edges[number + 1] - plan.edges[number]
    counts = np.zeros(n_rows, np.int64)
    for window in range(len(plan.spans)):
        rows, lengths, _, _ = read_piece(folder, window, number)
        counts += np.bincount(rows, weights=lengths, minlength=n_rows).astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    dtype = np.dtype(np.float32) if plan.settings["values"] == "real" else pack.count_dtype(largest)
    indices, values = np.empty(indptr[-1], pack.index_dtype(plan.n_vars)), np.empty(indptr[-1], dtype)
    cursor = indptr[:-1].copy()
    for window in range(len(plan.spans)):
        rows, lengths, piece_indices, piece_values = read_piece(folder, window, number)
        pack.place(cursor, rows, lengths, [(piece_indices, indices), (piece_values.astype(dtype, copy=False), values)])
    disorder = pack.first_disorder(indptr, indices)
    if disorder >= 0:  # CSC whose genes changed order, or one column in several windows with an entry repeated
        lost = indptr[-1]
        indptr, indices, wide, _ = pack.clean_rows(indptr, indices, values, plan.n_vars, None)
        values = wide.astype(dtype)
        if indptr[-1] != lost:
            raise UserError(f"{plan.sources[0][0]}: an entry is stored twice. Call `adata.X.sum_duplicates()` first.")
    write_part(folder, number, first, indptr, indices, values)


def write_part(
    folder: str,
    number: int,
    first: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    rounded: int = 0,
) -> None:
    """Encode a block of cells whose first entry is entry `first` of the store.

    Whole inner chunks go to the files `.data` and `.indices`; entries of chunks shared with a neighbour are kept as they are.
    """
    plan = load_plan(folder)
    stem = part_path(folder, number)
    last = first + values.size
    begin, end = -(-first // CHUNK) * CHUNK - first, last // CHUNK * CHUNK - first
    if end <= begin:
        begin = end = values.size
    sizes = {}
    for name, array in (("data", values), ("indices", indices)):
        encoder = Encoder(array.dtype, plan.settings["codec"])
        sizes[name] = []
        with open(f"{stem}.{name}", "wb") as file:
            for k in range(begin, end, CHUNK):
                encoded = encoder.encode(array[k : k + CHUNK])
                sizes[name].append(len(encoded))
                file.write(encoded)
    tally = pack.tally(indptr, indices, values, plan.n_vars)
    save_arrays(
        f"{stem}.npz",
        first=first,
        n=values.size,
        head=begin,
        tail=end,
        data_sizes=np.array(sizes["data"], np.int64),
        indices_sizes=np.array(sizes["indices"], np.int64),
        data_edges=np.concatenate([values[:begin], values[end:]]),
        indices_edges=np.concatenate([indices[:begin], indices[end:]]),
        row_nnz=np.diff(indptr).astype(np.int32),
        rounded=rounded,
        **tally._asdict(),
    )


def _row_of(indptr: np.ndarray, k: int) -> int:
    return int(np.searchsorted(indptr, k, side="right")) - 1


def _narrowest(values: np.ndarray) -> np.ndarray:
    return values.astype(pack.count_dtype(int(values.max()) if values.size else 0), copy=False)


def _checked(src: Source, indices: np.ndarray, limit: int, axis: str) -> np.ndarray:
    """Indices as int32, all inside `[0, limit)`."""
    if indices.size and not (int(indices.min()) >= 0 and int(indices.max()) < limit):
        at = int(np.argmax((indices < 0) | (indices >= limit)))
        raise UserError(
            f"{src.matrix.path}: {src.matrix.name}/indices holds {indices[at]} but there are {limit} {axis}. Copy it again."
        )
    return indices.astype(np.int32, copy=False)


def _narrow_indices(src: Source, lo: int, indptr: np.ndarray, indices: np.ndarray) -> np.ndarray:
    limit = src.matrix.shape[1]
    return _checked(src, indices, limit, "genes").astype(pack.index_dtype(limit), copy=False)


def _values(plan: Plan, src: Source, raw: np.ndarray, place_of: Any) -> tuple[np.ndarray, int]:
    """Counts in a narrow type (or float32 real values), and how many had to be rounded."""
    if plan.settings["values"] == "real":
        values = raw.astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            raise UserError(explain(src.file, src.matrix, raw, int(np.argmin(finite)), place_of))
        return values, 0
    counts = pack.to_counts(raw, np.dtype(plan.narrow))
    if counts.bad >= 0:
        raise UserError(explain(src.file, src.matrix, raw, counts.bad, place_of))
    return counts.values, counts.n_rounded
