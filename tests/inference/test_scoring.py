"""How improbable cells are: the bound itself, beside cells of their depth, with what the model is given and with genes missing."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import TINY_FLAGS, dense, make_counts
from toy import Joint, exact

import sedd
from sedd.cli import main
from sedd.errors import SeddWarning, UserError
from sedd.graph import UniformGraph
from sedd.inference.pretrained import Pretrained
from sedd.inference.scoring import score
from sedd.likelihood import CellBatch, nelbo, nelbo_and_excess
from sedd.metrics.surprise import surprise


def test_nats_of_an_enumerated_joint_are_its_own() -> None:
    joint = Joint.random(3, 4)
    cells = joint.sample(3000, seed=1)
    data, others = (ad.AnnData(x.numpy().astype(np.float32)) for x in (cells, joint.sample(50, seed=2)))
    data.var_names = others.var_names = ["gene0", "gene1", "gene2"]
    found = score(exact(joint), data, reference=others, n_masks=12, progress=False).obs["sedd_nats"]
    state = (cells * 4 ** torch.arange(2, -1, -1)).sum(1)
    off = found.to_numpy() + joint.p.flatten().log()[state].numpy()
    assert abs(off.mean()) < 4 * off.std() / len(off) ** 0.5 < 0.1


def test_of_cells_of_the_model_itself_the_excess_has_mean_0_and_of_others_more() -> None:
    joint, other = Joint.random(3, 4), Joint.random(3, 4, seed=1)
    model = exact(joint)
    given = (model.model, model.graph, model.noise)
    nats, excess = nelbo_and_excess(*given, [joint.sample(8000, seed=1)], n_masks=6)
    assert abs(excess.mean()) < 4 * excess.std() / len(excess) ** 0.5 < 0.1
    np.testing.assert_allclose(nats, nelbo(*given, [joint.sample(8000, seed=1)], n_masks=6).per_cell, rtol=1e-6)
    cells = joint.sample(8000, seed=1)
    assert nelbo_and_excess(*given, [other.sample(2000, seed=2)], n_masks=6)[1].mean() > 10 * excess.std() / len(excess) ** 0.5
    few = nelbo_and_excess(*given, [CellBatch(cells[:500], missing=torch.tensor([False, True, False]))], n_masks=6)[1]
    assert abs(few.mean()) < 5 * few.std() / 500**0.5
    again = nelbo_and_excess(*given, cells.split(37), n_masks=6)[1]
    np.testing.assert_allclose(again, excess, atol=1e-9)  # draws belong to cells
    with pytest.raises(UserError, match="uniform graph hides none"):
        nelbo_and_excess(model.model, UniformGraph(4), model.noise, [cells])


def test_it_is_the_bound_without_labels_and_totals_beside_the_validation_cells(
    model: Pretrained, tiny_h5ad: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.h5ad"
    assert main(["score", str(model.path), str(tiny_h5ad), "-o", str(out), "--n_masks", "4", "--batch_size", "50"]) == 0
    found, adata = ad.read_h5ad(out), make_counts()
    tokens = torch.from_numpy(model.binning.tokens(dense(adata.X)).astype(np.int64))
    nothing = torch.zeros((240, 1), dtype=torch.int64)
    nats = nelbo(model.model, model.graph, model.noise, [CellBatch(tokens, nothing)], n_masks=4).per_cell
    np.testing.assert_allclose(found.obs["sedd_nats"], nats, rtol=1e-5)
    val = adata.obs_names.get_indexer(sedd.embed(model, adata, cells="val", progress=False).obs_names)
    totals, itself = dense(adata.X).sum(1), np.full(240, -1)
    itself[val] = np.arange(24)
    excess = nelbo_and_excess(model.model, model.graph, model.noise, [CellBatch(tokens, nothing)], n_masks=4)[1]
    np.testing.assert_allclose(found.obs["sedd_surprise"], surprise(excess, totals, excess[val], totals[val], itself), atol=0.05)
    assert int(found.uns["sedd"]["n_reference"]) == 24
    assert found.obs[list(adata.obs)].equals(ad.read_h5ad(tiny_h5ad).obs)


def test_other_cells_are_found_and_depth_is_no_surprise(model: Pretrained) -> None:
    others = make_counts(400, seed=0)  # the rates of a seed are those of `make_counts(240, seed=0)`: the same draws come first
    mixed = others.copy()
    rng = np.random.default_rng(0)
    mixed.X = sp.csr_matrix(rng.permuted(dense(others.X), axis=1))  # each cell's counts at other genes: totals are the same
    reference = make_counts(240)
    asked = {"reference": reference, "progress": False, "n_masks": 8}
    same, strange = (score(model, data, **asked).obs["sedd_surprise"] for data in (reference, mixed))
    assert 0.35 < same.mean() < 0.65
    assert strange.mean() > 0.9
    deep = np.argsort(dense(reference.X).sum(1))[-60:]
    assert 0.25 < same.iloc[deep].mean() < 0.75


def test_given_its_label_a_cell_under_another_is_a_surprise(model: Pretrained) -> None:
    adata = make_counts()
    wrong = adata.copy()
    names = adata.obs["cell_type"].cat.categories
    wrong.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories(dict(zip(names, np.roll(names, 1), strict=True)))
    asked = {"given": ["cell_type"], "reference": adata, "progress": False, "n_masks": 4}
    right, other = (score(model, data, **asked).obs for data in (adata, wrong))
    assert other["sedd_nats"].mean() > right["sedd_nats"].mean()
    assert other["sedd_surprise"].mean() > right["sedd_surprise"].mean() + 0.05
    alone = [score(model, data, reference=adata, progress=False, n_masks=4).obs["sedd_nats"] for data in (adata, wrong)]
    assert alone[0].equals(alone[1])


def test_genes_that_the_data_lack_are_hidden_in_the_reference_as_well(model: Pretrained) -> None:
    adata = make_counts(n_obs=240)
    few = adata[:, ::2].copy()
    with pytest.warns(SeddWarning, match="has 30 of the model's 60 genes"):
        found, same = (score(model, few, reference=other, progress=False, n_masks=4).obs for other in (adata, few))
    assert found.equals(same)
    assert 0.4 < found["sedd_surprise"].mean() < 0.6


def test_what_cannot_be_scored_is_an_error_that_leaves_nothing(model: Pretrained, tiny_h5ad: Path, tmp_path: Path) -> None:
    out = {"output": tmp_path / "x.h5ad", "progress": False}
    adata = make_counts(30)
    with pytest.raises(UserError, match="--given donor: the model knows no such labels; its condition columns are: cell_type"):
        score(model, adata, given=["donor"], **out)
    with pytest.raises(UserError, match="--n_masks is 0"):
        score(model, adata, n_masks=0, **out)
    with pytest.raises(UserError, match="has 12 cells to compare with; expected at least 20"):
        score(model, adata, reference=make_counts(12), **out)
    with pytest.warns(SeddWarning), pytest.raises(UserError, match=r"lacks 10 genes of the model that .* has \(first: 'gene50'\)"):
        score(model, adata, reference=make_counts(40)[:, :50].copy(), **out)
    other = make_counts(40)
    del other.obs["cell_type"]
    with pytest.raises(UserError, match="--given cell_type: the reference, whose cells are compared with, has no such obs column"):
        score(model, adata, reference=other, given=["cell_type"], **out)
    uniform = tmp_path / "uniform"
    assert main(["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(uniform), *TINY_FLAGS, "--num_epochs", "1", "--graph", "uniform"]) == 0
    with pytest.raises(UserError, match="Scoring needs a model that predicts hidden genes"):
        score(uniform, adata, **out)
    folder = tmp_path / "always"
    flags = ["--num_epochs", "1", "--condition_library_size", "--condition_dropout", "0"]
    assert main(["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(folder), *TINY_FLAGS, *flags]) == 0
    with pytest.raises(UserError, match="was always given a cell's total"):
        score(folder, adata, reference=make_counts(40), **out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["always", "uniform"]


def test_without_the_data_of_the_training_a_reference_is_asked_for(tiny_run: Path, tmp_path: Path) -> None:
    handed_on = Pretrained.load(tiny_run).save_pretrained(tmp_path / "handed on")
    with pytest.raises(UserError, match=r"is not there any more; cells are compared with .* or with those of --reference FILE"):
        score(handed_on, make_counts(30, seed=4), progress=False)
    found = score(handed_on, make_counts(30, seed=4), reference=make_counts(40), n_masks=1, progress=False)
    assert found.obs["sedd_nats"].gt(0).all()
