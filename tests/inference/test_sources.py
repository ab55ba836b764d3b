"""Cells come from an AnnData of any kind or a file, and every task reads the same counts of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import dask.array as da
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import dense, make_counts

from sedd.cli import main
from sedd.errors import UserError
from sedd.inference.cells import Cells
from sedd.inference.matrices import Rows
from sedd.inference.pretrained import Pretrained
from sedd.inference.sources import opened
from sedd.learning import train
from sedd.tasks import denoise, embed, impute

pytestmark = pytest.mark.filterwarnings("ignore:.* of the model's:sedd.errors.SeddWarning")

GENES = np.array([f"gene{i}" for i in range(60)], object)


def twice(dtype: Any) -> sp.csr_matrix:
    """Three cells whose first has an entry that is stored twice, and does not fit its type when summed."""
    value = {"uint8": 200, "int8": 100, "bool": True}.get(np.dtype(dtype).name, 200)
    values, indices, indptr = [value, value, 1, 3], [3, 3, 5, 0], [0, 2, 3, 4]
    return sp.csr_matrix((np.array(values).astype(dtype), np.array(indices), np.array(indptr)), shape=(3, 60))


def in_file(adata: ad.AnnData, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anndata, about the version of the format
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)
    return path


MATRICES: dict[str, Any] = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dense": np.asarray,
    "by columns": np.asfortranarray,
    "float16": lambda x: x.astype(np.float16),
    "int32": lambda x: sp.csr_matrix(x.astype(np.int32)),
    "uint8": lambda x: x.astype(np.uint8),
    "dask": lambda x: da.from_array(x, chunks=(50, 60)),
    "dask csr": lambda x: da.from_array(x, chunks=(50, 60)).map_blocks(sp.csr_matrix),
    "dask csr_array": lambda x: da.from_array(x, chunks=(50, 60)).map_blocks(sp.csr_array),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_counts_are_those_of_the_matrix_however_it_is_kept(kind: str) -> None:
    adata = make_counts(150)
    expected = dense(adata.X)
    adata.X = MATRICES[kind](expected)
    assert np.array_equal(Cells(adata, GENES).counts(0, 150), expected)
    assert np.array_equal(Cells(adata, GENES[::-1]).counts(20, 70), expected[20:70, ::-1])
    view = adata[::2, 5:]
    assert np.array_equal(Cells(view, GENES).counts(0, 75)[:, 5:], expected[::2, 5:])
    some = np.array([0, 3, 4, 149])
    assert np.array_equal(Cells(adata, GENES, cells=some).counts(0, 4), expected[some])


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("kind", ["csr", "csc", "dense", "float16"])
def test_counts_of_files_are_those_of_memory(kind: str, suffix: str, tmp_path: Path) -> None:
    adata = make_counts(150)
    expected = dense(adata.X)
    adata.X = MATRICES[kind](expected)
    adata.raw = adata.copy()
    adata.layers["counts"] = adata.X
    path = in_file(adata, tmp_path / f"a{suffix}")
    some = np.array([1, 2, 140])
    with opened(path) as source:
        for place in ({}, {"layer": "counts"}, {"raw": True}):
            assert np.array_equal(Cells(source, GENES, **place).counts(0, 150), expected)
            assert np.array_equal(Cells(source, GENES, cells=some, **place).counts(0, 3), expected[some])
    lazy = ad.experimental.read_lazy(path)
    assert np.array_equal(Cells(lazy, GENES).counts(0, 150), expected)
    if suffix == ".h5ad":
        backed = ad.read_h5ad(path, backed="r")
        for adata in (backed, backed[10:20]):
            for place in ({}, {"layer": "counts"}, {"raw": True}):
                n = adata.n_obs
                assert np.array_equal(Cells(adata, GENES, **place).counts(0, n), expected[10:20] if n == 10 else expected)
        backed.file.close()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool", "float32", "int64"])
def test_entries_that_are_stored_twice_are_added_up_in_a_type_that_holds_the_sum(dtype: str, tmp_path: Path) -> None:
    matrix = twice(dtype)
    expected = np.zeros((3, 60))
    expected[0, 3], expected[1, 5], expected[2, 0] = 2 * float(matrix.data[0]), float(matrix.data[2]), float(matrix.data[3])
    by_columns = sp.csc_matrix((matrix.data[[3, 0, 1, 2]], np.array([2, 0, 0, 1]), np.r_[0, 1, 1, 1, 3, 3, [4] * 55]), shape=(3, 60))
    before = matrix.data.copy()
    for kept in (matrix, by_columns, sp.csr_array(matrix), matrix.tocoo()):
        assert np.array_equal(Rows(kept).take(np.arange(3)).toarray(), expected)
    assert np.array_equal(matrix.data, before)  # a user's matrix is not touched
    if dtype != "bool":  # which anndata stores otherwise
        for kept in (matrix, by_columns):
            path = in_file(ad.AnnData(kept, var=make_counts(3).var), tmp_path / f"{kept.format}.h5ad")
            with opened(path) as source:
                assert np.array_equal(Cells(source, GENES).counts(0, 3), expected)
                again = source.whole()
                assert np.array_equal(Cells(again, GENES).counts(0, 3), expected)


def test_half_precision_in_a_sparse_matrix_of_a_file_is_read(model: Pretrained, tmp_path: Path) -> None:
    adata = make_counts(60)
    path = in_file(adata, tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:]
        del file["X/data"]
        file["X/data"] = values.astype(np.float16)
    said = embed(model, path, progress=False)
    assert np.array_equal(said.obsm["X_sedd"], embed(model, adata, progress=False).obsm["X_sedd"])
    assert np.array_equal(dense(said.X), dense(adata.X))


def test_a_masked_value_and_a_column_that_is_not_there_are_refused() -> None:
    values = np.ma.masked_array(np.ones((3, 60)), mask=np.zeros((3, 60), bool))
    values[1, 2] = np.ma.masked
    with pytest.raises(UserError, match=r"not finite \(nan at cell 1, gene 'gene2'\)"):
        Cells(ad.AnnData(values, var=make_counts(3).var), GENES).counts(0, 3)
    matrix = twice(np.float32)
    matrix.indices[2] = 60
    with pytest.raises(UserError, match="an entry in column 60, and there are 60 genes"):
        Rows(matrix).take(np.arange(3))
    with pytest.raises(UserError, match="complex64; expected numbers"):
        Rows(matrix.astype(np.complex64))


def test_backed_and_lazy_cells_and_views_are_embedded_as_those_in_memory(model: Pretrained, tmp_path: Path) -> None:
    adata = make_counts(100)
    adata.obs["label"] = adata.obs["cell_type"].cat.add_categories(["unused"])
    adata.uns["label_colors"] = ["#000000", "#111111", "#222222", "#333333"]
    path = in_file(adata, tmp_path / "a.h5ad")
    expected = embed(model, adata, progress=False)
    backed = ad.read_h5ad(path, backed="r")
    for given in (backed, ad.experimental.read_lazy(path), path):
        found = embed(model, given, progress=False)
        assert np.array_equal(found.obsm["X_sedd"], expected.obsm["X_sedd"])
        assert found.obs.equals(expected.obs)
        pd.testing.assert_frame_equal(found.var, expected.var, check_dtype=False)  # lazily, anndata 0.13 reads text as "string"
        assert np.array_equal(dense(found.X), dense(adata.X))
        assert list(found.uns["label_colors"]) == adata.uns["label_colors"]
        out = tmp_path / "out.h5ad"
        embed(model, given, output=out, overwrite=True, progress=False)
        written = ad.read_h5ad(out)
        assert np.array_equal(written.obsm["X_sedd"], expected.obsm["X_sedd"])
        assert written.obs.equals(expected.obs)
        assert list(written.uns["label_colors"]) == adata.uns["label_colors"]
    view = backed[30:40]
    assert np.array_equal(embed(model, view, progress=False).obsm["X_sedd"], expected.obsm["X_sedd"][30:40])
    for task in (impute, denoise):
        for given in (backed, ad.experimental.read_lazy(path), view):
            rows = slice(30, 40) if given is view else slice(None)
            made = task(model, given, folds=2, progress=False)
            assert np.array_equal(dense(made.layers["counts"]), dense(adata.X)[rows])
    backed.file.close()


def in_raw(n: int = 240) -> ad.AnnData:
    """Cells as CELLxGENE has them: X normalised, counts of more genes in raw."""
    adata = make_counts(n)
    adata.raw = adata.copy()
    adata = adata[:, :40].copy()
    adata.X = adata.X.log1p()
    return adata


@pytest.mark.parametrize("suffix", [None, ".h5ad", ".zarr"])
def test_counts_in_raw_are_found_when_asked_for(suffix: str | None, model: Pretrained, tmp_path: Path) -> None:
    adata, plain = in_raw(), make_counts()
    data = adata if suffix is None else in_file(adata, tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match=r"not a whole number .* Pass where they are: --raw\.$"):
        impute(model, data, progress=False)
    with pytest.raises(UserError, match="give --layer or --raw, not both"):
        impute(model, data, layer="X", raw=True, progress=False)
    with pytest.raises(UserError, match=r"has no \.raw; there are: --layer X\."):
        impute(model, plain, raw=True, progress=False)
    for task, key in ((impute, "X"), (denoise, "X"), (embed, "X_sedd")):
        here, there = (task(model, given, raw=raw, progress=False) for given, raw in ((data, True), (plain, False)))
        if key == "X":
            assert np.array_equal(dense(here.X), dense(there.X))
            assert here.var.equals(there.var)
        else:
            assert np.array_equal(here.obsm[key], there.obsm[key])
            assert here.n_vars == 40
            assert np.array_equal(dense(here.raw.X), dense(plain.X))


def test_the_commands_take_counts_from_raw(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = str(tiny_run), str(in_file(in_raw(), tmp_path / "a.h5ad"))
    for task in ("impute", "denoise", "embed"):
        assert main([task, run, data, "-o", str(tmp_path / f"{task}.h5ad")]) == 2
        assert "--raw" in capsys.readouterr().err
        assert main([task, run, data, "-o", str(tmp_path / f"{task}.h5ad"), "--raw"]) == 0
    few = ["--n_masks", "1", "--num_steps", "2", "--steps", "1", "--no_umap"]
    assert main(["evaluate", run, data, "-o", str(tmp_path / "report"), "--raw", *few]) == 0
    embedded = ad.read_h5ad(tmp_path / "embed.h5ad")
    assert embedded.raw.shape == (240, 60)
    assert embedded.shape == (240, 40)


def test_a_model_that_was_trained_on_raw_looks_there(model: Pretrained) -> None:
    trained = {**model.state, "args": {**model.state["args"], "raw": True}}
    model = Pretrained(**{**vars(model), "state": trained})
    assert np.array_equal(dense(impute(model, in_raw(), hide=0.1, progress=False).layers["counts"]), dense(make_counts().X))
    with pytest.raises(UserError, match=r"has no \.raw, from which the model was trained\. Pass where the counts are: --layer X\."):
        impute(model, make_counts(), progress=False)
    assert impute(model, make_counts(), layer="X", progress=False).n_obs == 240


@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_a_column_whose_name_is_a_number_conditions_a_model_and_is_seen_by_tasks(tmp_path: Path) -> None:
    adata = make_counts(60)
    adata.obs[7] = np.where(np.arange(60) % 2, "x", "y")
    small = {"genes": "all", "num_epochs": 1, "hidden_dim": 16, "num_layers": 1, "num_heads": 2, "log_with": "none"}
    trained = train(adata, condition=["7"], **small)
    assert trained is not None
    assert list(trained.categories) == ["7"]
    named = adata.copy()
    named.obs = named.obs.rename(columns={7: "7"})
    found, expected = (embed(trained, data, progress=False) for data in (adata, named))
    np.testing.assert_array_equal(found.obsm["X_sedd"], expected.obsm["X_sedd"])
    assert 7 in found.obs  # as it was given
