"""`sedd.train`: from cells in memory, a file or a store to a model, in one call."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from sedd.checkpoint import find
from sedd.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from sedd.config_files import setting_types
from sedd.errors import NotCountsError, UserError, called, warn_user
from sedd.inference.pretrained import Pretrained
from sedd.inference.reading import Reading
from sedd.inference.sources import AnnDataSource, no_data
from sedd.io.convert import convert
from sedd.io.format.elements import writable_table, write_elements
from sedd.io.format.lacking import Lacking
from sedd.io.format.plain import column_called
from sedd.io.store import CellStore
from sedd.options import keywords_of
from sedd.processes import launched
from sedd.trainer import SEDDTrainer
from sedd.training.directory import RunDirectory
from sedd.training.first_look import check_column, split_of_cells
from sedd.training.run_data import counts_or_real
from sedd.training.stopping import EXIT_INTERRUPTED, TrainingInterrupted

_OWN = ("data_path", "checkpoint_dir")


@keywords_of(DataConfig, ModelConfig, OptimConfig, RunConfig, without=_OWN)
def train(
    data: ad.AnnData | CellStore | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Pretrained | None:
    """Train a model on cells; `sedd train` with the same settings makes the same one.

    Parameters
    ----------
    data
        An AnnData of raw counts, an open store, or the path of a store or of one or several files (`sedd.config.DataConfig.data_path`).
        Cells in memory are written once as a store, in the directory of the run.
    checkpoint_dir
        Directory of the run: checkpoints, curves, settings. By default a temporary one, which is deleted when the model is (or Python
        ends); `model.save_pretrained` then keeps the model. Without it Ctrl-C ends the training early and gives the model so far.
    **settings
        Every other setting of `sedd train`, under the same name and checked in the same way; a list where several are meant:

    Returns
    -------
    model : Pretrained
        The model of the epoch with the lowest bound on the validation cells. None with `dry_run`.

    Raises
    ------
    UserError
        On bad input, before anything is trained.
    TrainingInterrupted
        If the run was stopped and can be resumed from `checkpoint_dir`.

    Examples
    --------
    >>> model = sedd.train(adata, layer="counts", num_epochs=20)  # doctest: +SKIP
    >>> model.save_pretrained("my_model")  # doctest: +SKIP
    """
    unknown = [name for name in settings if name not in setting_types() or name in _OWN]
    if unknown:
        close = difflib.get_close_matches(unknown[0], set(setting_types()).difference(_OWN), 1)
        raise TypeError(f"there is no setting {unknown[0]!r}" + (f"; did you mean {close[0]!r}?" if close else "."))
    if not isinstance(data, ad.AnnData | CellStore | str | os.PathLike | list | tuple):
        raise no_data(data)
    _check_together(data, checkpoint_dir, settings)
    run = _TemporaryRun() if checkpoint_dir is None else None
    directory = run.path if run is not None else Path(checkpoint_dir or "")
    named = "the AnnData" if isinstance(data, ad.AnnData) else data.path if isinstance(data, CellStore) else data
    config = TrainConfig.from_flat({**_plain(settings), "data_path": _plain({"": named})[""], "checkpoint_dir": str(directory)})
    if isinstance(data, ad.AnnData):  # into a store in the directory of the run, which is looked at before
        held = RunDirectory(directory)
        held.check_usable()
        if config.run.resume is None:
            held.check_free(overwrite=config.run.overwrite)
        store = _stored(data, config, directory)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_path=store, drop=()))
    try:
        with called(config.data.named, "the AnnData") if isinstance(data, ad.AnnData) else nullcontext():
            SEDDTrainer(config).fit()
    except TrainingInterrupted as stopped:
        if run is None:
            raise
        if stopped.exit_code != EXIT_INTERRUPTED:
            run.keep()  # what was saved in it is what the message names
            raise
        return _so_far(run, stopped)
    if config.run.dry_run:
        return None
    return dataclasses.replace(Pretrained.load(directory), run=run)


class _TemporaryRun:
    """A directory that is deleted with this object, or when Python ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="sedd-"))
        self._end = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def keep(self) -> None:
        """Leave the directory where it is."""
        self._end.detach()


def _so_far(run: _TemporaryRun, stopped: TrainingInterrupted) -> Pretrained:
    try:
        path = find(run.path)
    except UserError:  # nothing was trained yet
        raise KeyboardInterrupt from stopped
    model = Pretrained.load(path)
    step = model.state["step"]
    warn_user(f"training was interrupted; this is the model of step {step}. Pass checkpoint_dir to have a run that can be resumed.")
    return dataclasses.replace(model, run=run)


