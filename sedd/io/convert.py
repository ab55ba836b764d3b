"""`.h5ad` files to a store, as a Dask graph in bounded memory, never half-written.

    inputs --direct_part-----------------------> parts --build_shard--> shards --rename--> OUTPUT.zarr
       \\--scatter_window--> spill --gather_part--/

The tasks are in `parts.py`, the last steps in `finish.py`; here is what decides on them and runs them. Everything unfinished is in
`OUTPUT.zarr.partial`, which `resume` goes on from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import zarr

import sedd
from sedd.errors import UserError, warn_user
from sedd.io import finish, genes, pack, parts
from sedd.io.h5ad import H5ad, Matrix
from sedd.io.locking import writing
from sedd.io.parts import NotCanonicalError, Plan
from sedd.io.run import run_tasks
from sedd.io.shards import SHARD, check_codec, n_shards
from sedd.io.store import FORMAT, CellStore
from sedd.io.values import SAMPLE, explain
from sedd.io.verify import check_shard, shard_path

DEFAULT_CODEC = "lz4"


def convert(
    inputs: str | os.PathLike[str] | list[str],
    output: str | os.PathLike[str],
    *,
    layer: str | None = None,
    raw: bool = False,
    join: str = "inner",
    genes: str | os.PathLike[str] | list[str] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    codec: str = DEFAULT_CODEC,
    memory_budget: str | int = "1GiB",
    workers: int | None = None,
    scheduler: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    obs: list[str] | None = None,
    values: str = "counts",
    progress: bool = True,
    limit_cells: int | None = None,
) -> CellStore | None:
    """Convert one or several `.h5ad` to a store.

    Parameters
    ----------
    inputs : path or paths (local, or URLs that fsspec opens)
    output : path of the store, `*.zarr`
    layer, raw : take `layers[layer]` or `.raw.X` in place of `X`
    join : of several inputs' genes, "inner" or "outer"
    genes : keep only these, a list or a file with one a line
    shuffle : permute all cells of all inputs; `obs["sedd_cell"]` keeps where each was
    seed : of the permutation
    codec : one of `sedd.io.shards.CODECS`
    memory_budget : of all workers together, "1GiB" or bytes
    workers : threads, by default one per core
    scheduler : address of a Dask scheduler whose workers see the same files
    resume : go on with an unfinished conversion
    overwrite : replace a store, or an unfinished conversion
    dry_run : print what would be done, and return None
    obs : columns of `obs` to keep, all by default
    values : "counts", or "real" for float32 of any sign
    progress : show a bar
    limit_cells : take only the first so many cells

    Returns
    -------
    store : the open store

    Raises
    ------
    UserError
        For bad input, in one line; nothing is left behind.
    """
    paths = [str(inputs)] if isinstance(inputs, str | os.PathLike) else [str(path) for path in inputs]
    job = Job(
        paths, str(output).rstrip("/"), layer=layer, raw=raw, join=join, genes=genes, shuffle=shuffle, seed=seed,
        codec=check_codec(codec), budget=parse_bytes(memory_budget), workers=workers or len(os.sched_getaffinity(0)),
        scheduler=scheduler, obs=obs, values=values, progress=progress, limit_cells=limit_cells,
    )  # fmt: skip
    if dry_run:
        print(job.forecast())
        return None
    return job.run(resume=resume, overwrite=overwrite)


def ensure_store(
    path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    layer: str | None = None,
    values: str = "counts",
    progress: bool = True,
) -> CellStore:
    """Open a store, converting an `.h5ad` once and using the result while the file stays as it is.

    Parameters
    ----------
    path : a `.zarr` store, opened as it is, or an `.h5ad`
    cache_dir : where the store is put, by default beside the file
    layer, values : as in `convert`
    """
    path = str(path).rstrip("/")
    if path.endswith(".zarr") or os.path.isdir(path):
        return CellStore(path)
    if not os.path.exists(path) and "://" not in path:
        raise UserError(f"{path}: there is no such file.")
    folder = str(cache_dir) if cache_dir is not None else os.path.dirname(path) or "."
    name = os.path.basename(path).removesuffix(".h5ad")
    suffix = (f".{layer}" if layer else "") + (".real" if values == "real" else "")
    output = os.path.join(folder, f"{name}{suffix}.zarr")
    if cache_dir is not None:
        os.makedirs(folder, exist_ok=True)
    job = Job([path], output, layer=layer, values=values, progress=progress)
    with writing(output, wait=True):  # another rank or run may be making the same store
        if os.path.exists(output):
            store = CellStore(output)
            if store.uns_sedd["inputs"] == [job.record(0)] and store.uns_sedd["settings"] == job.settings:
                return store
        return job.run(resume=True, overwrite=True, locked=True)


def parse_bytes(text: str | int) -> int:
    """Bytes of "1GiB", "500 MB" or a number.

    Raises
    ------
    UserError
        If it is no size, or under 64 MiB.
    """
    from dask.utils import parse_bytes as parse

    try:
        size = int(parse(text))
    except ValueError as error:
        raise UserError(f"the memory budget {text!r} is not a size; write 1GiB or 500MB.") from error
    if size < 64 << 20:
        raise UserError(f"the memory budget is {text}; at least 64MiB are needed.")
    return size


def fingerprint(path: str) -> str:
    """Identity of a file: size, time of change, and a hash of samples of its bytes."""
    if "://" in path:
        import fsspec

        fs, name = fsspec.core.url_to_fs(path)
        info = fs.info(name)
        text = f"{info['size']} {info.get('ETag') or info.get('LastModified') or info.get('mtime')}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    stat = os.stat(path)
    digest = hashlib.blake2b(f"{stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=16)
    with open(path, "rb") as file:
        for place in np.linspace(0, max(0, stat.st_size - (1 << 16)), 16).astype(int):
            file.seek(int(place))
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


class Job:
    """One conversion: what is asked for, and the steps."""

    def __init__(
        self,
        paths: list[str],
        output: str,
        *,
        layer: str | None = None,
        raw: bool = False,
        join: str = "inner",
        genes: str | os.PathLike[str] | list[str] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        codec: str = DEFAULT_CODEC,
        budget: int = 1 << 30,
        workers: int | None = None,
        scheduler: str | None = None,
        obs: list[str] | None = None,
        values: str = "counts",
        progress: bool = True,
        limit_cells: int | None = None,
    ) -> None:
        if not paths:
            raise UserError("no input; expected one or several .h5ad files.")
        if values not in ("counts", "real"):
            raise UserError(f"values must be counts or real, not {values!r}.")
        self.paths, self.output, self.folder = paths, output, f"{output}.partial"
        self.budget, self.workers, self.scheduler, self.progress = (
            budget, workers or len(os.sched_getaffinity(0)), scheduler, progress
        )  # fmt: skip
        wanted = _gene_list(genes)
        self.settings: dict[str, Any] = {
            "layer": layer, "raw": raw, "join": join, "genes": wanted, "shuffle": shuffle, "seed": seed if shuffle else 0,
            "codec": codec, "obs": obs, "values": values, "limit_cells": limit_cells,
        }  # fmt: skip
        for path in paths:
            H5ad(path).close()
        self.fingerprints = [fingerprint(path) for path in paths]

    def record(self, number: int) -> dict[str, Any]:
        """What the store remembers of an input."""
        return {"path": os.path.abspath(self.paths[number]), "fingerprint": self.fingerprints[number]}

    def forecast(self) -> str:
        """What the conversion would do, as text."""
        with ExitStack() as stack:
            matrices = [m for _, m in self._open(stack)]
            n_obs = sum(matrix.shape[0] for matrix in matrices)
            nnz = sum(m.nnz if m.nnz is not None else m.shape[0] * m.shape[1] for m in matrices)
            lines = [f"{p}: {m.name}, {m.shape[0]} cells x {m.shape[1]} genes, {m.layout} {m.dtype}"
                     for p, m in zip(self.paths, matrices, strict=True)]  # fmt: skip
        return "\n".join([*lines, f"{self.output}: {n_obs} cells, up to {nnz} non-zeros"])

    def run(self, *, resume: bool, overwrite: bool, locked: bool = False) -> CellStore:
        """Convert, and open the result."""
        parent = os.path.dirname(os.path.abspath(self.output))
        if not os.path.isdir(parent):
            raise UserError(f"{parent}: there is no such directory to write {os.path.basename(self.output)} in.")
        if os.path.exists(self.output) and not overwrite:
            raise UserError(f"{self.output}: exists already. Pass --overwrite to replace it, or choose another name.")
        with ExitStack() as stack:
            if not locked:
                stack.enter_context(writing(self.output, wait=False))
            try:
                return self._run(resume, overwrite)
            except OSError as error:
                raise UserError(
                    f"{self.output}: cannot be written ({error.strerror or error}). What is done so far is in "
                    f"{self.folder}: make room and go on with --resume, or delete it."
                ) from error
            except UserError:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            finally:
                parts.forget()

    def _run(self, resume: bool, overwrite: bool) -> CellStore:
        parts.forget()
        plan = self._earlier_plan(resume, overwrite)
        if plan is None:
            with ExitStack() as stack:
                opened = self._open(stack)
                plan = self._plan(opened, direct_allowed=True)
        try:
            self._make_parts(plan)
        except NotCanonicalError:
            warn_user(f"{self.paths[0]}: stores zeros, or indices unsorted or repeated; sorted, summed and dropped.")
            self._clear()
            with ExitStack() as stack:
                plan = self._plan(self._open(stack), direct_allowed=False)
            parts.forget()
            self._make_parts(plan)
        return self._finish(plan)

    def _earlier_plan(self, resume: bool, overwrite: bool) -> Plan | None:
        """The plan of an unfinished conversion that we can go on with."""
        if not os.path.isdir(self.folder):
            return None
        plan = None
        if resume and os.path.exists(f"{self.folder}/plan.json"):
            plan = parts.load_plan(self.folder)
            if list(plan.fingerprints) == self.fingerprints and plan.settings == self.settings:
                return plan
            if not overwrite:
                changed = "the input changed" if list(plan.fingerprints) != self.fingerprints else "the settings differ"
                raise UserError(f"{self.folder}: cannot be resumed, {changed}. Pass --overwrite to start again.")
        elif not resume and not overwrite:
            raise UserError(
                f"{self.folder}: holds an unfinished conversion. Pass --resume to go on with it or --overwrite to start again."
            )
        parts.forget()
        self._clear()
        return None

    def _clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, stack: ExitStack) -> list[tuple[H5ad, Matrix]]:
        opened = []
        for path in self.paths:
            file = stack.enter_context(H5ad(path))
            matrix = file.matrix(self.settings["layer"], self.settings["raw"])
            for count, what in zip(matrix.shape, ("cells", "genes"), strict=True):
                if count == 0:
                    raise UserError(f"{path}: has no {what}; there is nothing to convert.")
            opened.append((file, matrix))
        return opened

    def _plan(self, opened: list[tuple[H5ad, Matrix]], direct_allowed: bool) -> Plan:
        """Decide on the parts and write the plan."""
        os.makedirs(f"{self.folder}/parts", exist_ok=True)
        os.makedirs(f"{self.folder}/spill", exist_ok=True)
        names = [genes.unique_names(file.path, file.var(self.settings["raw"]).index) for file, _ in opened]
        index, maps = genes.match_genes(self.paths, names, self.settings["join"], self.settings["genes"])
        n_cells = [matrix.shape[0] for _, matrix in opened]
        offsets = np.concatenate([[0], np.cumsum(n_cells)])
        n_obs = int(offsets[-1])
        for number, new in enumerate(maps):
            if new is not None:
                np.save(f"{self.folder}/genes-{number}.npy", new)
        if self.settings["shuffle"]:
            order = np.random.default_rng(self.settings["seed"]).permutation(n_obs)
            places = np.empty(n_obs, np.int64)
            places[order] = np.arange(n_obs)
            np.save(f"{self.folder}/places.npy", places)
        direct = direct_allowed and not self.settings["shuffle"] and all(new is None for new in maps)
        direct = direct and all(matrix.layout == "csr" for _, matrix in opened)
        narrow = max((self._sample(file, matrix) for file, matrix in opened), key=lambda dtype: dtype.itemsize)
        n_values = self._block([matrix for _, matrix in opened], len(index))
        spans = tuple((number, *span) for number, (_, m) in enumerate(opened) for span in m.spans(n_values))
        if direct:
            edges = [0, *(int(offsets[number]) + hi for number, _, hi in spans)]
        else:
            expected = sum(matrix.nnz if matrix.nnz is not None else matrix.shape[0] * matrix.shape[1] for _, matrix in opened)
            step = max(1, int(n_obs * n_values / max(1, expected)))
            edges = [*range(0, n_obs, step), n_obs]
        plan = Plan(
            sources=tuple((path, self.settings["layer"], self.settings["raw"]) for path in self.paths),
            fingerprints=tuple(self.fingerprints),
            settings=self.settings,
            n_vars=len(index),
            direct=direct,
            narrow=narrow.name,
            spans=spans,
            edges=tuple(edges),
            offsets=tuple(int(n) for n in offsets),
        )
        plan.save(self.folder)
        return plan

    def _sample(self, file: H5ad, matrix: Matrix) -> np.dtype[Any]:
        """Look at the first values: refuse what is no count, guess the type."""
        if matrix.layout == "dense":
            rows = max(1, SAMPLE // matrix.shape[1])
            indptr, indices, raw = pack.dense_rows(matrix.read_dense(0, min(rows, matrix.shape[0])))
        else:
            lo, hi = matrix.spans(SAMPLE)[0]
            indptr, indices, raw = matrix.read_major(lo, hi)
        if self.settings["values"] == "real":
            return np.dtype(np.uint8)
        counts = pack.to_counts(raw, np.dtype(np.uint8))
        if counts.bad >= 0:
            raise UserError(explain(file, matrix, raw, counts.bad, lambda k: _place(matrix, indptr, indices, k)))
        return counts.values.dtype

    def _block(self, matrices: list[Matrix], n_vars: int) -> int:
        """Stored values that one task may hold, given the budget."""
        widest = 0
        for matrix in matrices:
            stored = matrix.dtype.itemsize + (matrix.indices.dtype.itemsize if matrix.layout != "dense" else 8)
            widest = max(widest, stored + 4 * (pack.index_dtype(n_vars).itemsize + 4))
        return int(min(1 << 23, max(1 << 14, self.budget * 0.5 / self.workers / widest)))

    def _make_parts(self, plan: Plan) -> None:
        cells = np.diff(plan.edges)
        done = [os.path.exists(f"{parts.part_path(self.folder, k)}.npz") for k in range(plan.n_parts)]
        todo = [k for k in range(plan.n_parts) if not done[k]]
        if plan.direct:
            self._dask("convert", parts.direct_part, [(self.folder, k) for k in todo], [int(cells[k]) for k in todo])
            return
        if not todo:
            return
        left = [k for k in range(len(plan.spans)) if not os.path.exists(f"{parts.window_path(self.folder, k)}.npz")]
        sizes = [plan.spans[k][2] - plan.spans[k][1] for k in left]
        self._dask("read", parts.scatter_window, [(self.folder, k) for k in left], sizes)
        entries, largest = np.zeros(plan.n_parts, np.int64), 0
        for k in range(len(plan.spans)):
            with np.load(f"{parts.window_path(self.folder, k)}.npz") as meta:
                entries += np.diff(meta["entry_cuts"])
                largest = max(largest, int(meta["largest"]))
        first = np.concatenate([[0], np.cumsum(entries)])
        self._dask(
            "gather", parts.gather_part, [(self.folder, k, int(first[k]), largest) for k in todo], [int(cells[k]) for k in todo]
        )

    def _dask(self, title: str, task: Callable[..., Any], arguments: list[tuple[Any, ...]], cells: list[int]) -> None:
        run_tasks(task, arguments, cells, title=title, workers=self.workers, scheduler=self.scheduler, progress=self.progress)

    def _finish(self, plan: Plan) -> CellStore:
        """Join the parts, write the tables, check the whole, and give it its name."""
        gathered = finish.Gathered(self.folder)
        numbers = range(plan.n_parts)
        dtype = gathered.dtype.name
        widen = [(self.folder, k, dtype) for k in numbers if self.settings["values"] == "counts"]
        self._dask("widen", finish.widen_part, widen, [0] * len(widen))
        root = f"{self.folder}/store"
        os.makedirs(root, exist_ok=True)
        group = zarr.open_group(root, mode="a", zarr_format=3)
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        if "X" not in group:
            finish.create_matrix(group, gathered, plan.n_vars, self.settings["codec"])
        finish.write_indptr(root, gathered.row_nnz, self.settings["codec"])
        tasks = []
        for name in ("data", "indices"):
            os.makedirs(f"{root}/X/{name}/c", exist_ok=True)
            tasks += [(self.folder, name, k, shard_path(root, name, k), gathered.n) for k in range(n_shards(gathered.n))]
        self._dask("shards", finish.build_shard, tasks, [min(SHARD, gathered.n) // 2] * len(tasks))
        self._tables(group, plan, gathered)
        for name, dtype_, n in (("data", gathered.dtype, gathered.n), ("indices", pack.index_dtype(plan.n_vars), gathered.n)):
            for k in range(n_shards(n)):
                wrong = check_shard(root, name, k, dtype_, self.settings["codec"], n)
                if wrong:
                    raise OSError(f"what was written reads back wrong: {wrong}")
        for path, known in zip(self.paths, self.fingerprints, strict=True):
            if fingerprint(path) != known:
                raise UserError(f"{path}: changed while it was converted. Convert it again.")
        self._publish(root)
        self._report(gathered)
        return CellStore(self.output)

    def _publish(self, root: str) -> None:
        old = f"{self.folder}/old"
        if os.path.exists(self.output):
            os.rename(self.output, old)
        os.rename(root, self.output)
        self._clear()

    def _tables(self, group: zarr.Group, plan: Plan, gathered: finish.Gathered) -> None:
        with ExitStack() as stack:
            files = [file for file, _ in self._open(stack)]
            raw = self.settings["raw"]
            frames = [file.var(raw) for file in files]
            for file, frame in zip(files, frames, strict=True):
                frame.index = _quietly_unique(file.path, frame.index)
            index, _ = genes.match_genes(self.paths, [f.index for f in frames], self.settings["join"], self.settings["genes"])
            var = genes.join_var(frames, index)
            cells = genes.join_obs(
                [file.obs(self.settings["obs"]) for file in files], [file.mapping("obsm") for file in files], self.paths
            )
            uns = files[0].mapping("uns") if len(files) == 1 else {}
        if self.settings["shuffle"]:
            places = np.load(f"{self.folder}/places.npy")
            order = np.argsort(places)
            cells = cells[order].copy()
            cells.obs["sedd_cell"] = order
        meta = {
            "format": FORMAT, "sedd": sedd.__version__, "n_obs": int(gathered.row_nnz.size), "n_vars": plan.n_vars,
            "nnz": gathered.n, "values": self.settings["values"], "max_value": gathered.max, "codec": self.settings["codec"],
            "settings": self.settings, "inputs": [self.record(k) for k in range(len(self.paths))],
            "fingerprint": self._identity(gathered, var.index), "rounded": gathered.rounded,
        }  # fmt: skip
        added: dict[str, Any] = {
            "meta": json.dumps(meta),
            "cells": {"total": gathered.total, "n_genes": gathered.row_nnz, "max": gathered.largest, "hash": gathered.hashes},
            "genes": gathered.genes,
        }
        if gathered.histogram is not None:
            added["histogram"] = gathered.histogram
        finish.write_tables(group, cells, var, {**uns, "sedd": added})

    def _identity(self, gathered: finish.Gathered, names: pd.Index) -> str:
        text = json.dumps([gathered.content(), gathered.row_nnz.size, self.settings["values"], list(names)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _report(self, gathered: finish.Gathered) -> None:
        where = self.paths[0] if len(self.paths) == 1 else self.output
        if gathered.rounded:
            warn_user(f"{where}: {gathered.rounded} values were within {pack.TOLERANCE} of an integer and were rounded.")
        empty = int((gathered.row_nnz == 0).sum())
        if empty:
            warn_user(f"{where}: {empty} cells have no counts; they were kept.")
        unseen = int((gathered.genes["nnz"] == 0).sum())
        if unseen:
            warn_user(f"{where}: {unseen} of {gathered.genes['nnz'].size} genes are never seen; they were kept.")


def _place(matrix: Matrix, indptr: np.ndarray, indices: np.ndarray, k: int) -> tuple[int, int]:
    major, minor = int(np.searchsorted(indptr, k, side="right")) - 1, int(indices[k])
    return (minor, major) if matrix.layout == "csc" else (major, minor)


def _gene_list(source: Any) -> list[str] | None:
    return genes.read_gene_list(source)


def _quietly_unique(path: str, index: pd.Index) -> pd.Index:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return genes.unique_names(path, index)
