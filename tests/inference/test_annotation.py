"""Labels of cells: exact on an enumerated joint, from any of the genes, and not from the labels that the data have."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from conftest import TINY_FLAGS, make_counts
from toy import Joint, exact_with_labels

import sedd
from sedd.cli import main
from sedd.errors import SeddWarning, UserError
from sedd.inference.annotation import annotate
from sedd.inference.pretrained import Pretrained

JOINTS = [Joint.random(4, 3, seed=s) for s in range(3)]


@pytest.mark.parametrize("missing", [(), (2,), (0, 3)])
@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_probabilities_are_those_of_bayes_on_an_enumerated_joint(missing: tuple[int, ...]) -> None:
    states = JOINTS[0].states.numpy()
    there = [k for k in range(4) if k not in missing]
    data = ad.AnnData(states[:, there].astype(np.float32))
    data.var_names = [f"gene{k}" for k in there]
    found = annotate(exact_with_labels(*JOINTS), data, progress=False)
    tables = [joint.p.sum(missing, keepdim=True) if missing else joint.p for joint in JOINTS]
    p = np.stack([table.expand(3, 3, 3, 3).flatten().numpy() for table in tables], 1)
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(found.obsm["sedd_kind_probability"], p, rtol=1e-5)
    assert list(found.uns["sedd"]["labels"]["kind"]) == ["a", "b", "c"]
    assert list(found.obs["sedd_kind"]) == ["abc"[k] for k in p.argmax(1)]
    np.testing.assert_allclose(found.obs["sedd_kind_probability"], p.max(1), rtol=1e-5)
    assert list(found.obs["sedd_kind"].cat.categories) == ["a", "b", "c"]


def test_labels_of_the_data_are_not_looked_at_unless_they_are_given(tiny_h5ad: Path, tmp_path: Path) -> None:
    flags = ["--condition", "cell_type", "donor", "--condition_dropout", "0.2"]
    assert main(["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(tmp_path / "run"), *TINY_FLAGS, *flags]) == 0
    model, adata = Pretrained.load(tmp_path / "run"), make_counts()
    other = adata.copy()
    other.obs["cell_type"] = "unheard of"
    other.obs["donor"] = adata.obs["donor"].to_numpy()[::-1]
    first, second = (sedd.annotate(model, data, progress=False) for data in (adata, other))
    for column in ("cell_type", "donor"):
        assert np.array_equal(first.obsm[f"sedd_{column}_probability"], second.obsm[f"sedd_{column}_probability"])
    right = first.obs["sedd_cell_type"].astype(str) == adata.obs["cell_type"].astype(str)
    assert right[1:].mean() > 0.6  # after two epochs, by chance a third
    assert second.obs["cell_type"].eq("unheard of").all()
    given = [annotate(model, data, given=["donor"], progress=False) for data in (adata, other)]
    assert not np.array_equal(*(result.obsm["sedd_cell_type_probability"] for result in given))
    assert "sedd_donor" not in given[0].obs and list(given[0].uns["sedd"]["given"]) == ["donor"]
    out = tmp_path / "a.h5ad"
    assert main(["annotate", str(tmp_path / "run"), str(tiny_h5ad), "-o", str(out), "--given", "donor"]) == 0
    read = ad.read_h5ad(out)
    np.testing.assert_array_equal(read.obsm["sedd_cell_type_probability"], given[0].obsm["sedd_cell_type_probability"])
    assert read.obs["sedd_cell_type"].equals(given[0].obs["sedd_cell_type"])
    assert list(read.uns["sedd"]["labels"]) == ["cell_type"]


def test_half_of_the_genes_say_what_a_cell_is(model: Pretrained) -> None:
    adata = make_counts()[:, ::2].copy()
    with pytest.warns(SeddWarning, match="has 30 of the model's 60 genes"):
        found = annotate(model, adata, progress=False)
    assert (found.obs["sedd_cell_type"].astype(str) == adata.obs["cell_type"].astype(str))[1:].mean() > 0.7  # after two epochs, by chance a third
    assert len(found.uns["sedd"]["missing_genes"]) == 30


def test_cells_without_counts_of_the_panel_are_warned_of(model: Pretrained) -> None:
    adata = make_counts()
    adata.X = adata.X.multiply(np.arange(adata.n_obs)[:, None] >= 2).tocsr()
    with pytest.warns(SeddWarning, match="2 of its 240 cells have no counts of the model's genes"):
        annotate(model, adata, progress=False)


def test_annotating_again_replaces_the_labels_of_before(model: Pretrained, tmp_path: Path) -> None:
    make_counts().write_h5ad(tmp_path / "a.h5ad")
    annotate(model, tmp_path / "a.h5ad", output=tmp_path / "b.h5ad", progress=False)
    with pytest.warns(SeddWarning, match=r"has obs\['sedd_cell_type'\], .* already"):
        again = annotate(model, tmp_path / "b.h5ad", output=tmp_path / "c.h5ad", progress=False)
    first, second = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in "bc")
    assert first.obs.equals(second.obs) and again.obs.equals(first.obs)


def test_what_cannot_be_annotated_is_an_error_that_leaves_nothing(model: Pretrained, tiny_h5ad: Path, tmp_path: Path) -> None:
    out = {"output": tmp_path / "x.h5ad", "progress": False}
    data = tmp_path / "plain.h5ad"
    plain = make_counts()
    del plain.obs["cell_type"]
    plain.write_h5ad(data)
    with pytest.raises(UserError, match="--given donor: the model knows no such labels; its condition columns are: cell_type"):
        annotate(model, data, given=["donor"], **out)
    with pytest.raises(UserError, match="names all condition columns"):
        annotate(model, data, given=["cell_type"], **out)
    for name, flags, said in (
        ("nothing", [], "was trained without labels; expected a model trained with --condition"),
        ("uniform", ["--graph", "uniform", "--condition", "cell_type"], "needs a model that predicts hidden genes"),
        ("two", ["--condition", "cell_type", "donor"], "--given cell_type: .*plain.h5ad has no such obs column; there are: donor, depth"),
    ):
        folder = tmp_path / name
        assert main(["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(folder), *TINY_FLAGS, "--num_epochs", "1", *flags]) == 0
        with pytest.raises(UserError, match=said):
            annotate(folder, data, given=["cell_type"] * (name == "two"), **out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nothing", "plain.h5ad", "two", "uniform"]
