"""The last steps of a conversion: bring parts to one type, join them into shards, check the whole."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr

from sedd.errors import warn_user
from sedd.io import pack
from sedd.io.files import new_file, save_arrays
from sedd.io.gathered import Gathered
from sedd.io.h5ad import Matrix
from sedd.io.parts import Plan, encoded_path, load_plan, part_path
from sedd.io.run import Sequel, TaskRunner
from sedd.io.shards import CHUNK, SHARD, Encoder, create_vector, n_shards, shard_length, write_shard
from sedd.io.store import CellStore, forget, span_hashes

CHECK_VALUES = 1 << 22
"""Entries read back at once when the finished store is checked."""


def widen_part(folder: str, number: int, dtype: str) -> None:
    """Encode the values of a part again in a wider type, which another part turned out to need."""
    plan, stem = load_plan(folder), part_path(folder, number)
    with np.load(f"{stem}.npz") as meta:
        arrays = dict(meta)
    was, wide = arrays["data_edges"].dtype, np.dtype(dtype)
    old, new = Encoder("data", was, plan.settings["codec"]), Encoder("data", wide, plan.settings["codec"])
    paths = [encoded_path(folder, number, "data", kind) for kind in (was, wide)]
    with open(paths[0], "rb") as source, new_file(paths[1]) as target:
        sizes = [target.write(new.encode(old.decode(source.read(int(size))))) for size in arrays["data_sizes"]]
    # The old file stays: until the new .npz is there, it is the old file that counts.
    arrays |= {"data_edges": arrays["data_edges"].astype(dtype), "data_sizes": np.array(sizes, np.int64)}
    save_arrays(f"{stem}.npz", **arrays)


def build_shard(folder: str, name: str, number: int, target: str, n: int, own: tuple[int, int]) -> None:
    """Join the encoded chunks of parts `own[0]:own[1]` that lie in shard `number` of `X/name` into one file.

    Parts whose values differ in type are left for when they have been brought to one.
    """
    if name == "data" and len({part_dtype(folder, part) for part in range(*own)}) > 1:
        return
    write_shard(target, _runs(folder, name, number, n, own), shard_length(n) // CHUNK)


def _runs(folder: str, name: str, number: int, n: int, own: tuple[int, int]) -> Iterator[tuple[bytes, np.ndarray]]:
    """Runs of encoded chunks of one shard, in order, with their sizes; chunks that parts share are put together here."""
    plan = load_plan(folder)
    begin, end = number * SHARD, min(n, (number + 1) * SHARD)
    waiting: list[np.ndarray] = []
    for part in range(*own):
        stem = part_path(folder, part)
        with np.load(f"{stem}.npz") as meta:
            first, head, tail = int(meta["first"]), int(meta["head"]), int(meta["tail"])
            edges, sizes = meta[f"{name}_edges"], meta[f"{name}_sizes"]
        encoder = Encoder(name, edges.dtype, plan.settings["codec"])
        for edge, at in ((edges[:head], first), (None, first + head), (edges[head:], first + tail)):
            if edge is None:
                lo, hi = (int(np.clip((bound - at) // CHUNK, 0, sizes.size)) for bound in (begin, end + CHUNK - 1))
                if lo < hi:
                    with open(encoded_path(folder, part, name, edges.dtype), "rb") as stream:
                        stream.seek(int(sizes[:lo].sum()))
                        yield stream.read(int(sizes[lo:hi].sum())), sizes[lo:hi]
                continue
            for piece in _split(edge, at):
                start, at = at, at + piece.size
                if not begin <= start < end:
                    continue
                waiting.append(piece)
                if at % CHUNK == 0 or at == n:
                    chunk = encoder.encode(np.concatenate(waiting))
                    waiting = []
                    yield chunk, np.array([len(chunk)])


def _split(values: np.ndarray, at: int) -> list[np.ndarray]:
    """Cut values that begin at place `at` where chunks end."""
    cuts = np.arange(CHUNK - at % CHUNK, values.size, CHUNK)
    return [piece for piece in np.split(values, cuts) if piece.size]


def begin(folder: str) -> zarr.Group:
    """Open the store under construction, keeping from an earlier attempt all complete shards of data and indices."""
    root = f"{folder}/store"
    for where, _, names in os.walk(root):
        inside = os.path.relpath(where, root)
        if inside not in (os.path.join("X", "data", "c"), os.path.join("X", "indices", "c")):
            for name in names:
                os.unlink(f"{where}/{name}")
    for name in ("data", "indices"):
        os.makedirs(f"{root}/X/{name}/c", exist_ok=True)
        for file in os.listdir(f"{root}/X/{name}/c"):
            if not file.isdigit():
                os.unlink(f"{root}/X/{name}/c/{file}")
    for name in os.listdir(root):
        if name != "X" and os.path.isdir(f"{root}/{name}"):
            shutil.rmtree(f"{root}/{name}")
    group = zarr.open_group(root, mode="a", zarr_format=3)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    return group


def part_dtype(folder: str, number: int) -> np.dtype[Any]:
    """Type of the values of a part."""
    with np.load(f"{part_path(folder, number)}.npz") as meta:
        return np.dtype(meta["data_edges"].dtype)


def joins(folder: str, first: np.ndarray) -> list[Sequel]:
    """The tasks that join parts into shards, those that are there already left out.

    Parameters
    ----------
    first : (n_parts + 1,) int64, place in the store of each part's first entry
    """
    tasks, n = [], int(first[-1])
    for number in range(n_shards(n)):
        own = parts_of(first, number)
        for name in ("data", "indices"):
            target = f"{folder}/store/X/{name}/c/{number}"
            if not os.path.exists(target):
                tasks.append(Sequel(build_shard, (folder, name, number, target, n, own), range(*own)))
    return tasks


def parts_of(first: np.ndarray, shard: int) -> tuple[int, int]:
    """Parts that have entries in a shard, as a range; `first` as in `joins`."""
    lo = int(np.searchsorted(first[1:], shard * SHARD, side="right"))
    return lo, int(np.searchsorted(first[:-1], min(int(first[-1]), (shard + 1) * SHARD), side="left"))


def build(group: zarr.Group, folder: str, runner: TaskRunner, gathered: Gathered) -> None:
    """Make X in `group` from the parts in `folder`: what `joins` could not do yet, and the metadata."""
    root = f"{folder}/store"
    narrow = [k for k, dtype in enumerate(gathered.dtypes) if dtype != gathered.dtype]
    if narrow:  # what was joined from narrow parts goes before they are widened: whatever exists after that is right
        for number in range(n_shards(gathered.n)):
            target = f"{root}/X/data/c/{number}"
            if not set(narrow).isdisjoint(range(*parts_of(gathered.first, number))) and os.path.exists(target):
                os.unlink(target)
        runner.run(widen_part, [(folder, k, gathered.dtype.name) for k in narrow], [0] * len(narrow), title="widen")
    left = [join.arguments for join in joins(folder, gathered.first)]
    runner.run(build_shard, left, [gathered.n_obs / max(1, len(left))] * len(left), title="join")
    plan = load_plan(folder)
    _create_matrix(group, gathered, plan)
    _write_indptr(root, gathered.row_nnz, plan)


def _create_matrix(group: zarr.Group, gathered: Gathered, plan: Plan) -> None:
    matrix = group.create_group("X")
    matrix.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [gathered.n_obs, plan.n_vars]}
    )
    codec = plan.settings["codec"]
    create_vector(matrix, "indptr", gathered.n_obs + 1, np.dtype(np.int64), codec)
    create_vector(matrix, "indices", gathered.n, pack.index_dtype(plan.n_vars), codec)
    create_vector(matrix, "data", gathered.n, gathered.dtype, codec)


def _write_indptr(root: str, row_nnz: np.ndarray, plan: Plan) -> None:
    indptr = np.concatenate([[0], np.cumsum(row_nnz, dtype=np.int64)])
    encoder = Encoder("indptr", indptr.dtype, plan.settings["codec"])
    os.makedirs(f"{root}/X/indptr/c", exist_ok=True)
    for number in range(n_shards(indptr.size)):
        own = indptr[number * SHARD : (number + 1) * SHARD]
        chunks = [encoder.encode(own[k : k + CHUNK]) for k in range(0, own.size, CHUNK)]
        runs = ((chunk, np.array([len(chunk)])) for chunk in chunks)
        write_shard(f"{root}/X/indptr/c/{number}", runs, shard_length(indptr.size) // CHUNK)


def check(folder: str, runner: TaskRunner, gathered: Gathered) -> None:
    """Read the finished store back, checksums and all, and compare each cell with what was gathered from the input.

    Raises
    ------
    OSError
        If what was written does not read back as what was gathered.
    """
    root = f"{folder}/store"
    forget()
    store = CellStore(root)
    spans = store.spans(CHECK_VALUES)
    hashes = runner.run(span_hashes, [(root, *span) for span in spans], [hi - lo for lo, hi in spans], title="check")
    wrong = np.flatnonzero(np.concatenate(hashes) != gathered.hashes)
    if wrong.size:
        raise OSError(f"cell {wrong[0]} reads back differently from what was written")


def report(store: CellStore, where: str) -> None:
    """One line for each thing that the user should know of the input."""
    rounded = store.uns_sedd["rounded"]
    if rounded:
        warn_user(f"{where}: {rounded} values were within {pack.TOLERANCE} of an integer and were rounded.")
    empty = int((np.diff(store.indptr) == 0).sum())
    if empty:
        warn_user(f"{where}: {empty} of {store.n_obs} cells have no counts; they were kept.")
    unseen = int((store.gene_stats()["nnz"] == 0).sum())
    if unseen:
        warn_user(f"{where}: {unseen} of {store.n_vars} genes are never seen; they were kept.")


def rehearse(matrix: Matrix, narrow: np.dtype[Any], codec: str) -> tuple[float, float]:
    """Seconds of one core and bytes in the store, per stored value, measured on about a million values."""
    start = time.perf_counter()
    lo, hi = matrix.spans(1 << 20)[0]
    if matrix.layout == "dense":
        indptr, indices, raw = pack.dense_rows(matrix.read_dense(lo, hi))
    else:
        indptr, indices, raw = matrix.read_major(lo, hi)
    counts = pack.to_counts(raw, narrow)
    kind = pack.index_dtype(matrix.shape[1])
    pack.tally(indptr, indices.astype(kind), counts.values, matrix.shape[1 if matrix.layout != "csc" else 0])
    n_bytes = 0
    for name, array in (("data", counts.values), ("indices", indices.astype(kind))):
        encoder = Encoder(name, array.dtype, codec)
        n_bytes += sum(len(encoder.encode(array[k : k + CHUNK])) for k in range(0, array.size, CHUNK))
    size = max(1, (matrix.nnz and indices.size) or (hi - lo) * matrix.shape[1])
    return (time.perf_counter() - start) / size, n_bytes / size


