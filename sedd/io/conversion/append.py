"""Append cells to a store: its full shards stay the files that they are, what is new comes after them.

    inputs --Job--> added.zarr --extend_shard--> store --check, exchange--> OUTPUT.zarr
                       OUTPUT.zarr's shards --hard links--/

The grown store is made whole beside the old one, in `OUTPUT.zarr.partial`, and takes its place in one step. Whoever has the old
one open reads on: each shard has its old bytes at their old places, and one that was part-filled has more behind them.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import sedd
from sedd.config import ConversionSettings
from sedd.errors import MissingFileError, NotCountsError, UserError, warn_user
from sedd.io.conversion import planning
from sedd.io.conversion.extend import STEP, copy_rest, extend_shard, lay_out, matrices_of
from sedd.io.conversion.genes import LEAST_OVERLAP, match_inputs, name_hint
from sedd.io.conversion.job import Job, UnfinishedError, check_inputs
from sedd.io.conversion.runner import TaskRunner
from sedd.io.files import sync_tree, write_json
from sedd.io.format import shards
from sedd.io.format.elements import free_names
from sedd.io.format.reader import ChunkReader
from sedd.io.input.opening import input_fingerprint, opened_as
from sedd.io.outputs import clear, move_into_place, only_writer, partial_folder
from sedd.io.remote import is_remote
from sedd.io.store import CellStore, close_stores, span_hashes
from sedd.options import recorded_path

if TYPE_CHECKING:
    import pandas as pd

_OF_INPUTS = ("modality", "gene_names", "strip_version", "drop", "join")
"""Settings that say how inputs are read: the store's, unless what is appended needs others."""

_OWN = ("keys", "limit_cells")
"""Settings of the appended cells alone."""

_MEMBERS = {"X", "layers", "obs", "obsm", "obsp", "uns", "var", "varm", "varp"}
"""What a store may have if cells are to be appended to it."""


@dataclass
class _Tables:
    """What the grown store has beside its matrices, and what is to be said of it."""

    obs: pd.DataFrame
    names: list[str]
    """Of the new cells, as their files have them."""
    obsm: dict[str, Any]
    stale: list[str]
    news: list[str]
    column: str
    """Of obs, which says which input a cell is from."""
    inputs: list[str]
    """What it calls the new ones."""


