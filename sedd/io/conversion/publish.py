"""The last steps of a conversion: bring shards to one type, put them into the store, check the whole."""

from __future__ import annotations

import os
import shutil

import numpy as np
import zarr

from sedd.errors import warn_user
from sedd.io.conversion.counts import TOLERANCE, index_dtype
from sedd.io.conversion.inputs import Plan
from sedd.io.conversion.runner import TaskRunner
from sedd.io.conversion.shard import array_path, widen_shard
from sedd.io.conversion.statistics import Gathered
from sedd.io.files import new_file
from sedd.io.format.shards import CHUNK, Encoder, Pen, create_vector, n_shards, shard_length
from sedd.io.store import CellStore, close_stores, span_hashes

CHECK_VALUES = 1 << 20
"""Entries read back at once when the finished store is checked."""


def open_cleared(plan: Plan) -> zarr.Group:
    """Open the unfinished store, keeping from an earlier attempt nothing but complete shards of data and indices."""
    root = f"{plan.folder}/store"
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
    group = open_unfinished(plan)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    return group


def open_unfinished(plan: Plan) -> zarr.Group:
    """Return the unfinished store."""
    return zarr.open_group(f"{plan.folder}/store", mode="a", zarr_format=3)


def build(group: zarr.Group, plan: Plan, runner: TaskRunner, gathered: Gathered) -> None:
    """Make X in `group` from the shards."""
    narrow = [k for k, dtype in enumerate(gathered.dtypes) if dtype != gathered.dtype]
    runner.run(widen_shard, [(plan.folder, k, gathered.dtype.name) for k in narrow], [0] * len(narrow), title="widen")
    for name, dtype in (("data", gathered.dtype), ("indices", index_dtype(plan.n_vars))):
        for number in range(n_shards(gathered.n)):
            made = array_path(plan, number, name, dtype)
            if os.path.exists(made):  # an earlier attempt may have come further
                os.replace(made, f"{plan.folder}/store/X/{name}/c/{number}")
    _create_matrix(group, gathered, plan)
    _write_indptr(gathered.row_nnz, plan)


def _create_matrix(group: zarr.Group, gathered: Gathered, plan: Plan) -> None:
    matrix = group.create_group("X")
    matrix.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [gathered.n_obs, plan.n_vars]}
    )
    codec = plan.settings["codec"]
    create_vector(matrix, "indptr", gathered.n_obs + 1, np.dtype(np.int64), codec)
    create_vector(matrix, "indices", gathered.n, index_dtype(plan.n_vars), codec)
    create_vector(matrix, "data", gathered.n, gathered.dtype, codec)


def _write_indptr(row_nnz: np.ndarray, plan: Plan) -> None:
    folder = f"{plan.folder}/store/X/indptr/c"
    indptr = np.concatenate([[0], np.cumsum(row_nnz, dtype=np.int64)])
    encoder = Encoder("indptr", indptr.dtype, plan.settings["codec"])
    os.makedirs(folder, exist_ok=True)
    length = shard_length(indptr.size)
    for number in range(n_shards(indptr.size)):
        with new_file(f"{folder}/{number}") as file:
            pen = Pen(file, encoder, length // CHUNK)
            pen.write(indptr[number * length : (number + 1) * length])
            pen.finish()


def check(plan: Plan, runner: TaskRunner, gathered: Gathered) -> None:
    """Read the finished store back, checksums and all, and compare each cell with what was gathered from the input.

    Raises
    ------
    OSError
        If what was written does not read back as what was gathered.
    """
    root = f"{plan.folder}/store"
    close_stores()
    store = CellStore(root)
    spans = store.spans(CHECK_VALUES)
    hashes = runner.run(span_hashes, [(root, *span) for span in spans], [hi - lo for lo, hi in spans], title="check")
    for (lo, hi), found in zip(spans, hashes, strict=True):
        wrong = np.flatnonzero(found != gathered.hashes[lo:hi])
        if wrong.size:
            raise OSError(f"cell {lo + wrong[0]} reads back differently from what was written")


def report(store: CellStore, where: str) -> None:
    """One line for each thing that the user should know of the input."""
    rounded = store.uns_sedd["rounded"]
    if rounded:
        meant = store.uns_sedd["settings"]["round"]
        what = "values were fractions and were rounded; those below a half are now 0" if meant else f"values were within {TOLERANCE} of an integer and were rounded"
        warn_user(f"{where}: {rounded} {what}.")
    empty = int((np.diff(store.indptr) == 0).sum())
    if empty:
        warn_user(f"{where}: {empty} of {store.n_obs} cells have no counts; they were kept.")
    unseen = int((store.gene_stats()["nnz"] == 0).sum())
    if unseen:
        warn_user(f"{where}: {unseen} of {store.n_vars} genes are never seen; they were kept.")
