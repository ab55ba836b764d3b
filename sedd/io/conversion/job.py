"""One conversion from beginning to end: decide on the tasks, run them, publish the store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sedd.config import ConversionSettings
from sedd.errors import NotCountsError, UserError, warn_user
from sedd.io.conversion import inputs, shard, spill
from sedd.io.conversion.counts import dense_rows, index_dtype, to_counts
from sedd.io.conversion.genes import match_genes, read_gene_list, unique_names
from sedd.io.conversion.inputs import SAMPLE, Plan, explain, load_plan, row_of
from sedd.io.conversion.runner import TaskRunner
from sedd.io.files import fingerprint, only_writer, sync_tree
from sedd.io.format.shards import n_shards, shard_length
from sedd.io.h5ad import H5ad, Matrix

if TYPE_CHECKING:
    from sedd.io.store import CellStore  # what needs zarr, anndata or pandas is imported while the tasks run

LARGEST_BLOCK = 1 << 23
"""Stored values that a task reads at once at most; more does not make it more efficient."""

SAMPLES = 8
"""Places looked at to guess the type of the counts; shards made too narrow are encoded again."""

PARTS = 16
"""Parts of the spill in a shard, or more: those at its two ends are read again for its neighbours."""


class StoppedError(UserError):
    """The output cannot be written; what is done so far is kept for `--resume`."""

    def __init__(self, message: str, reason: OSError) -> None:
        super().__init__(message)
        self.reason = reason


class Job:
    """What is asked of one conversion; `run` does it.

    Parameters
    ----------
    paths, output : of the inputs and the store
    settings : of the conversion
    progress : show a bar
    """

    def __init__(self, paths: list[str], output: str, settings: ConversionSettings, *, progress: bool = True) -> None:
        if not paths:
            raise UserError("no input; expected one or several .h5ad files.")
        self.paths, self.output, self.folder = paths, output, f"{output}.partial"
        self.asked, self.settings = settings, {**settings.of_the_store(), "genes": read_gene_list(settings.genes)}
        for path in paths:
            H5ad(path).close()
        self.fingerprints = [fingerprint(path) for path in paths]
        self.runner = TaskRunner(
            workers=settings.workers,
            scheduler=settings.scheduler,
            slurm_workers=settings.slurm_workers,
            budget=settings.budget,
            progress=progress,
        )
        self._news: list[str] = []

    def made(self, store: CellStore) -> bool:
        """Whether `store` is what this conversion would make."""
        return bool(store.uns_sedd["inputs"] == self.records() and store.uns_sedd["settings"] == self.settings)

    def records(self) -> list[dict[str, str]]:
        """Return what the store remembers of its inputs."""
        named = zip(self.paths, self.fingerprints, strict=True)
        return [{"path": path if "://" in path else os.path.abspath(path), "fingerprint": f} for path, f in named]

    def run(self, *, resume: bool, overwrite: bool, wait: bool = False) -> CellStore:
        """Convert, and open the result.

        Parameters
        ----------
        resume : go on with an unfinished conversion
        overwrite : replace a store or an unfinished conversion
        wait : wait for another writer of the same output, and use its result if it is the same
        """
        parent = os.path.dirname(os.path.abspath(self.output))
        if not os.path.isdir(parent):
            raise UserError(f"{parent}: there is no such directory to write {os.path.basename(self.output)} in.")
        with only_writer(self.folder, output=self.output, wait=wait):
            if os.path.exists(self.output):
                if (resume or wait) and (store := self._finished()):
                    self._clear()
                    return store
                if not overwrite:
                    raise UserError(f"{self.output}: exists already. Pass --overwrite to replace it, or choose another name.")
                check_replaceable(self.output)
            plan = self._earlier_plan(resume, overwrite)
            try:
                return self._convert(plan)
            except StoppedError as error:  # while a layer was converted
                raise self._stopped(error.reason) from error
            except UserError:
                self._clear()
                raise
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted; go on with --resume, or delete {self.folder}") from None
            except OSError as error:
                raise self._stopped(error) from error
            finally:
                inputs.close_inputs()
                spill.close_spill()
                self.runner.close()

    def _stopped(self, reason: OSError) -> StoppedError:
        return StoppedError(
            f"{self.output}: cannot be written ({reason.strerror or reason}). What is done so far is in "
            f"{self.folder}: make room and go on with --resume, or delete it.",
            reason,
        )

    def _finished(self) -> CellStore | None:
        from sedd.io.store import CellStore

        try:
            store = CellStore(self.output)
        except UserError:
            return None
        return store if self.made(store) else None

    def _clear(self) -> None:
        """Remove what is unfinished; the lock goes last, with the folder, when it is let go."""
        for name in os.listdir(self.folder):
            path = f"{self.folder}/{name}"
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
            elif name != "lock":
                os.unlink(path)

    def _earlier_plan(self, resume: bool, overwrite: bool) -> Plan | None:
        """Return the plan of an unfinished conversion that we can go on with."""
        inputs.close_inputs()
        spill.close_spill()
        if not os.path.exists(f"{self.folder}/plan.json"):
            self._clear()
            return None
        if resume:
            try:
                plan = load_plan(self.folder)
                same_input = list(plan.fingerprints) == self.fingerprints
                if same_input and plan.settings == self.settings:
                    return plan
                changed = "the settings differ" if same_input else "the input changed"
            except (TypeError, ValueError):
                changed = "another version of sedd began it"
            if not overwrite:
                raise UserError(f"{self.folder}: cannot be resumed, {changed}. Pass --overwrite to start again.")
        elif not overwrite:
            raise UserError(
                f"{self.folder}: holds an unfinished conversion. Pass --resume to go on with it or --overwrite to start again."
            )
        inputs.close_inputs()
        self._clear()
        return None

    def _convert(self, plan: Plan | None) -> CellStore:
        if plan is None:
            plan = self._plan(direct_allowed=True)
        try:
            notes = self._make_shards(plan)
        except shard.UntidyError:
            warn_user(f"{self.paths[0]}: has stored zeros, or unsorted or repeated indices: dropped, sorted and summed.")
            self._clear()
            plan = self._plan(direct_allowed=False)
            notes = self._make_shards(plan)
        from sedd.io.conversion import publish, tables
        from sedd.io.conversion.statistics import Gathered

        if notes["summed"]:
            warn_user(f"{self.paths[0]}: {notes['summed']} entries repeat a cell and gene; they were summed.")
        gathered = Gathered(self.folder, plan)
        gathered.rounded += notes["rounded"]
        group = publish.open_begun(self.folder)
        publish.build(group, self.folder, self.runner, gathered, plan)
        self._keep_layers()
        tables.write_added(group, plan, gathered, self.records())
        publish.check(self.folder, self.runner, gathered)
        for path, known in zip(self.paths, self.fingerprints, strict=True):
            if fingerprint(path) != known:
                raise UserError(f"{path}: changed while it was converted. Convert it again.")
        sync_tree(f"{self.folder}/store")
        if os.path.exists(self.output):
            os.rename(self.output, f"{self.folder}/replaced")
        os.rename(f"{self.folder}/store", self.output)
        self._clear()
        store = publish.CellStore(self.output)
        publish.report(store, self.paths[0] if len(self.paths) == 1 else self.output)
        return store

    def _keep_layers(self) -> None:
        """Convert each layer to keep like an X of its own, and take its matrix into the store."""
        for number, name in enumerate(self.settings["keep_layers"]):
            output = f"{self.folder}/layer-{number}.zarr"
            try:
                self._layer_job(name, output, "counts").run(resume=True, overwrite=True)
            except NotCountsError:
                self._layer_job(name, output, "real").run(resume=True, overwrite=True)
            os.rename(f"{output}/X", f"{self.folder}/store/layers/{name}")

    def _layer_job(self, name: str, output: str, values: Literal["counts", "real"]) -> Job:
        asked = replace(
            self.asked, layer=name, values=values, keep_layers=(), scheduler=self.runner.scheduler, slurm_workers=0
        )
        job = Job(self.paths, output, asked, progress=self.runner.progress)
        job.settings["obs"] = []  # the matrix is all that is wanted of it
        return job

    def open_inputs(self, stack: ExitStack) -> list[tuple[H5ad, Matrix]]:
        """Open the inputs, closed with `stack`; refuses empty ones."""
        opened = []
        for path in self.paths:
            file = stack.enter_context(H5ad(path))
            matrix = file.matrix(self.settings["layer"], self.settings["raw"])
            for name in self.settings["keep_layers"]:
                file.matrix(name)
            for count, what in zip(matrix.shape, ("cells", "genes"), strict=True):
                if count == 0:
                    raise UserError(f"{path}: has no {what}; there is nothing to convert.")
            opened.append((file, matrix))
        return opened

    def _plan(self, direct_allowed: bool) -> Plan:
        """Decide on the parts and write the plan."""
        with ExitStack() as stack:
            opened = self.open_inputs(stack)
            matrices = [matrix for _, matrix in opened]
            names = [unique_names(file.path, file.var_names(self.settings["raw"])) for file, _ in opened]
            genes, maps = match_genes(self.paths, names, self.settings["join"], self.settings["genes"])
            narrow = max((self.sample(*both) for both in opened), key=lambda dtype: dtype.itemsize)
            offsets = np.concatenate([[0], np.cumsum([matrix.shape[0] for matrix in matrices])])
            n_obs = min(int(offsets[-1]), self.settings["limit_cells"] or int(offsets[-1]))
            tidy = all(matrix.layout == "csr" for matrix in matrices) and all(new is None for new in maps)
            direct = direct_allowed and tidy and not self.settings["shuffle"]
            block = self.block(matrices, len(genes))
            spans = [
                (number, lo, min(hi, n_obs - int(offsets[number])) if matrix.layout != "csc" else hi)
                for number, matrix in enumerate(matrices)
                for lo, hi in matrix.spans(block)
                if not direct and (matrix.layout == "csc" or offsets[number] + lo < n_obs)
            ]
            expected = sum(matrix.nnz if matrix.nnz is not None else matrix.shape[0] * matrix.shape[1] for matrix in matrices)
            part = min(block, shard_length(expected) // PARTS)
            step = max(1, int(int(offsets[-1]) * part / max(1, expected)))
            taken = [int(matrix.indptr[int(np.clip(n_obs - offset, 0, matrix.shape[0]))])
                     for matrix, offset in zip(matrices, offsets, strict=False)] if direct else []  # fmt: skip
        for folder in ("shards", "spill"):
            os.makedirs(f"{self.folder}/{folder}", exist_ok=True)
        for number, new in enumerate(maps):
            if new is not None:
                np.save(f"{self.folder}/genes-{number}.npy", new)
        if self.settings["shuffle"] or (n_obs < offsets[-1] and not direct):
            places = np.full(int(offsets[-1]), -1, np.int64)
            shuffled = self.settings["shuffle"]
            order = np.random.default_rng(self.settings["seed"]).permutation(n_obs) if shuffled else np.arange(n_obs)
            places[order] = np.arange(n_obs)
            np.save(f"{self.folder}/places.npy", places)
        plan = Plan(
            sources=tuple((path, self.settings["layer"], self.settings["raw"]) for path in self.paths),
            fingerprints=tuple(self.fingerprints),
            settings=self.settings,
            n_obs=n_obs,
            n_vars=len(genes),
            direct=direct,
            narrow=narrow.name,
            block=block,
            spans=tuple(spans),
            step=step,
            offsets=tuple(int(n) for n in offsets),
            entries=tuple(int(n) for n in np.concatenate([[0], np.cumsum(taken, dtype=np.int64)])),
        )
        plan.save(self.folder)
        return plan

    def sample(self, file: H5ad, matrix: Matrix) -> np.dtype[Any]:
        """Look at some values: refuse what is no count, guess the type that holds them."""
        if matrix.layout == "dense":
            indptr, indices, raw = dense_rows(matrix.read_dense(0, min(max(1, SAMPLE // matrix.shape[1]), matrix.shape[0])))
        else:
            indptr, indices, raw = matrix.read_major(*matrix.spans(SAMPLE)[0])
        narrow = np.dtype(np.uint8)
        if self.settings["values"] == "real":
            return narrow
        counts = to_counts(raw, narrow)
        if counts.bad >= 0:
            raise NotCountsError(explain(file, matrix, raw, counts.bad, lambda k: _place(matrix, indptr, indices, k)))
        kinds = [counts.values.dtype]
        for at in range(0, matrix.nnz or 0, max(SAMPLE, (matrix.nnz or 0) // SAMPLES)):
            counts = to_counts(matrix.data.read(at, min(at + SAMPLE, matrix.nnz or 0)), narrow)
            kinds += [counts.values.dtype] * (counts.bad < 0)  # what is no count is named when its turn comes
        return max(kinds, key=lambda dtype: dtype.itemsize)

    def block(self, matrices: list[Matrix], n_vars: int) -> int:
        """Return the stored values that one task may hold: half the budget, by what an entry takes from file to shard."""
        stored = max(m.dtype.itemsize + (m.indices.dtype.itemsize if m.layout != "dense" else 8) for m in matrices)
        return int(min(LARGEST_BLOCK, self.asked.budget / 2 / self.runner.workers / (stored + 4 * (index_dtype(n_vars).itemsize + 4))))

    def _make_shards(self, plan: Plan) -> dict[str, int]:
        """Run the tasks that are not done, and write the tables meanwhile; values "rounded" and entries "summed" by the spill."""
        notes = {"rounded": 0, "summed": 0}
        write_tables: Callable[[], None] | None = self._write_tables
        if not plan.direct:
            todo = [k for k in range(len(plan.spans)) if not os.path.exists(f"{spill.span_path(self.folder, k)}.npz")]
            tasks = [(self.folder, k) for k in todo]
            sizes = [plan.n_obs / len(plan.spans)] * len(todo)
            self.runner.run(spill.scatter_span, tasks, sizes, title="read", meanwhile=write_tables)
            notes = spill.index_spans(self.folder, plan)
            write_tables = None
        number = n_shards(shard.n_entries(self.folder, plan))
        todo = [k for k in range(number) if not os.path.exists(shard.result_path(self.folder, k))]
        sizes = [plan.n_obs / max(1, number)] * len(todo)
        self.runner.run(shard.make_shard, [(self.folder, k) for k in todo], sizes, title="convert", meanwhile=write_tables)
        for message in self._news:  # now that no other thread has a hand in the warnings of the process
            warn_user(message)
        return notes

    def _write_tables(self) -> None:
        from sedd.io.conversion import publish, tables

        self._news = tables.write(publish.begin(self.folder), self.folder, load_plan(self.folder))

    def forecast(self) -> str:
        """Return what the conversion would do, as text: sizes, types, bytes and a time measured on a sample."""
        from sedd.io.conversion import publish

        with ExitStack() as stack:
            opened = self.open_inputs(stack)
            names = [unique_names(file.path, file.var_names(self.settings["raw"])) for file, _ in opened]
            genes, _ = match_genes(self.paths, names, self.settings["join"], self.settings["genes"])
            lines = [
                f"{file.path}: {m.name} is {m.layout} {m.dtype}, {m.shape[0]:,} cells x {m.shape[1]:,} genes"
                for file, m in opened
            ]
            n_obs = sum(matrix.shape[0] for _, matrix in opened)
            stored = sum(m.nnz if m.nnz is not None else m.shape[0] * m.shape[1] for _, m in opened)
            narrow = max((self.sample(*both) for both in opened), key=lambda dtype: dtype.itemsize)
            seconds, n_bytes = publish.rehearse(opened[0][1], narrow, self.settings["codec"])
            if self.settings["values"] == "real":
                narrow = np.dtype(np.float32)
        n_obs = min(n_obs, self.settings["limit_cells"] or n_obs)
        if self.settings["keep_layers"]:
            lines.append(f"kept beside it, each converted in the same way: {', '.join(self.settings['keep_layers'])}")
        passes = 1 if all(m.layout == "csr" for _, m in opened) and not self.settings["shuffle"] else 2
        lines += [
            f"{self.output}: {n_obs:,} cells x {len(genes):,} genes, {'at most ' if passes == 2 else ''}{stored:,} non-zeros",
            f"  values as {narrow.name} or wider, genes as {index_dtype(len(genes)).name}, codec {self.settings['codec']}",
            f"  about {n_bytes * stored / 1e6:,.0f} MB, about {passes * seconds * stored / self.runner.workers:,.0f} s "
            f"with {self.runner.workers} workers",
        ]
        return "\n".join(lines)


def check_replaceable(path: str) -> None:
    """Refuse to replace a directory that is no Zarr store: a slip of the hand must not cost anybody their files."""
    if not os.path.isdir(path) or not any(os.path.exists(f"{path}/{name}") for name in ("zarr.json", ".zgroup")):
        if os.path.isdir(path) and not os.listdir(path):
            return
        raise UserError(f"{path}: is not a Zarr store, so it is not replaced. Choose another output.")


def _place(matrix: Matrix, indptr: np.ndarray, indices: np.ndarray, k: int) -> tuple[int, int]:
    major, minor = row_of(indptr, k), int(indices[k])
    return (minor, major) if matrix.layout == "csc" else (major, minor)