class Append:
    """What is to be appended to one store; `run` does it.

    Parameters
    ----------
    paths, output : of the inputs and the store
    asked : of the conversion; what differs from its defaults must be what the store was made with
    progress : show a bar
    """

    def __init__(self, paths: list[str], output: str, asked: ConversionSettings, *, progress: bool = True) -> None:
        if not paths:
            raise UserError("no input; expected one or several files.")
        self.paths, self.asked, self.progress = paths, asked, progress
        self.shown = output
        self.output = os.path.realpath(output)  # a store that is a link stays one
        self.folder = partial_folder(self.output)
        check_inputs(paths, self.output, asked)

    # -- what is asked -------------------------------------------------------------------------------------------

    def forecast(self) -> str:
        """Return what would be done, as text."""
        store = CellStore(self.output)
        self._check(store)
        settings = {**self._settings(store), "genes": store.var_names.tolist(), "gene_order": "input", "join": "wanted"}
        workers = TaskRunner(workers=self.asked.workers, scheduler=None, progress=False).workers
        text = planning.forecast(self.paths, self.shown, settings, workers)
        return f"{text}\n  appended to the {store.n_obs:,} cells that are there"

    def _settings(self, store: CellStore) -> dict[str, Any]:
        """Return the settings by which the inputs are converted: the store's, but for what is of the inputs."""
        default, asked = ConversionSettings().of_the_store(), self.asked.of_the_store()
        own = {name: asked[name] for name in _OF_INPUTS if asked[name] != default[name]} | {name: asked[name] for name in _OWN}
        return {**default, **store.uns_sedd["settings"], **own}

    def _check(self, store: CellStore) -> None:
        """Refuse what cannot be appended to this store."""
        default, kept = ConversionSettings().of_the_store(), self._settings(store)
        for name, value in self.asked.of_the_store().items():
            plain = name in ("layer", "raw") and kept["layer"] is None and not kept["raw"]  # whose cells are in X, as those of a store are
            if value not in (default[name], kept[name]):
                raise UserError(
                    f"--{name}: {self.shown} was made with another, and cells are appended as its own were taken. Leave --{name} out, or "
                    f"{'convert the file alone and append that store' if plain else 'convert all files together into another store'}."
                )
        strange = sorted({*store.keys()} - _MEMBERS) + [f"obsp/{name}" for name in store.keys("obsp")]
        layers = set(free_names(kept["keep_layers"], nested=False).values())
        strange += [f"layers/{name}" for name in store.layer_arrays if name not in layers]
        if strange:
            raise UserError(
                f"{self.shown}: has {', '.join(strange)}, which sedd did not put there and cannot continue for more cells. "
                "Take it out first."
            )
        if store.x_arrays["data"].chunks[0] != shards.CHUNK:
            raise UserError(
                f"{self.shown}: has chunks of {store.x_arrays['data'].chunks[0]} entries, this version of sedd writes {shards.CHUNK}. "
                "Convert all files together into another store."
            )
        there = {record["fingerprint"]: record["path"] for record in store.uns_sedd["inputs"]}
        for path in self.paths:
            if (known := there.get(input_fingerprint(path))) is not None:
                raise UserError(f"{path}: is in {self.shown} already, as {known}. Nothing was appended.")
        for path in self.paths:
            self._check_genes(path, store.var_names.tolist(), kept)

    def _check_genes(self, path: str, genes: list[str], kept: dict[str, Any]) -> None:
        """Refuse an input that has other genes, and say which of its are not the store's."""
        with opened_as(path, kept) as file:
            names, _ = match_inputs([file], {**kept, "genes": None}, aloud=False)
            own = set(names)
            lacking = [name for name in genes if name not in own]
            common = len(genes) - len(lacking)
            if common < LEAST_OVERLAP * min(len(genes), len(own)):
                count = f"{common} of its {len(own)} genes" if common else "no gene"
                table = file.var(kept["raw"], tuple(kept["drop"]))
                hint = name_hint(path, table, file.naming, genes) or "Do both use the same kind of names, symbols or Ensembl identifiers?"
                raise UserError(
                    f"{path}: has {count} in common with the {len(genes)} of {self.shown} (for example {names[0]!r} and {genes[0]!r}). {hint}"
                )
        lacks = f"{path}: lacks {len(lacking)} of the {len(genes)} genes of {self.shown}"
        if lacking and kept["join"] != "outer":
            raise UserError(
                f"{lacks} (first: {lacking[0]!r}). Pass --join outer to append its cells, in which they are then unknown, or convert all files "
                "together into another store."
            )
        if lacking:
            warn_user(f"{lacks} (first: {lacking[0]!r}); in its cells they are unknown, not 0.")
        if more := len(own.difference(genes)):
            warn_user(f"{path}: {more} of its {len(own)} genes are not in {self.shown} and are left out.")

    # -- the steps -----------------------------------------------------------------------------------------------

    def run(self, *, resume: bool) -> CellStore:
        """Append, and open the grown store.

        Parameters
        ----------
        resume : resume what an earlier call left unfinished
        """
        if not os.path.isdir(os.path.dirname(self.output)):
            raise MissingFileError(f"{self.shown}: there is no such store to append to. Leave --append out to make it.")
        with only_writer(self.output, wait=False):
            if not os.path.exists(self.output):
                raise MissingFileError(f"{self.shown}: there is no such store to append to. Leave --append out to make it.")
            store = CellStore(self.output)
            if self._is_finished(store, resume):
                return store
            try:
                self._check(store)
                return self._append(store)
            except UnfinishedError as error:
                raise self._unfinished(error.reason) from error
            except UserError:
                self._clear()
                raise
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"interrupted; resume with --append --resume, or delete {self.folder}") from None
            except OSError as error:
                raise self._unfinished(error) from error
            except Exception as error:
                if os.path.exists(f"{self.folder}/append.json"):
                    error.add_note(f"{self.shown} is as it was. What is done so far is in {self.folder}: resume with --append --resume, or delete that.")
                raise

    def _unfinished(self, reason: OSError) -> UnfinishedError:
        return UnfinishedError(
            f"{self.shown}: cannot be appended to ({reason.strerror or reason}); it is as it was. What is done so far is in "
            f"{self.folder}: make room and resume with --append --resume, or delete that.",
            reason,
        )

    def _is_finished(self, store: CellStore, resume: bool) -> bool:
        """Deal with what an earlier call left; whether it had done what is asked."""
        done = resume and bool(store.grown) and store.uns_sedd["inputs"][-len(self.paths) :] == self._records()
        if os.path.exists(f"{self.folder}/plan.json"):
            raise UserError(
                f"{self.folder}: holds an unfinished conversion to {self.shown}. Resume that, or delete {self.folder}, and append then."
            )
        try:
            with open(f"{self.folder}/append.json") as file:
                left = json.load(file)
        except FileNotFoundError:
            left = None
        if left is None or store.fingerprint in left["to"] or done:
            self._clear()
            return done
        if not resume:
            raise UserError(
                f"{self.folder}: holds an unfinished append. Pass --append --resume and the same files to resume it, or delete it."
            )
        if left["asked"] != self._asked(store):
            raise UserError(
                f"{self.folder}: cannot be resumed, as the files, the settings, the store or sedd changed since. Delete it, and append "
                "again without --resume."
            )
        return False

    def _asked(self, store: CellStore) -> dict[str, Any]:
        """Return what an unfinished append must have been asked if this call is to resume it."""
        return {
            "inputs": self._records(), "settings": self._settings(store), "store": store.fingerprint, "sedd": sedd.__version__,
        }  # fmt: skip

    def _records(self) -> list[dict[str, str]]:
        """Return what the store is to remember of the inputs."""
        return [{"path": recorded_path(path if is_remote(path) else os.path.abspath(path)), "fingerprint": input_fingerprint(path)} for path in self.paths]

    def _note(self, store: CellStore, to: list[str]) -> None:
        """Write what is being done, and the fingerprint of the grown store once that is known."""
        write_json(f"{self.folder}/append.json", {"asked": self._asked(store), "to": to})

    def _clear(self) -> None:
        """Remove what is unfinished; the lock goes last, with the folder, when it is let go."""
        close_stores()
        clear(self.folder)

    def _append(self, store: CellStore) -> CellStore:
        records = self._records()
        self._note(store, [])
        tables = self._tables(store)
        added = self._convert(store)
        self._check_added(store, added, tables)
        for message in tables.news:
            warn_user(message)
        runner = TaskRunner(
            workers=self.asked.workers, scheduler=self.asked.scheduler, slurm_workers=self.asked.slurm_workers,
            budget=self.asked.budget, progress=self.progress,
        )  # fmt: skip
        try:
            self._build(store, added, tables, records, runner)
            grown = CellStore(f"{self.folder}/store")
            self._read_back(store, grown, runner)
        finally:
            runner.close()
        for path, record in zip(self.paths, records, strict=True):
            if input_fingerprint(path) != record["fingerprint"]:
                raise UserError(f"{path}: changed while it was converted. Append it again.")
        sync_tree(f"{self.folder}/store")
        self._note(store, [grown.fingerprint])
        move_into_place(f"{self.folder}/store", self.output)
        self._clear()
        return CellStore(self.shown)

    def _tables(self, store: CellStore) -> _Tables:
        """Read the tables of all cells, before the matrices are touched."""
        from sedd.io.conversion.joins import append_obs, append_uns

        kept = self._settings(store)
        with ExitStack() as stack:
            files = [stack.enter_context(opened_as(path, kept)) for path in self.paths]
            drop = tuple(kept["drop"])  # of the store; these inputs need not have it
            frames = [file.obs(kept["obs"], drop) for file in files]
            obsm, uns = ([file.mapping(name, drop) for file in files] for name in ("obsm", "uns"))
        n_left = self.asked.limit_cells or sum(map(len, frames))
        at = store.n_obs
        for k, frame in enumerate(frames):
            n = min(n_left, len(frame))
            frames[k] = frame.iloc[:n].copy()
            obsm[k] = {
                name: array.iloc[:n] if hasattr(array, "iloc") else array[:n]
                for name, array in obsm[k].items()
                if np.ndim(array) >= 1 and np.shape(array)[0] == len(frame)
            }
            if store.is_reordered:
                frames[k]["sedd_cell"] = np.arange(at, at + n)
            at, n_left = at + n, n_left - n
        known = [record["path"] for record in store.uns_sedd["inputs"]]
        own_obsm = {name: store.element(f"obsm/{name}") for name in store.keys("obsm")}
        own_uns = {name: store.element(f"uns/{name}") for name in store.keys("uns") if name != "sedd"}
        obs, arrays, news, (column, inputs) = append_obs(
            store.obs, own_obsm, known, frames, obsm, self.paths,
            named=len(known) > 1 or bool(store.uns_sedd["settings"].get("keys")), keys=kept["keys"],
        )  # fmt: skip
        unordered = [str(name) for name in store.obs if getattr(store.obs[name].dtype, "ordered", False)
                     and not getattr(obs[name].dtype, "ordered", False)]  # fmt: skip
        if unordered:
            news.append(f"obs {', '.join(unordered)}: has no order of categories any more, as not all files have the same.")
        stale, more = append_uns(own_uns, obs, store.obs, uns)
        news += more
        if store.is_reordered:
            what = "shuffled" if kept["shuffle"] else f"grouped by {kept['group_by']}"
            news.append(f"{self.shown}: is {what}; the appended cells come after the others, in the order of their files.")
        return _Tables(obs, [str(name) for frame in frames for name in frame.index], arrays, stale, news, column, inputs)

    def _convert(self, store: CellStore) -> CellStore:
        """Make a store of the new cells alone, by the genes and settings of the old one."""
        kept = self._settings(store)
        same = {name: kept[name] for name in ("layer", "raw", "modality", "gene_names", "strip_version", "round", "codec", "values")}
        asked = replace(self.asked, **same, keep_layers=tuple(kept["keep_layers"]), keys=(), shuffle=False, group_by=None, obs=())
        job = Job(self.paths, f"{self.folder}/added.zarr", asked, progress=self.progress)
        job.settings = self._of_matrix(store)
        try:
            return job.run(resume=True, overwrite=True)
        except NotCountsError as error:
            where = "raw.X" if kept["raw"] else "X" if kept["layer"] in (None, "X") else f"layers/{kept['layer']}"
            raise UserError(
                f"{str(error).partition(' Pass --')[0]} {self.shown} holds the counts of {where} of its files; have the counts there in what "
                "is appended too."
            ) from error

    def _of_matrix(self, store: CellStore) -> dict[str, Any]:
        """Return the settings of a store of the new cells alone."""
        apart = {"shuffle": False, "group_by": None, "seed": 0, "keys": [], "drop": [], "obs": [], "join": "wanted", "genes": store.var_names.tolist(), "gene_order": "input"}
        return {**self._settings(store), **apart}

    def _check_added(self, store: CellStore, added: CellStore, tables: _Tables) -> None:
        """Refuse cells that the arrays of the store cannot hold, or that are there already."""
        for name, arrays in matrices_of(store).items():
            own, kind = matrices_of(added)[name]["data"], np.dtype(arrays["data"].dtype)
            if own.dtype.kind != "f" and own.dtype.itemsize > kind.itemsize:
                raise UserError(self._too_large(added, name, np.iinfo(kind).max))
            if own.dtype.kind == "f" and kind.kind != "f":
                raise UserError(
                    f"{self.paths[0]}: {name} has real values, and {self.shown} holds counts there. Convert all files together into "
                    "another store."
                )
        if np.isin(added.cell_hashes(), store.cell_hashes()).all() and store.obs.index.isin(tables.names).sum() >= added.n_obs:
            raise UserError(
                f"{', '.join(self.paths)}: every one of the {added.n_obs} cells is in {self.shown} already, by name and by counts. "
                "Nothing was appended."
            )

    def _too_large(self, added: CellStore, name: str, most: int) -> str:
        """Name the first count that is too large."""
        arrays = matrices_of(added)[name]
        data, indptr = (ChunkReader(arrays[part], name=part) for part in ("data", "indptr"))
        at = next(lo + int(np.argmax(block > most)) for lo in range(0, data.size, STEP)
                  if (block := data.read_range(lo, min(lo + STEP, data.size))).max(initial=0) > most)  # fmt: skip
        cell = int(np.searchsorted(indptr.read_range(0, indptr.size), at, side="right")) - 1
        gene = int(ChunkReader(arrays["indices"], name="indices").read_range(at, at + 1)[0])
        for path in self.paths:
            with opened_as(path, added.uns_sedd["settings"]) as file:
                n_obs, shown = file.n_obs, file.name("obs", cell) if cell < file.n_obs else ""
            if cell < n_obs:
                break
            cell -= n_obs
        return (
            f"{path}: {name} has {int(data.read_range(at, at + 1)[0])} at cell {cell} ({shown}), gene {str(added.var_names[gene])!r}, and "
            f"{self.shown} was made to hold counts up to {most}; its shards would have to be written again. Convert all files "
            "together into another store."
        )

    # -- the grown store -----------------------------------------------------------------------------------------

    def _build(self, store: CellStore, added: CellStore, tables: _Tables, records: list[dict[str, str]], runner: TaskRunner) -> None:
        """Make the grown store; shards that an earlier attempt has made are kept."""
        import zarr

        from sedd.io.conversion.statistics import OfStores
        from sedd.io.conversion.tables import write_added
        from sedd.io.format.elements import write_elements
        from sedd.io.format.lacking import together

        root = f"{self.folder}/store"
        tasks = lay_out(store, added, root)
        runner.run(extend_shard, tasks, [0] * len(tasks), title="append")
        copy_rest(store.path, root, anew=["obs", "obsm", "uns/sedd", *(f"uns/{name}" for name in tables.stale)])
        group = zarr.open_group(root, mode="r+", use_consolidated=False)
        for message in write_elements(group, {"obs": tables.obs, "obsm": tables.obsm}):
            warn_user(message)
        then = {
            "n_obs": store.n_obs, "nnz": store.nnz, "max_value": store.max_value, "fingerprint": store.fingerprint,
            "inputs": len(store.uns_sedd["inputs"]), "appended": {**self._of_matrix(store), "genes": None},
        }  # fmt: skip
        named = {str(number): name for number, name in enumerate(tables.inputs)}
        write_added(
            group, store.uns_sedd["settings"], OfStores([store, added]), store.uns_sedd["inputs"] + records, [*store.grown, then],
            lacking=together(tables.column, store.var_names.tolist(), [(store.lacking, {}), (added.lacking, named)]),
        )  # fmt: skip

    def _read_back(self, store: CellStore, grown: CellStore, runner: TaskRunner) -> None:
        """Read what was written, checksums and all, and compare each cell with what it should be."""
        close_stores()
        length = grown.x_arrays["data"].shards[0]
        first = int(np.searchsorted(grown.indptr, store.nnz // length * length, side="right")) - 1
        spans = [(max(lo, first), hi) for lo, hi in grown.spans(STEP) if hi > first]
        found = runner.run(span_hashes, [(grown.path, *span) for span in spans], [hi - lo for lo, hi in spans], title="check")
        wrong = first + np.flatnonzero(np.concatenate(found) != grown.cell_hashes()[first:])
        if wrong.size and wrong[0] < store.n_obs:
            raise UserError(
                f"{self.shown}: cell {wrong[0]} is not what was written there. Nothing was appended; `sedd verify {self.shown}` says "
                "more. Convert all files together into another store."
            )
        if wrong.size:
            raise OSError(f"cell {wrong[0]} reads back differently from what was written")