def _check_together(data: Any, checkpoint_dir: Any, settings: dict[str, Any]) -> None:
    """Refuse what cannot go together, before anything is made."""
    if isinstance(data, list | tuple) and any(isinstance(one, ad.AnnData) for one in data):
        raise UserError("data is a list of AnnData; expected one. Join them with anndata.concat, or pass the paths of their files.")
    if checkpoint_dir is None and settings.get("resume") == "auto":
        raise UserError("--resume auto looks in --checkpoint_dir, which is not given; pass the directory of the run to resume.")
    if launched() > 1 and (checkpoint_dir is None or isinstance(data, ad.AnnData)):
        raise UserError(
            f"{launched()} processes train together, so they need the same files: pass --checkpoint_dir and the path of the data, not an AnnData."
        )
    if isinstance(data, ad.AnnData):
        for name in ("cache_dir", "keys", "modality"):
            if settings.get(name):
                raise UserError(f"--{name} is for files, and the data are an AnnData in memory; leave it out.")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as a command line would have them: paths, numbers of genes and minutes as text."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        several = setting_types().get(name, "tuple").startswith("tuple")
        if isinstance(value, list | tuple) and not several:
            raise UserError(f"--{name} is a list; expected one value. `help(sedd.train)` says which.")
        if isinstance(value, os.PathLike) or (name in ("genes", "checkpoint_every") and isinstance(value, int)):
            value = str(value)
        elif isinstance(value, list | tuple):
            value = tuple(map(str, value))
        elif isinstance(value, str) and several and name:
            value = (value,)
        elif isinstance(value, np.generic):
            value = value.item()
        found[name] = value
    return found


def _stored(adata: ad.AnnData, config: TrainConfig, directory: Path) -> str:
    """Return the path of a store of what a run needs of an AnnData; one of the same cells that is there is used again."""
    columns = list(config.model.condition)
    source = AnnDataSource(adata, reading=Reading(config.data))  # its checks are those of the tasks
    for column in columns:
        check_column(column, map(str, source.obs.columns))
    if adata.n_obs:
        split_of_cells(config, adata.n_obs)
    layer, raw = config.data.layer, config.data.raw
    lacking = None if raw else source.lacking()
    columns += [] if lacking is None else [lacking.column]
    matrix = source.rows(layer, raw).take(np.arange(adata.n_obs))
    var = adata.raw.var if raw else adata.var
    var = var.copy() if isinstance(var, pd.DataFrame) else var.to_memory()  # of a lazy AnnData
    obs = source.obs[[]].assign(**{column: labels.array for column in columns if (labels := column_called(source.obs, column)) is not None})
    bare = pd.DataFrame(index=var.index)
    slim = ad.AnnData(None if raw or layer else matrix, obs=pd.DataFrame(index=obs.index), var=None if raw else bare)
    if layer:
        slim.layers[layer] = matrix
    if raw:
        slim.raw = ad.AnnData(matrix, obs=slim.obs, var=bare)
    if lacking is not None:  # of the files that a store was made of, if the AnnData was read from one
        slim.uns["sedd"] = {"lacking": lacking.element()}
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cells-", dir=directory))
        path = Path(folder, "cells.h5ad")
        stack.enter_context(called(str(path), "the AnnData"))
        try:
            slim.write_h5ad(path)
            with h5py.File(path, "r+") as file:  # tables hold what anndata itself refuses to write, such as dates
                for group, name, table in ((file, "obs", obs), (file["raw"] if raw else file, "var", var)):
                    del group[name]
                    write_elements(group, {name: table}, rows=None)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else " ".join(str(error).split())[:200]
            raise UserError(
                f"the AnnData: cannot be written into {directory} ({why}), where it is read from in training. Make room there, or pass another "
                "--checkpoint_dir (without one the system's folder for temporary files is taken)."
            ) from error
        taken = {name: value for name, value in config.data.of_inputs().items() if name != "drop"}  # what they name is not there

        def make(values: Any) -> str:
            store = convert([path], Path(folder, "cells.zarr"), progress=False, values=values, **taken)
            assert store is not None
            target = directory / f"cells-{_digest(store.fingerprint, obs, taken, lacking)}.zarr"
            store.close()
            if not target.exists():
                os.rename(store.path, target)
            return str(target)

        try:
            return counts_or_real(config.data, make)
        except NotCountsError as error:  # what was written is one matrix; the AnnData may have the counts in another
            ways = source.ways_out((layer, raw), counts=True).replace(", ", " or ")
            where = f"Pass {ways}, which holds counts" if ways else "Pass an AnnData that holds the counts: in this one is no other matrix with them"
            raise type(error)(_NO_OTHER.sub(lambda _: where, str(error))) from None


_NO_OTHER = re.compile(r"Pass a file that holds the counts: in this one is no other matrix with them|Pass --layer with the counts \(.*; none of them looks like counts\)")
"""What is said of the file that an AnnData in memory was written to, which has one matrix of it."""


def _digest(fingerprint: str, obs: pd.DataFrame, taken: dict[str, Any], lacking: Lacking | None) -> str:
    """Return a name for cells with these counts, names and labels, of files that lack these genes, read in this way."""
    found = hashlib.blake2b(f"{fingerprint} {taken}".encode(), digest_size=6)
    found.update(pd.util.hash_pandas_object(writable_table(obs)[0]).to_numpy().tobytes())
    if lacking is not None:
        found.update(repr([value.tolist() if isinstance(value, np.ndarray) else value for value in lacking.element().values()]).encode())
    return found.hexdigest()
