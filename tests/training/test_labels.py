"""Labels that a model is conditioned on, and what a checkpoint says of genes: missing values are missing, and 7 is 7 however it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import TINY_FLAGS, make_counts

from sedd import checkpoint
from sedd.cli import main
from sedd.errors import UserError
from sedd.inference.pretrained import Pretrained
from sedd.io.convert import convert
from sedd.io.format.json_table import packed_table, unpacked_table
from sedd.io.loader import CellLoader
from sedd.tasks import embed, generate, impute
from tests.io.tables import KINDS, column

N = 60


def train(adata: ad.AnnData, folder: Path, *flags: str) -> int:
    adata.write_h5ad(folder / "a.h5ad")
    few = ["--num_epochs", "1", "--val_fraction", "0.2"]
    return main(["train", "--data_path", str(folder / "a.h5ad"), "--checkpoint_dir", str(folder / "run"), *TINY_FLAGS, *few, *flags])


CLUSTERS: dict[str, Any] = {
    "int": lambda k, missing: np.where(missing, 3, k),
    "float": lambda k, missing: np.where(missing, np.nan, k),
    "Int64": lambda k, missing: pd.array(np.where(missing, None, k), dtype="Int64"),
    "text": lambda k, missing: np.where(missing, None, k.astype(str)),
    "categories of float": lambda k, missing: pd.Categorical(np.where(missing, np.nan, k), categories=[8.0, 3.0, 7.0, 12.0]),
    "categories of text": lambda k, missing: pd.Categorical(np.where(missing, None, k.astype(str)), categories=["8", "12", "3", "7"]),
    "string": lambda k, missing: pd.array(np.where(missing, None, k.astype(str)), dtype="string"),
}


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_cluster_has_one_label_however_its_number_is_kept(kind: str, tmp_path: Path) -> None:
    adata = make_counts(N)
    rng = np.random.default_rng(0)
    number, missing = rng.choice([3, 7, 8], N), rng.random(N) < 0.2
    number = np.where(missing, 3, number) if kind == "int" else number
    adata.obs["cluster"] = CLUSTERS[kind](number, missing)
    assert train(adata, tmp_path, "--condition", "cluster") == 0
    model = Pretrained.load(tmp_path / "run")
    labels = model.categories["cluster"]
    assert sorted(labels) == ["3", "7", "8"]  # the category that no cell has is none
    expected = np.array([labels.index(str(k)) + 1 for k in number])
    there = expected if kind == "int" else np.where(missing, 0, expected)
    for same in ("int", kind):
        values = pd.Series(CLUSTERS[same](number, missing)).to_numpy(object)
        codes = model.condition_codes("cluster", values)
        assert np.array_equal(codes[~missing], expected[~missing])
        assert kind == "int" or same == "int" or (codes[missing] == 0).all()
    with CellLoader(str(tmp_path / "a.sedd.zarr"), labels=["cluster"], split="all", shuffle=False, batch_size=N) as loader:
        assert np.array_equal(next(iter(loader)).labels["cluster"].numpy() + 1, there)
    drawn = [generate(model, 3, where={"cluster": label}, num_steps=2, progress=False) for label in ("7", 7, 7.0)]
    for made in drawn:
        assert (made.obs["cluster"] == "7").all()
        assert np.array_equal(made.X.toarray(), drawn[0].X.toarray())
    for label in (None, np.nan, pd.NA):
        assert "cluster" not in generate(model, 1, where={"cluster": label}, num_steps=2, progress=False).obs
    with pytest.raises(UserError, match=r"cluster='12' was not there in training; known: .*Use one of these\.$"):
        generate(model, 1, where={"cluster": 12}, num_steps=2, progress=False)
    given = embed(model, adata, progress=False).obsm["X_sedd"]
    adata.obs["cluster"] = [str(k) if known else None for k, known in zip(number, there > 0, strict=True)]
    assert np.array_equal(embed(model, adata, progress=False).obsm["X_sedd"], given)


def test_labels_of_a_mixed_column_that_say_the_same_are_one(tmp_path: Path) -> None:
    adata = make_counts(N)
    adata.write_h5ad(tmp_path / "a.h5ad")
    store = convert(tmp_path / "a.h5ad", tmp_path / "a.zarr", progress=False)
    store.obs["mixed"] = np.array([7, "7", 7.0, "B", None, np.nan] * 10, object)
    with CellLoader(store, labels=["mixed"], split="all", shuffle=False, batch_size=6) as loader:
        codes = next(iter(loader)).labels["mixed"].numpy()
        assert sorted(str(label).removesuffix(".0") for label in loader.label_categories["mixed"]) == ["7", "B"]
    assert codes[0] == codes[1] == codes[2] != codes[3]
    assert codes[3] >= 0 and codes[4] == codes[5] == -1
    with CellLoader(store, weights={"mixed": {7: 1.0}}, split="all", batch_size=N) as loader:
        assert set(next(iter(loader)).cell.numpy() % 6) == {0, 1, 2}


def test_numbers_that_are_no_labels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_counts(N)
    assert train(adata, tmp_path, "--condition", "depth") == 2
    assert "is continuous" in capsys.readouterr().err


def test_names_of_cells_as_labels_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_counts(N)
    adata.obs["barcode"] = [f"cell{i}" if i else None for i in range(N)]
    assert train(adata, tmp_path, "--condition", "barcode", "cell_type") == 0
    said = capsys.readouterr().err
    assert f"--condition barcode: has {N - 1} different labels for {N - 1} cells" in said
    assert "--condition cell_type" not in said


def test_missing_labels_that_became_text_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_counts(N)
    adata.obs["text"] = ["nan", "B"] * (N // 2)
    assert train(adata, tmp_path, "--condition", "text", "cell_type") == 0
    said = capsys.readouterr().err
    assert "--condition text: 'nan' is learned as a label like any other" in said
    assert "--condition cell_type" not in said


def test_labels_that_differ_by_blanks_or_capitals_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_counts(N)
    adata.obs["kind"] = np.where(np.arange(N) % 3, "T cell", "t cell ")
    assert train(adata, tmp_path, "--condition", "kind") == 0
    said = capsys.readouterr().err
    assert said.count("'T cell' and 't cell ' are learned as two labels. If they are one") == 1
    assert "replace({'t cell ': 'T cell'})" in said


def test_a_run_is_not_resumed_with_other_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_counts(N)
    assert train(adata, tmp_path, "--condition", "donor") == 0
    adata.obs["donor"] = ["d1", "d3"] * (N // 2)
    assert train(adata, tmp_path, "--condition", "donor", "--resume", "auto", "--num_epochs", "2") == 2
    assert "obs['donor'] of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_table_is_unpacked_as_it_was(kind: str) -> None:
    index = pd.Index([f"g{k}" for k in range(20)])
    table = pd.DataFrame({"whole": column(kind, 20, False, 0).array, "G1/S": column(kind, 20, True, 1).array}, index=index)
    pd.testing.assert_frame_equal(unpacked_table(packed_table(table), index), table)


def test_what_the_data_say_of_genes_comes_with_generated_cells(tmp_path: Path) -> None:
    adata = make_counts(N)
    for k, kind in enumerate(KINDS):
        adata.var[kind] = column(kind, 60, True, k).array
    assert train(adata, tmp_path) == 0
    adata = ad.read_h5ad(tmp_path / "a.h5ad")
    assert isinstance(checkpoint.load(tmp_path / "run" / "best.pt")["var"], dict)
    for model in (Pretrained.load(tmp_path / "run"), Pretrained.load(tmp_path / "run").save_pretrained(tmp_path / "handed on")):
        made = generate(model, 2, num_steps=2, progress=False)
        pd.testing.assert_frame_equal(made.var, adata.var)
        again = impute(model, adata, hide=0.1, progress=False)
        pd.testing.assert_frame_equal(again.var, adata.var)


@pytest.mark.parametrize("columns", [("donor", "donor"), ("donor", "donor_probability")])
def test_conditions_whose_answers_would_have_one_name_are_refused(columns: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_counts(N)
    adata.obs[columns[1]] = adata.obs["donor"].to_numpy()
    assert train(adata, tmp_path, "--condition", *columns) == 2
    assert "each column once, and no X_probability beside X" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
