"""Genes that the data lack are unknown, never 0: the same result as if they had been hidden, never that of explicit zeros."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import TINY_FLAGS, make_counts
from toy import ExactModel, Joint

from sedd.cli import main
from sedd.errors import SeddWarning, UserError
from sedd.evaluation import evaluate
from sedd.graph import AbsorbingGraph
from sedd.inference.annotation import annotate
from sedd.inference.pretrained import Pretrained
from sedd.likelihood import CellBatch, nelbo
from sedd.noise import LogLinearNoise
from sedd.tasks import denoise, embed, impute

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


def without(cells: ad.AnnData, missing: np.ndarray) -> ad.AnnData:
    return cells[:, ~missing].copy()


def zeroed(cells: ad.AnnData, missing: np.ndarray) -> ad.AnnData:
    dense = cells.X.toarray()
    dense[:, missing] = 0
    return ad.AnnData(sp.csr_matrix(dense), obs=cells.obs, var=cells.var)


@pytest.fixture(scope="module")
def model(tiny_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A model at a rate that suits two epochs, as what a zero says of other genes is looked at."""
    directory = tmp_path_factory.mktemp("runs") / "slow"
    flags = ["--condition", "cell_type", "--condition_library_size", "--learning_rate", "1e-3"]
    assert main(["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(directory), *TINY_FLAGS, *flags]) == 0
    return Pretrained.load(directory)


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return make_counts(24, 60, seed=5)


@pytest.fixture(scope="module")
def missing(model: Pretrained) -> np.ndarray:
    chosen = np.zeros(len(model.genes), bool)
    chosen[np.random.default_rng(1).choice(len(model.genes), 20, replace=False)] = True
    return chosen


def panel(cells: ad.AnnData, model: Pretrained) -> ad.AnnData:
    return cells[:, list(model.genes)].copy()


def test_denoising_does_not_count_missing_genes_as_zeros(model: Pretrained, cells: ad.AnnData, missing: np.ndarray) -> None:
    whole = panel(cells, model)
    found = denoise(model, without(whole, missing), own_counts="full", log1p=True, progress=False)
    zeros = denoise(model, zeroed(whole, missing), own_counts="full", log1p=True, progress=False)
    assert list(found.uns["sedd"]["missing_genes"]) == list(model.genes[missing])
    assert "missing_genes" not in zeros.uns["sedd"]
    # What the other genes of a cell say changes when they see a mask in place of a zero.
    assert np.abs(found.X[:, ~missing] - zeros.X[:, ~missing]).max() > 1e-4
    # A missing gene has no count of its own: with or without own counts it is what the others say.
    alone = denoise(model, without(whole, missing), own_counts="none", log1p=True, progress=False)
    np.testing.assert_allclose(found.X[:, missing], alone.X[:, missing], rtol=1e-4, atol=1e-6)
    assert (found.X[:, missing] > zeros.X[:, missing]).mean() > 0.9


def test_the_values_that_a_missing_gene_had_do_not_matter(model: Pretrained, cells: ad.AnnData, missing: np.ndarray) -> None:
    whole = panel(cells, model)
    other = whole.copy()
    dense = other.X.toarray()
    dense[:, missing] = 7
    other = ad.AnnData(sp.csr_matrix(dense), obs=whole.obs, var=whole.var)
    for task in (denoise, impute, embed, annotate):
        a, b = (task(model, without(data, missing), progress=False) for data in (whole, other))
        if task in (embed, annotate):
            key = "X_sedd" if task is embed else "sedd_cell_type_probability"
            np.testing.assert_array_equal(a.obsm[key], b.obsm[key])
        else:
            np.testing.assert_array_equal(a.X, b.X)


def test_imputing_with_a_missing_gene_still_imputes_the_zeros(model: Pretrained, cells: ad.AnnData) -> None:
    whole = panel(cells, model)
    one = np.arange(len(model.genes)) == 3
    found = impute(model, without(whole, one), progress=False)
    hidden = np.asarray(found.layers["sedd_hidden"].toarray() if sp.issparse(found.layers["sedd_hidden"]) else found.layers["sedd_hidden"])
    expected = np.where(one, True, whole.X.toarray() == 0)
    np.testing.assert_array_equal(hidden.astype(bool), expected)
    np.testing.assert_array_equal(np.asarray(found.X)[~expected], whole.X.toarray()[~expected])


def test_the_bound_is_of_the_genes_that_are_there() -> None:
    """With the exact conditionals of an enumerated joint, the bound of some genes is the entropy of their marginal law."""
    joint = Joint.random(n_vars=4, n_bins=3, seed=0)
    exact, graph, p = ExactModel(joint), AbsorbingGraph(3), joint.p.flatten()
    missing = torch.tensor([False, True, False, False])
    states = joint.states
    known = states[:, ~missing]
    expected = 0.0
    for row, share in zip(known, p.tolist(), strict=True):
        expected -= share * float(p[(known == row).all(1)].sum().log())
    garbled = states.clone()
    garbled[:, 1] = 0
    found = nelbo(exact, graph, LogLinearNoise(), [CellBatch(garbled, missing=missing)], n_masks=600, seed=0)
    assert found.n_vars == 3
    assert float((torch.from_numpy(found.per_cell) * p).sum()) == pytest.approx(expected, abs=0.02)


def test_evaluation_masks_missing_genes_and_measures_baselines_on_the_others(
    model: Pretrained, cells: ad.AnnData, missing: np.ndarray, tmp_path: Path
) -> None:
    whole = panel(cells, model)
    settings = {"steps": (), "n_masks": 4, "num_steps": 4, "progress": False, "umap": False}
    found = evaluate(model, without(whole, missing), **settings)
    zeros = evaluate(model, zeroed(whole, missing), **settings)
    assert any("20 of the model's 60 genes are not in the data" in note for note in found.notes)
    for who in ("sedd", *found.metrics["likelihood"]["nats_per_cell"]["baselines"]):
        mine, theirs = (
            e.metrics["likelihood"]["nats_per_cell"]["sedd" if who == "sedd" else "baselines"] for e in (found, zeros)
        )
        assert (mine if who == "sedd" else mine[who]) < (theirs if who == "sedd" else theirs[who])


def test_columns_of_var_keep_their_types_when_a_gene_is_missing(model: Pretrained, cells: ad.AnnData) -> None:
    whole = panel(cells, model)
    n = whole.n_vars
    whole.var = pd.DataFrame(
        {
            "kind": pd.Categorical(["a", "b"] * (n // 2), categories=["c", "b", "a"], ordered=True),
            "length": np.arange(n, dtype=np.int32),
            "coding": np.arange(n) % 2 == 0,
            "score": np.linspace(0, 1, n),
        },
        index=whole.var_names,
    )
    same = denoise(model, whole, rounds=1, progress=False).var
    pd.testing.assert_frame_equal(same, whole.var, check_names=False, check_index_type=False)
    one = np.arange(n) == 3
    found = denoise(model, without(whole, one), rounds=1, progress=False).var
    assert found["kind"].dtype == without(whole, one).var["kind"].dtype  # anndata drops unused categories when it takes a part
    assert (str(found["length"].dtype), str(found["coding"].dtype)) == ("Int32", "boolean")
    assert found.iloc[3].isna().all()
    assert found["length"].drop(found.index[3]).tolist() == whole.var["length"].drop(whole.var_names[3]).tolist()


def test_repeated_gene_names_are_said(model: Pretrained, cells: ad.AnnData) -> None:
    whole = panel(cells, model)
    twice = ad.AnnData(sp.hstack([whole.X, whole.X]).tocsr(), obs=whole.obs)
    twice.var_names = [*whole.var_names, *whole.var_names]
    with pytest.warns(SeddWarning, match="60 gene names repeat"):
        denoise(model, twice, rounds=1, progress=False)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_command_that_reads_data_several_times_warns_once(model: Pretrained, cells: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = panel(cells, model)
    twice.var_names = [*twice.var_names[:-1], twice.var_names[0]]
    twice.write_h5ad(tmp_path / "twice.h5ad")
    model.save_pretrained(tmp_path / "model")
    words = ["score", tmp_path / "model", tmp_path / "twice.h5ad", "--reference", tmp_path / "twice.h5ad", "--n_masks", 1, "-o", tmp_path / "out.h5ad"]
    for _ in range(2):  # and each command anew
        assert main([str(word) for word in [*words, "--overwrite"]]) == 0
        assert capsys.readouterr().err.count("gene names repeat") == 1


def test_a_share_to_hide_that_hides_nothing_is_refused(model: Pretrained, cells: ad.AnnData) -> None:
    with pytest.raises(UserError, match="--hide is 0.0001, which is none of the model's 60 genes"):
        impute(model, cells, hide=1e-4, progress=False)


@pytest.mark.parametrize("labels", [[7, 8], [7.0, 8.0], ["7", "8"], [np.int64(7), "8.0"]])
def test_seven_is_one_label_however_it_is_written(model: Pretrained, labels: list[object]) -> None:
    model = replace(model, categories={"batch": ["7", "8"]})
    assert model.condition_codes("batch", np.array(labels, object)).tolist() == [1, 2]
    missing = np.array([None, np.nan, pd.NA, pd.NaT], object)
    assert model.condition_codes("batch", missing).tolist() == [0, 0, 0, 0]
    with pytest.raises(UserError, match="leave batch out"):
        model.condition_codes("batch", np.array([9], object))
