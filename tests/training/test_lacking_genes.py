"""Training on files of which some lack genes: what nobody counted is hidden and no zero, in the data, the loss and the tasks."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, dense, make_counts

import sedd
from sedd.checkpoint import unpack_histogram
from sedd.cli import main
from sedd.inference.pretrained import Pretrained
from sedd.io import CellStore, convert

LACKED = 12  # genes that the second file does not have: the last ones
NAMES = [f"gene{k}" for k in range(60 - LACKED, 60)]
pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


@pytest.fixture(scope="session")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shuffled store of two halves of `make_counts`, the second without some genes and the others in another order."""
    folder, cells = tmp_path_factory.mktemp("lacking"), make_counts(320)
    cells[:160].copy().write_h5ad(folder / "whole.h5ad")
    cells[160:, :-LACKED][:, ::-1].copy().write_h5ad(folder / "part.h5ad")
    convert([folder / "whole.h5ad", folder / "part.h5ad"], folder / "both.zarr", join="outer", shuffle=True, progress=False)
    return folder / "both.zarr"


@pytest.fixture(scope="session")
def run(joined: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lacking-run") / "run"
    train(joined, folder, "--condition", "cell_type", "--condition_library_size")
    return folder


def train(data: Path, folder: Path, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(data.parent)
        assert main(["train", "--data_path", str(data), "--checkpoint_dir", str(folder), *TINY_FLAGS, *flags]) == 0


def kinds(joined: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The counts, genes in the order of the store, which cells lack genes, and which genes they are."""
    cells = ad.read_zarr(joined)
    lacked = np.isin(cells.var_names, NAMES)
    return dense(cells.X), (cells.obs["source"] == "part.h5ad").to_numpy(), lacked


def test_marginals_are_those_of_the_cells_that_were_counted(joined: Path, run: Path) -> None:
    counts, part, lacked = kinds(joined)
    model = Pretrained.load(run)
    split = model.state["split"]
    assert split["n_obs"] == 320
    train_cells = sedd.checkpoint.split_of(model.state, "train").cells()
    order = [list(CellStore(joined).var_names).index(gene) for gene in model.genes]
    known = np.broadcast_to(~(part[:, None] & lacked), counts.shape)[train_cells][:, order]
    values = counts[train_cells][:, order]
    found = unpack_histogram(model.state["histogram"]).toarray()
    expected = np.array([np.bincount(values[known[:, g], g].astype(int), minlength=found.shape[1]) for g in range(len(order))])
    np.testing.assert_array_equal(found, expected)
    totals = values[known.all(1)].sum(1)  # of the others nobody knows them
    assert model.state["libraries"][[0, -1]].tolist() == [totals.min(), totals.max()]


def test_tasks_take_no_zero_for_what_was_not_counted(joined: Path, run: Path) -> None:
    counts, part, lacked = kinds(joined)
    mean = counts[~part][:, lacked].mean()
    unknown = np.ix_(part, lacked)
    imputed = sedd.impute(run, joined, hide=0, predict=["gene40"], progress=False)
    order = imputed.var_names.get_indexer(ad.read_zarr(joined).var_names)
    values, hidden = dense(imputed.X)[:, order], dense(imputed.layers["sedd_hidden"])[:, order].astype(bool)
    asked = np.asarray(ad.read_zarr(joined).var_names == "gene40")
    np.testing.assert_array_equal(hidden, (part[:, None] & lacked) | asked)
    np.testing.assert_array_equal(values[~hidden], counts[~hidden])
    denoised = dense(sedd.denoise(run, joined, progress=False).X)[:, order]
    for found in (values, denoised):
        assert found[unknown].mean() == pytest.approx(mean, rel=0.35)  # two epochs; as zeros they would be half of it or less
    made = sedd.generate(run, 200, progress=False)
    assert dense(made.X)[:, made.var_names.isin(NAMES)].mean() == pytest.approx(mean, rel=0.35)


def test_a_store_gives_each_cell_what_its_own_file_gives(joined: Path, run: Path) -> None:
    """Cells of the file that lacks genes, read from the store of both, from the file, and from an AnnData of chosen cells of the store."""
    part = ad.read_h5ad(joined.parent / "part.h5ad")
    both = ad.read_zarr(joined)
    chosen = both[both.obs["source"] == "part.h5ad"].copy()
    for name, task in (("X_sedd", sedd.embed), ("sedd_cell_type_probability", sedd.annotate)):
        alone = task(run, part, progress=False).obsm[name]
        for data, rows in ((joined, part.obs_names), (chosen, part.obs_names)):
            found = task(run, data, progress=False)
            np.testing.assert_allclose(found.obsm[name][found.obs_names.get_indexer(rows)], alone, rtol=1e-5, atol=1e-6)
    scored = sedd.score(run, joined, progress=False)
    assert np.isfinite(scored.obs["sedd_nats"]).all()
    evaluated = sedd.evaluate(run, joined, progress=False, num_steps=2)
    assert any(f"{LACKED} of the model's 60 genes are not in the data, or not in all of its cells" in note for note in evaluated.notes)
    assert not any("other counts" in note for note in evaluated.notes)


def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped(joined: Path, run: Path, tmp_path: Path) -> None:
    flags = ["--condition", "cell_type", "--condition_library_size"]
    train(joined, tmp_path / "run", *flags, "--num_epochs", "1")
    train(joined, tmp_path / "run", *flags, "--resume", "auto")
    once, twice = (Pretrained.load(folder).state for folder in (run, tmp_path / "run"))
    assert once["epoch"] == twice["epoch"]
    for name, weight in once["model"].items():
        assert torch.equal(weight, twice["model"][name]), name


def test_an_anndata_read_from_the_store_trains_as_the_store_does(joined: Path, run: Path, tmp_path: Path) -> None:
    flags = {name.removeprefix("--"): value for name, value in zip(TINY_FLAGS[::2], TINY_FLAGS[1::2], strict=True)}
    settings = {name: value if name in ("genes", "log_with") else float(value) if "." in value or "e" in value else int(value) for name, value in flags.items()}
    model = sedd.train(
        ad.read_zarr(joined), checkpoint_dir=tmp_path / "run", condition="cell_type", condition_library_size=True, progress=False, **settings
    )
    for name, weight in Pretrained.load(run).state["model"].items():
        assert torch.equal(weight, model.state["model"][name]), name


def test_what_cannot_do_without_genes_says_so(joined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--data_path", str(joined), "--checkpoint_dir", str(tmp_path / "run"), *TINY_FLAGS]
    assert main([*flags, "--graph", "uniform", "--binning", "identity"]) == 2
    assert "--graph uniform hides no genes" in capsys.readouterr().err
    cells = make_counts(80)
    cells[:40, :30].copy().write_h5ad(tmp_path / "a.h5ad")
    cells[40:, 10:].copy().write_h5ad(tmp_path / "b.h5ad")
    store = convert([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "ab.zarr", join="outer", progress=False)
    assert store is not None
    flags[2] = str(tmp_path / "ab.zarr")
    assert main([*flags, "--condition_library_size"]) == 2
    assert "the total of no cell is known" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::sedd.errors.SeddWarning")
def test_where_nobody_knows_any_more_which_cell_lacks_genes_it_is_said(joined: Path, run: Path) -> None:
    cells = ad.read_zarr(joined)[:20].copy()
    with pytest.warns(sedd.errors.SeddWarning, match="12 of the model's genes are not in all of the files"):
        sedd.embed(run, cells, progress=False)
    del cells.obs["source"]
    with pytest.warns(sedd.errors.SeddWarning, match=r"obs\['source'\], which says which file a cell is from, is not there any more"):
        sedd.embed(run, cells, progress=False)
