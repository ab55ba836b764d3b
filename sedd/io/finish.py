"""The last steps of a conversion: bring parts to one type, join them into shards, write tables, check the whole."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr

from sedd.errors import warn_user
from sedd.io import pack, tables
from sedd.io.files import new_file, save_arrays
from sedd.io.gathered import Gathered
from sedd.io.h5ad import Matrix
from sedd.io.parts import Plan, load_plan, part_path
from sedd.io.run import TaskRunner
from sedd.io.shards import CHUNK, SHARD, Encoder, create_vector, n_shards, shard_length, write_shard
from sedd.io.store import CellStore, forget, span_hashes

CHECK_VALUES = 1 << 22
"""Entries read back at once when the finished store is checked."""


def widen_part(folder: str, number: int, dtype: str) -> None:
    """Encode the values of a part again in a wider type, which another part turned out to need."""
    plan, stem = load_plan(folder), part_path(folder, number)
    with np.load(f"{stem}.npz") as meta:
        arrays = dict(meta)
    old = Encoder(arrays["data_edges"].dtype, plan.settings["codec"])
    new = Encoder(np.dtype(dtype), plan.settings["codec"])
    with open(f"{stem}.data", "rb") as source, new_file(f"{stem}.{dtype}") as target:
        sizes = [target.write(new.encode(old.decode(source.read(int(size))))) for size in arrays["data_sizes"]]
    # The old file stays: until the new .npz is there, it is the old file that counts.
    arrays |= {"data_edges": arrays["data_edges"].astype(dtype), "data_sizes": np.array(sizes, np.int64), "data_file": dtype}
    save_arrays(f"{stem}.npz", **arrays)


def build_shard(folder: str, name: str, number: int, target: str, n: int, own: tuple[int, int]) -> None:
    """Join the encoded chunks of parts `own[0]:own[1]` that lie in shard `number` of `X/name` into one file."""
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
            file = str(meta["data_file"]) if name == "data" and "data_file" in meta else name
        encoder = Encoder(edges.dtype, plan.settings["codec"])
        for edge, at in ((edges[:head], first), (None, first + head), (edges[head:], first + tail)):
            if edge is None:
                lo, hi = (int(np.clip((bound - at) // CHUNK, 0, sizes.size)) for bound in (begin, end + CHUNK - 1))
                if lo < hi:
                    with open(f"{stem}.{file}", "rb") as stream:
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


def build(folder: str, runner: TaskRunner, inputs: list[dict[str, str]], rounded: int) -> str:
    """Make the store from its parts in `folder`, and read it back; its path there.

    Parameters
    ----------
    inputs : what the store remembers of its inputs
    rounded : values rounded before the parts were made

    Raises
    ------
    OSError
        If what was written does not read back as what was gathered.
    """
    plan, root = load_plan(folder), f"{folder}/store"
    _keep_shards(root)
    gathered = Gathered(folder)
    gathered.rounded += rounded
    narrow = [k for k, dtype in enumerate(gathered.dtypes) if dtype != gathered.dtype]
    runner.run(widen_part, [(folder, k, gathered.dtype.name) for k in narrow], [0] * len(narrow), title="widen")
    group = zarr.open_group(root, mode="a", zarr_format=3)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    _create_matrix(group, gathered, plan)
    tasks = []
    for name in ("data", "indices"):
        for number in range(n_shards(gathered.n)):
            target = f"{root}/X/{name}/c/{number}"
            if not os.path.exists(target):
                tasks.append((folder, name, number, target, gathered.n, gathered.parts_of(number)))
    cells = gathered.n_obs / max(1, 2 * n_shards(gathered.n))
    runner.run(build_shard, tasks, [cells] * len(tasks), title="join")
    _write_indptr(root, gathered.row_nnz, plan)
    tables.write(group, folder, plan, gathered, inputs)
    _check(root, runner, gathered)
    return root


def _keep_shards(root: str) -> None:
    """Remove from an earlier attempt all but complete shards of data and indices."""
    for folder, _, names in os.walk(root):
        inside = os.path.relpath(folder, root)
        if inside not in (os.path.join("X", "data", "c"), os.path.join("X", "indices", "c")):
            for name in names:
                os.unlink(f"{folder}/{name}")
    for name in ("data", "indices"):
        os.makedirs(f"{root}/X/{name}/c", exist_ok=True)
        for file in os.listdir(f"{root}/X/{name}/c"):
            if not file.isdigit():
                os.unlink(f"{root}/X/{name}/c/{file}")
    for name in os.listdir(root):
        if name != "X":
            shutil.rmtree(f"{root}/{name}")


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
    encoder = Encoder(indptr.dtype, plan.settings["codec"])
    os.makedirs(f"{root}/X/indptr/c", exist_ok=True)
    for number in range(n_shards(indptr.size)):
        own = indptr[number * SHARD : (number + 1) * SHARD]
        chunks = [encoder.encode(own[k : k + CHUNK]) for k in range(0, own.size, CHUNK)]
        runs = ((chunk, np.array([len(chunk)])) for chunk in chunks)
        write_shard(f"{root}/X/indptr/c/{number}", runs, shard_length(indptr.size) // CHUNK)


def _check(root: str, runner: TaskRunner, gathered: Gathered) -> None:
    """Read the finished store back, checksums and all, and compare each cell with what was gathered from the input."""
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
    for array in (counts.values, indices.astype(kind)):
        encoder = Encoder(array.dtype, codec)
        n_bytes += sum(len(encoder.encode(array[k : k + CHUNK])) for k in range(0, array.size, CHUNK))
    size = max(1, (matrix.nnz and indices.size) or (hi - lo) * matrix.shape[1])
    return (time.perf_counter() - start) / size, n_bytes / size


