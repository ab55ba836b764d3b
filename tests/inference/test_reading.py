"""Tasks on inputs of every format, by the names of genes and the modality that are asked for or that the training data had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
from conftest import TINY_FLAGS, dense, make_counts

from sedd.checkpoint import split_of
from sedd.cli import main
from sedd.errors import SeddWarning, UserError
from sedd.evaluation import evaluate
from sedd.inference.pretrained import Pretrained
from sedd.tasks import denoise, embed, impute
from tests.io.input.formats import TYPES, WRITERS, h5ad, h5mu, tenx_3

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Pretrained:
    return Pretrained.load(tiny_run)


def data(n: int = 60) -> ad.AnnData:
    """Cells on the genes of the tiny run, with what every format can hold."""
    adata = make_counts(n)
    adata.obs["batch"] = "x"
    adata.var["gene_ids"] = [f"ENSG{k:011d}.{k % 7}" for k in range(adata.n_vars)]
    adata.X = adata.X.astype(np.float32)
    return adata


@pytest.mark.parametrize("kind", WRITERS)
def test_tasks_take_every_format_as_they_take_its_anndata(kind: str, model: Pretrained, tmp_path: Path) -> None:
    adata = data()
    adata.obs = adata.obs[["batch"]]  # not every format holds what the model is conditioned on
    path = WRITERS[kind](tmp_path / "in", adata)
    expected = denoise(model, adata, rounds=1, folds=2, progress=False)
    for output in (None, tmp_path / "out.h5ad", tmp_path / "out.zarr"):
        found = denoise(model, path, rounds=1, folds=2, progress=False, output=output)
        if output is not None:
            found = ad.read_zarr(output) if output.suffix == ".zarr" else ad.read_h5ad(output)
        assert np.array_equal(dense(found.X), dense(expected.X))
        assert found.obs_names.tolist() == adata.obs_names.tolist()
        assert found.var["gene_ids"].tolist() == expected.var["gene_ids"].tolist()
    embed(model, path, progress=False, output=tmp_path / "embedded.zarr")
    embedded = ad.read_zarr(tmp_path / "embedded.zarr")
    assert np.array_equal(embedded.obsm["X_sedd"], embed(model, adata, progress=False).obsm["X_sedd"])
    read = ad.read_zarr(tmp_path / "embedded.zarr")
    assert np.array_equal(dense(read.X), dense(adata.X))


@pytest.mark.parametrize("call", [impute, denoise, embed])
def test_names_come_from_a_column_that_is_suggested_where_it_helps(call: Callable[..., ad.AnnData], model: Pretrained, tmp_path: Path) -> None:
    adata = data()
    expected = call(model, adata, progress=False)
    other = adata.copy()
    other.var["feature_name"] = other.var_names
    other.var_names = other.var["gene_ids"].tolist()
    path = h5ad(tmp_path / "in", other)
    for given in (other, path):
        with pytest.raises(UserError, match="has 0 of the model's .* Pass --gene_names feature_name"):
            call(model, given, progress=False)
        found = call(model, given, gene_names="feature_name", progress=False)
        key = ("obsm", "X_sedd") if call is embed else ("layers", "counts")
        assert np.array_equal(dense(getattr(found, key[0])[key[1]]), dense(getattr(expected, key[0])[key[1]]))
        assert found.var["var_names"].tolist() == adata.var["gene_ids"].tolist()
        assert found.var_names.tolist() == adata.var_names.tolist()
        with pytest.raises(UserError, match="no column 'feature' for --gene_names"):
            call(model, given, gene_names="feature", progress=False)


def test_versions_are_taken_off_where_asked(tmp_path: Path) -> None:
    adata = data(120)
    adata.var_names = [name.split(".")[0] for name in adata.var["gene_ids"]]
    run = tmp_path / "run"
    assert main(["train", "--data_path", h5ad(tmp_path / "plain", adata), "--checkpoint_dir", str(run), *TINY_FLAGS, "--num_epochs", "1"]) == 0
    own = Pretrained.load(run)
    adata.var_names = adata.var["gene_ids"].tolist()
    with pytest.raises(UserError, match="Pass --strip_version"):
        embed(own, adata[:, 1:].copy()[:, [k for k in range(59) if k % 7 != 6]].copy(), progress=False)
    assert embed(own, adata, strip_version=True, progress=False).var_names[8] == "ENSG00000000008"


def test_data_are_read_as_those_of_the_training_were(tmp_path: Path) -> None:
    adata = data(120)
    adata.var["feature_types"] = np.array(TYPES)[(np.arange(adata.n_vars) % 4 == 3).astype(int)]
    adata.X.data[:50] += np.float32(0.25)
    tenx = tenx_3(tmp_path / "in", adata)
    with h5py.File(tenx, "a") as file:
        values = file["matrix/data"][:].astype(np.float32)
        del file["matrix/data"]
        values[:50] += np.float32(0.25)
        file["matrix/data"] = values
    flags = ["--modality", TYPES[1], "--gene_names", "gene_ids", "--strip_version", "--round"]
    run = tmp_path / "run"
    assert main(["train", "--data_path", tenx, "--checkpoint_dir", str(run), *TINY_FLAGS, "--num_epochs", "1", *flags]) == 0
    own = Pretrained.load(run)
    taken = adata.var["feature_types"] == TYPES[1]
    assert sorted(own.genes) == sorted(name.split(".")[0] for name in adata.var["gene_ids"][taken])
    with pytest.warns(SeddWarning, match="values that were read were fractions and were rounded"):
        found = impute(own, tenx, hide=0.2, cells="val", progress=False)
    assert set(found.var_names) == set(own.genes)
    assert not evaluate(own, tenx, n_masks=2, num_steps=2, steps=(), umap=False, progress=False).notes
    store = own.state["data"]["path"]
    again = impute(own, store, hide=0.2, cells="val", progress=False)
    assert np.array_equal(dense(again.layers["counts"]), dense(found.layers["counts"]))


def test_a_run_on_several_inputs_is_evaluated_on_their_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = data(100), data(100)
    two.X = two.X * np.float32(3)  # cells of their own
    two.obs_names = [f"other{k}" for k in range(100)]
    paths = [h5ad(tmp_path / "one", one), h5mu(tmp_path / "two", two)]
    run = tmp_path / "run"
    assert main(["train", "--data_path", *paths, "--checkpoint_dir", str(run), *TINY_FLAGS, "--num_epochs", "1"]) == 0
    own = Pretrained.load(run)
    assert own.config.data.paths == tuple(paths)
    store = own.state["data"]["path"]
    assert f"Next: sedd evaluate {run} {store} -o {run}" in capsys.readouterr().err
    held_out, one_input = (evaluate(own, given, n_masks=2, num_steps=2, steps=(), umap=False, progress=False) for given in (store, paths[1]))
    assert held_out.metrics["likelihood"]
    assert "the counts of a training cell" not in " ".join(held_out.notes)
    trained = ad.read_zarr(store)[split_of(own.state, "train").cells()]
    n_seen = int((((dense(trained.X) > 0).sum(1) >= 20) & trained.obs_names.str.startswith("other")).sum())  # cells of few genes may be alike by chance
    assert f"At least {n_seen} of the 100 cells measured have the counts of a training cell" in " ".join(one_input.notes)
    with pytest.raises(UserError, match="no val cells; pass .*one.*, which has them, or --cells all"):
        embed(own, paths[1], cells="val", progress=False)


def test_fractions_are_rounded_in_tasks_where_asked(model: Pretrained, tmp_path: Path) -> None:
    adata = data()
    expected = denoise(model, adata, rounds=1, folds=2, progress=False)
    adata.X.data[:70] += np.float32(0.25)
    for given in (adata, h5ad(tmp_path / "in", adata)):
        with pytest.raises(UserError, match="not a whole number .* fractions, .* --round rounds them"):
            denoise(model, given, rounds=1, folds=2, progress=False)
        with pytest.warns(SeddWarning, match="70 values that were read were fractions and were rounded"):
            found = denoise(model, given, rounds=1, folds=2, round=True, progress=False)
        assert np.array_equal(dense(found.X), dense(expected.X))


def test_elements_are_left_out_of_results(model: Pretrained, tmp_path: Path) -> None:
    adata = data()
    adata.obsm["X_pca"], adata.uns["note"], adata.uns["other"] = np.ones((60, 2)), "a", "b"
    path = h5ad(tmp_path / "in", adata)
    for given in (adata, path):
        for call, keywords in ((embed, {}), (impute, {"hide": 0.2})):
            for output in (None, tmp_path / "out.h5ad"):
                found = call(model, given, drop=("obsm", "uns/note", "obs/batch"), progress=False, output=output, overwrite=True, **keywords)  # type: ignore[operator]
                found = found if output is None else ad.read_h5ad(output)
                assert set(found.obsm) == ({"X_sedd"} if call is embed else set())
                assert set(found.uns) == {"sedd", "other"}
                assert "batch" not in found.obs
        with pytest.raises(UserError, match=r"has no uns/nope \(--drop\)"):
            embed(model, given, drop=("uns/nope",), progress=False)


def test_commands_take_these_flags(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = h5mu(tmp_path / "in", data())
    with h5py.File(path, "a") as file:
        file.copy("mod/rna", "mod/adt")
    words = ["denoise", str(tiny_run), path, "-o", str(tmp_path / "out.h5ad"), "--rounds", "1", "--folds", "2"]
    assert main(words) == 2
    assert "modalities adt, rna; choose one with --modality" in capsys.readouterr().err
    assert main([*words, "--modality", "rna"]) == 0
    assert ad.read_h5ad(tmp_path / "out.h5ad").n_obs == 60
