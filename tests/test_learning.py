"""`sedd.train`: cells in memory to a model, with the settings of the command line."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_counts

import sedd
from sedd.cli import main
from sedd.config import SECTIONS
from sedd.options import meanings_of

TINY: dict[str, Any] = {
    "genes": "all", "num_epochs": 1, "batch_size": 16, "learning_rate": 2e-3, "hidden_dim": 16, "num_layers": 1, "num_heads": 2,
    "warmup_steps": 5, "ema_decay": 0.9, "num_threads": 1, "log_with": "none",
}  # fmt: skip


def words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def test_an_anndata_a_file_and_the_command_line_make_one_model(tiny_h5ad: Path, tmp_path: Path) -> None:
    assert main(["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(tmp_path / "a"), *words(TINY)]) == 0
    other = sedd.train(make_counts(), **TINY)
    file = sedd.train(tiny_h5ad, checkpoint_dir=tmp_path / "b", **TINY)
    wanted = sedd.Pretrained.load(tmp_path / "a").model.state_dict()
    for model in (other, file):
        assert model is not None
        assert all(torch.equal(value, wanted[name]) for name, value in model.model.state_dict().items())


def test_without_progress_nothing_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_counts().write_h5ad(tmp_path / "a.h5ad")
    run, cells, out = (str(tmp_path / name) for name in ("run", "a.h5ad", "b.h5ad"))
    assert sedd.train(cells, checkpoint_dir=run, progress=False, **TINY) is not None  # converts, counts, trains and validates
    assert capfd.readouterr().err == ""
    assert main(["impute", run, cells, "-o", out, "--no_progress"]) == 0
    assert main(["verify", str(tmp_path / "a.sedd.zarr"), "--no_progress"]) == 0
    assert capfd.readouterr().err == ""
    assert sedd.train(cells, checkpoint_dir=run, overwrite=True, **TINY) is not None
    said = capfd.readouterr().err
    assert "epoch 1/1: 100%" in said and "nats per cell (best)" in said


def test_the_counts_of_a_layer_and_the_labels_of_a_view_are_what_is_learned(tmp_path: Path) -> None:
    whole = make_counts()
    whole.layers["counts"] = whole.X.copy()
    whole.X = np.log1p(whole.X)
    before = whole.copy()
    model = sedd.train(whole[20:], layer="counts", condition="cell_type", **TINY)
    assert model is not None
    assert model.categories["cell_type"] == ["T cell", "monocyte", "B cell"]
    assert model.state["data"]["n_obs"] == 220
    assert not (whole.X != before.X).nnz and set(whole.layers) - {None} == {"counts"}
    denoised = sedd.denoise(model, whole, progress=False)  # from where the training data had them
    assert np.array_equal(denoised.layers["counts"].toarray(), whole.layers["counts"].toarray())


def test_raw_names_and_versions_are_read_as_from_a_file() -> None:
    whole = make_counts()
    whole.var["symbol"] = [f"ENSG{k:011d}.1" for k in range(whole.n_vars)]
    whole.raw = whole
    whole = whole[:, :5].copy()
    whole.X = np.log1p(whole.X)
    model = sedd.train(whole, raw=True, gene_names="symbol", strip_version=True, drop=["obs/depth"], **TINY)
    assert model is not None
    assert list(model.genes[:2]) == ["ENSG00000000000", "ENSG00000000001"] and len(model.genes) == 60


@pytest.mark.parametrize("raw", [False, True])
def test_columns_that_anndata_cannot_write_do_not_stop_it(raw: bool) -> None:
    cells = make_counts()
    n = cells.n_vars
    cells.var["when"], cells.var["month"] = pd.date_range("2020", periods=n), pd.period_range("2020", periods=n, freq="M")
    cells.var["G1/S"], cells.var["mixed"] = np.arange(n), pd.Series(([1, "a", None] * n)[:n], index=cells.var_names, dtype=object)
    if raw:
        cells.raw = cells
    model = sedd.train(cells, raw=raw, condition=["cell_type"], **TINY)
    assert model is not None and list(model.genes) == list(cells.var_names[np.isin(cells.var_names, model.genes)])
    assert model.categories["cell_type"] == ["T cell", "monocyte", "B cell"]


def test_the_temporary_run_goes_with_the_model_and_what_was_saved_stays(tmp_path: Path) -> None:
    model = sedd.train(make_counts(), **TINY)
    assert model is not None
    home = model.path.parent
    assert home.is_dir()
    model.save_pretrained(tmp_path / "kept")
    del model
    gc.collect()
    assert not home.exists()
    assert sedd.Pretrained.load(tmp_path / "kept").genes.size == 60


def test_a_run_is_resumed_with_the_same_cells_and_refused_with_others(tmp_path: Path) -> None:
    cells = make_counts()
    sedd.train(cells, checkpoint_dir=tmp_path / "run", **TINY)
    with pytest.raises(sedd.UserError, match="holds a run already"):
        sedd.train(cells, checkpoint_dir=tmp_path / "run", **TINY)
    more = sedd.train(cells, checkpoint_dir=tmp_path / "run", resume="auto", **{**TINY, "num_epochs": 2})
    assert more is not None and len(list((tmp_path / "run").glob("cells-*"))) == 1
    assert json.loads((tmp_path / "run" / "history.json").read_text())[-1]["epoch"] == 2
    with pytest.raises(sedd.UserError, match="is not the data of the checkpoint"):
        sedd.train(make_counts(seed=1), checkpoint_dir=tmp_path / "run", resume="auto", **{**TINY, "num_epochs": 3})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_epochs": 0}, "--num_epochs is 0; expected at least 1"),
        ({"layer": "spliced"}, "no layer 'spliced'"),
        ({"condition": ["kind"]}, "--condition kind: no such obs column; there are: cell_type, donor, depth"),
        ({"resume": "auto"}, "--checkpoint_dir, which is not given"),
        ({"modality": "rna"}, "--modality is for files"),
        ({"genes": ["gene1"]}, "--genes is a list; expected one value"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(sedd.UserError, match=says) as error:
        sedd.train(make_counts(), **{**TINY, **settings})
    assert "\n" not in str(error.value)


def test_what_is_no_setting_is_named() -> None:
    with pytest.raises(TypeError, match="'num_epoch'; did you mean 'num_epochs'"):
        sedd.train(make_counts(), num_epoch=3)
    with pytest.raises(TypeError, match="data_path"):
        sedd.train(make_counts(), data_path="x")
    with pytest.raises(sedd.UserError, match=r"anndata\.concat"):
        sedd.train([make_counts(), make_counts()])


def test_help_says_what_each_setting_means() -> None:
    keywords = inspect.signature(sedd.train).parameters
    assert sedd.train.__doc__ is not None
    said = " ".join(sedd.train.__doc__.split())
    for section in SECTIONS.values():
        for one in dataclasses.fields(section):
            if one.name != "data_path":
                assert keywords[one.name].default == (None if one.name == "checkpoint_dir" else one.default)
            if one.name not in ("data_path", "checkpoint_dir"):
                assert f"{one.name} {meanings_of(section)[one.name]}" in said
    for task in (sedd.impute, sedd.denoise, sedd.embed, sedd.evaluate, sedd.convert, sedd.annotate, sedd.score):
        assert "gene_names Name genes by this column of var" in " ".join((task.__doc__ or "").split()), task


def test_ctrl_c_gives_the_model_so_far() -> None:
    def press() -> None:
        while not started.is_set():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    from sedd.training.logs import Tracker

    started, before = threading.Event(), Tracker.epoch

    def epoch(self: Tracker, entry: dict[str, Any]) -> None:
        before(self, entry)
        started.set()

    patch = pytest.MonkeyPatch()
    patch.setattr(Tracker, "epoch", epoch)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.warns(sedd.SeddWarning, match="training was interrupted; this is the model of step"):
            model = sedd.train(make_counts(), **{**TINY, "num_epochs": 500})
    finally:
        started.set()
        thread.join()
        patch.undo()
    assert model is not None and 1 <= model.state["epoch"] < 500


def test_every_task_takes_and_returns_an_anndata() -> None:
    cells = make_counts()
    model = sedd.train(cells, condition=["cell_type"], **TINY)
    assert model is not None
    assert "parameters" in repr(model) and "tensor(" not in repr(model)  # what a notebook shows
    for made in (
        sedd.impute(model, cells, progress=False),
        sedd.denoise(model, cells, progress=False),
        sedd.generate(model, 7, progress=False),
        sedd.embed(model, cells, progress=False),
        sedd.annotate(model, cells, progress=False),
    ):
        assert isinstance(made, ad.AnnData)
    assert sedd.evaluate(model, cells, n_masks=2, num_steps=2, steps=(), umap=False, progress=False).metrics["likelihood"]


def _nameless(table: str) -> ad.AnnData:
    cells = make_counts(60)
    names = getattr(cells, f"{table}_names").to_numpy(object).copy()
    names[[3, 5]] = np.nan, None
    getattr(cells, table).index = pd.Index(names, dtype=object)
    return cells


@pytest.mark.filterwarnings("ignore:the AnnData. has 58 of the model's 60 genes")
@pytest.mark.parametrize("table", ["obs", "var"])
@pytest.mark.parametrize("call", ["train", "impute", "denoise", "embed", "annotate", "score"])
def test_cells_and_genes_without_a_name_are_refused_with_the_way_out(call: str, table: str, tiny_run: Path) -> None:
    cells, noun = _nameless(table), {"obs": "cells", "var": "genes"}[table]

    def go(cells: ad.AnnData) -> None:
        sedd.train(cells, **TINY) if call == "train" else getattr(sedd, call)(tiny_run, cells, progress=False)

    with pytest.raises(sedd.UserError, match=rf"^the AnnData: 2 {noun} of 60 have no name \(first: number 3, counted from 0\)"):
        go(cells)
    setattr(cells, f"{table}_names", getattr(cells, f"{table}_names").fillna("unknown"))
    getattr(cells, f"{table}_names_make_unique")()
    go(cells)


def test_messages_of_cells_in_memory_name_no_file_that_is_not_theirs(tmp_path: Path) -> None:
    cells = make_counts(60)
    for wrong, said in ((cells[:0], "the AnnData: has no cells"), (cells[:, :0], "the AnnData: has no genes")):
        for run in ({}, {"checkpoint_dir": tmp_path / "run"}):
            with pytest.raises(sedd.UserError, match=f"^{said}"):
                sedd.train(wrong.copy(), **run, **TINY)
    cells.X = -cells.X
    with pytest.raises(sedd.UserError, match="^the AnnData: X has negative"):
        sedd.train(cells, **TINY)
    cells.X = np.abs(cells.X.toarray()) * (np.arange(60) > 2)[:, None]
    with pytest.warns(UserWarning, match="^the AnnData: ") as said:
        sedd.train(cells, **TINY)
    assert "the AnnData: 3 of 60 cells have no counts; they were kept." in {str(one.message) for one in said}
    assert not any("cells.h5ad" in str(one.message) for one in said)


@pytest.mark.parametrize("in_x", [True, False])
def test_cells_in_memory_whose_counts_are_elsewhere_say_where(in_x: bool) -> None:
    adata = make_counts(n_obs=40)
    counts, logged = adata.X.tocsc(), adata.X.log1p()
    adata = ad.AnnData(logged, adata.obs, adata.var, layers={"counts": counts, "also": logged})
    if in_x:
        adata.X, adata.layers["counts"] = counts, logged
    with pytest.raises(sedd.UserError, match=r"log-normalised\. Pass --layer X, which holds counts, or" if in_x else r"Pass --layer counts, which holds counts, or"):
        sedd.train(adata, layer="also" if in_x else None, **TINY)
    adata.X, adata.layers["counts"] = logged, logged
    with pytest.raises(sedd.UserError, match="Pass an AnnData that holds the counts: in this one is no other"):
        sedd.train(adata, **TINY)


def test_a_disk_without_room_for_cells_in_memory_is_said_and_nothing_stays(tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys, warnings
sys.path.insert(0, {str(Path(__file__).parent)!r})
import sedd
from conftest import make_counts
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    sedd.train(make_counts(), checkpoint_dir={str(tmp_path / "run")!r}, num_epochs=1)
except sedd.UserError as error:
    print("said:", error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert "said: the AnnData: cannot be written into" in done.stdout and "(File too large)" in done.stdout, done.stderr[-2000:]
    assert not list((tmp_path / "run").glob("cells*"))
