"""One conversion from beginning to end: decide on the tasks or resume those of before, run them, publish the store."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from sedd.config import ConversionSettings
from sedd.errors import ExistsError, NotCountsError, UserError, warn_user
from sedd.io.conversion import inputs, planning, shard, spill
from sedd.io.conversion.genes import noted_order, read_gene_list
from sedd.io.conversion.inputs import Plan, load_plan
from sedd.io.conversion.runner import TaskRunner
from sedd.io.files import sync_tree
from sedd.io.format.shards import n_shards
from sedd.io.input.opening import input_fingerprint, one_of, opened_as
from sedd.io.outputs import check_replaceable, clear, move_into_place, only_writer, partial_folder, remove_parts
from sedd.io.remote import is_remote
from sedd.options import recorded_path

if TYPE_CHECKING:
    from sedd.io.store import CellStore  # what needs zarr, anndata or pandas is imported while the tasks run


class UnfinishedError(UserError):
    """The output cannot be written; what is done so far is kept for `--resume`."""

    def __init__(self, message: str, reason: OSError) -> None:
        super().__init__(message)
        self.reason = reason


class Job:
    """What is asked of one conversion; `run` does it.

    Parameters
    ----------
    paths, output : of the inputs and the store
    asked : of the conversion
    progress : show a bar
    """

    def __init__(self, paths: list[str], output: str, asked: ConversionSettings, *, progress: bool = True) -> None:
        if not paths:
            raise UserError("no input; expected one or several files.")
        self.paths, self.output, self.folder = paths, output, partial_folder(output)
        self.asked, self.settings = asked, {**asked.of_the_store(), "genes": read_gene_list(asked.genes)}
        check_inputs(paths, output, asked)
        for path in paths:
            with one_of(paths):
                opened_as(path, self.settings).close()
        self.fingerprints = [input_fingerprint(path) for path in paths]
        self.runner = TaskRunner(
            workers=asked.workers, scheduler=asked.scheduler, slurm_workers=asked.slurm_workers, budget=asked.budget,
            progress=progress,
        )  # fmt: skip
        self._news: list[str] = []
        self._genes_are_said = False
        self._how = "with --resume"

    def made(self, store: CellStore) -> bool:
        """Whether `store` is what this conversion would make."""
        meta = store.uns_sedd
        # A store of before a setting existed was made as if with its default.
        made_with = {**ConversionSettings().of_the_store(), **meta["settings"]}
        return bool(meta["inputs"] == self.records() and made_with == self.settings)

    def records(self) -> list[dict[str, str]]:
        """Return what the store remembers of its inputs."""
        named = zip(self.paths, self.fingerprints, strict=True)
        return [{"path": recorded_path(path if "://" in path else os.path.abspath(path)), "fingerprint": f} for path, f in named]

    def forecast(self) -> str:
        """Return what the conversion would do, as text."""
        return planning.forecast(self.paths, self.output, self.settings, self.runner.workers)

    def run(self, *, resume: bool, overwrite: bool, wait: bool = False) -> CellStore:
        """Convert, and open the result.

        Parameters
        ----------
        resume : resume an unfinished conversion
        overwrite : replace a store or an unfinished conversion
        wait : wait for another writer of the same output, and use its result if it is the same
        """
        self._how = "by the same command" if wait else "with --resume"
        parent = os.path.dirname(os.path.abspath(self.output))
        if not os.path.isdir(parent):
            raise UserError(f"{parent}: there is no such directory to write {os.path.basename(self.output)} in.")
        with only_writer(self.output, wait=wait):
            if os.path.lexists(self.output):
                if (resume or wait) and (store := self._finished()):
                    self._clear()
                    return store
                if not overwrite:
                    raise ExistsError(f"{self.output}: exists already. Pass --overwrite to replace it, or choose another name.")
                check_replaceable(self.output, "store")
            plan = self._earlier_plan(resume, overwrite)
            try:
                return self._convert(plan or self._plan(direct_allowed=True))
            except UnfinishedError as error:  # while a layer was converted
                raise self._unfinished(error.reason) from error
            except UserError:
                self._clear()
                raise
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted; resume {self._how}, or delete {self.folder}") from None
            except OSError as error:
                raise self._unfinished(error) from error
            except Exception as error:  # memory that is too small, or a mistake of ours or of a library's
                if os.path.exists(f"{self.folder}/plan.json"):
                    error.add_note(f"What is done so far is in {self.folder}: resume {self._how}, or delete it.")
                raise
            finally:
                self._close()
                self.runner.close()

    def _unfinished(self, reason: OSError) -> UnfinishedError:
        return UnfinishedError(
            f"{self.output}: cannot be written ({reason.strerror or reason}). What is done so far is in "
            f"{self.folder}: make room and resume {self._how}, or delete it.",
            reason,
        )

    def _finished(self) -> CellStore | None:
        from sedd.io.store import CellStore

        try:
            store = CellStore(self.output)
        except UserError:
            return None
        return store if self.made(store) else None

    def _close(self) -> None:
        """Let go of the plan and the files that tasks in this process have opened."""
        inputs.close_inputs(self.folder)
        spill.close_spill()

    def _clear(self) -> None:
        """Remove what is unfinished; the lock goes last, with the folder, when it is let go."""
        self._close()
        clear(self.folder)

    def _earlier_plan(self, resume: bool, overwrite: bool) -> Plan | None:
        """Return the plan of an unfinished conversion that can be resumed."""
        if not os.path.exists(f"{self.folder}/plan.json"):
            self._clear()
            return None
        if resume:
            try:
                plan = load_plan(self.folder)
                same_input = list(plan.fingerprints) == self.fingerprints
                if same_input and plan.settings == self.settings:
                    for name in ("shards", "spill"):
                        remove_parts(f"{self.folder}/{name}")
                    return plan
                changed = "the settings differ" if same_input else "the input changed"
            except (TypeError, ValueError):
                changed = "another version of sedd made it"
            if not overwrite:
                raise UserError(f"{self.folder}: cannot be resumed, {changed}. Pass --overwrite to start again.")
        elif not overwrite:
            raise UserError(
                f"{self.folder}: holds an unfinished conversion. Pass --resume to resume it or --overwrite to start again."
            )
        self._clear()
        return None

    def _plan(self, *, direct_allowed: bool) -> Plan:
        memory = self.asked.budget / self.runner.workers
        aloud, self._genes_are_said = not self._genes_are_said, True
        return planning.make_plan(
            self.folder, self.paths, self.fingerprints, self.settings, memory=memory, direct_allowed=direct_allowed, aloud=aloud
        )

    def _convert(self, plan: Plan) -> CellStore:
        self._take_layers_back()
        where = self.paths[0] if len(self.paths) == 1 else f"one or several of the {len(self.paths)} inputs"
        try:
            notes = self._make_shards(plan)
        except shard.UntidyError:
            zeros = "values that are stored and 0 or round to 0" if self.settings["round"] else "stored zeros"
            warn_user(f"{where}: has {zeros}, or unsorted or repeated indices: dropped, sorted and summed.")
            self._clear()
            plan = self._plan(direct_allowed=False)
            notes = self._make_shards(plan)
        from sedd.io.conversion import publish, tables
        from sedd.io.conversion.statistics import Gathered

        if notes["summed"]:
            warn_user(f"{where}: {notes['summed']} entries repeat a cell and gene; they were summed.")
        gathered = Gathered(plan)
        gathered.rounded += notes["rounded"]
        group = publish.open_unfinished(plan)
        publish.build(group, plan, self.runner, gathered)
        self._keep_layers()
        tables.write_added(group, plan.settings, gathered, self.records(), lacking=tables.lacking(group, plan))
        publish.check(plan, self.runner, gathered)
        for path, known in zip(self.paths, self.fingerprints, strict=True):
            if input_fingerprint(path) != known:
                raise UserError(f"{path}: changed while it was converted. Convert it again.")
        sync_tree(f"{self.folder}/store")
        move_into_place(f"{self.folder}/store", self.output)
        self._clear()
        store = publish.CellStore(self.output)
        publish.report(store, self.paths[0] if len(self.paths) == 1 else self.output)
        return store

    def _make_shards(self, plan: Plan) -> dict[str, int]:
        """Run the tasks that are not done, and write the tables meanwhile; values "rounded" and entries "summed" by the spill."""
        notes = {"rounded": 0, "summed": 0}

        def write_tables() -> None:
            from sedd.io.conversion import publish, tables

            self._news = tables.write(publish.open_cleared(plan), plan)

        meanwhile: Callable[[], None] | None = write_tables
        if not plan.direct:
            todo = [k for k in range(len(plan.spans)) if not os.path.exists(f"{spill.span_path(plan, k)}.npz")]
            sizes = [plan.n_obs / len(plan.spans)] * len(todo)
            self.runner.run(spill.spill_span, [(self.folder, k) for k in todo], sizes, title="read", meanwhile=meanwhile)
            notes = spill.index_spans(plan)
            meanwhile = None
        number = n_shards(shard.n_entries(plan))
        todo = [k for k in range(number) if not os.path.exists(shard.result_path(plan, k))]
        sizes = [plan.n_obs / max(1, number)] * len(todo)
        self.runner.run(shard.make_shard, [(self.folder, k) for k in todo], sizes, title="convert", meanwhile=meanwhile)
        for message in self._news:  # now that no other thread has a hand in the warnings of the process
            warn_user(message)
        return notes

    def _layers(self) -> list[tuple[str, str, str]]:
        """Return of each layer to keep its name, the place of a store of its own, and its place in the store of all."""
        if not self.settings["keep_layers"]:
            return []
        from sedd.io.format.elements import free_names

        named = free_names(self.settings["keep_layers"], nested=False).items()
        return [(name, f"{self.folder}/layer-{k}.zarr", f"{self.folder}/store/layers/{new}") for k, (name, new) in enumerate(named)]

    def _take_layers_back(self) -> None:
        """Give each layer's store its matrix back, which an attempt that was stopped later has moved: then it is whole, and is used again."""
        for _, own, place in self._layers():
            if os.path.isdir(place) and os.path.isdir(own) and not os.path.exists(f"{own}/X"):
                os.rename(place, f"{own}/X")

    def _keep_layers(self) -> None:
        """Convert each layer to keep like an X of its own, and take its matrix into the store."""
        for name, output, place in self._layers():
            try:
                self._layer_job(name, output, "counts").run(resume=True, overwrite=True)
            except NotCountsError:
                self._layer_job(name, output, "real").run(resume=True, overwrite=True)
            os.rename(f"{output}/X", place)
            if os.path.basename(place) != name:
                warn_user(f"layer {name!r} is kept as {os.path.basename(place)!r}.")

    def _layer_job(self, name: str, output: str, values: Literal["counts", "real"]) -> Job:
        asked = replace(
            self.asked, layer=name, values=values, keep_layers=(), scheduler=self.runner.scheduler, slurm_workers=0
        )
        job = Job(self.paths, output, asked, progress=self.runner.progress)
        # The matrix is all that is wanted of it.
        genes = noted_order(self.folder) or self.settings["genes"]
        job.settings = {
            **self.settings, "layer": name, "values": values, "keep_layers": [], "obs": [], "genes": genes, "gene_order": "input",
        }  # fmt: skip
        job._genes_are_said = True
        return job


def check_inputs(paths: list[str], output: str, asked: ConversionSettings) -> None:
    """Refuse an input that is given twice or is the output as well, and names of inputs that are not as many as these."""
    known: dict[str, str] = {}
    for path in paths:
        own = path if is_remote(path) else os.path.realpath(path)
        if own in known:
            same = f"{path} and {known[own]} are the same input" if path != known[own] else f"{path}: is given twice"
            raise UserError(f"{same}; its cells would be taken twice. Give each input once.")
        known[own] = path
    if not is_remote(output) and os.path.realpath(output) in known:
        raise UserError(f"{output}: is an input; expected another name for the store that is made.")
    if asked.keys and len(asked.keys) != len(paths):
        raise UserError(f"--keys names {len(asked.keys)} inputs ({' '.join(asked.keys)}), but {len(paths)} are given; expected a name for each.")
