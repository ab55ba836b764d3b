"""What a user's data hold beside the counts is in every result as anndata alone would have it, in memory and in files."""

from __future__ import annotations

import datetime
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import TINY_FLAGS, dense, make_counts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sedd.cli import main
from sedd.errors import UserError
from sedd.inference.annotation import annotate
from sedd.inference.pretrained import Pretrained
from sedd.inference.scoring import score
from sedd.io.convert import convert
from sedd.io.format.elements import free_names
from sedd.io.store import CellStore
from sedd.io.verify import verify
from sedd.tasks import denoise, embed, impute
from tests.io.conversion.test_tables import same_columns
from tests.io.tables import NAMES, tables

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")

N = 12
CELLS, GENES = [f"cell{k}" for k in range(N)], [f"gene{k}" for k in range(60)]
QUICK = settings(max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = settings(max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
UNS: dict[str, Any] = {"G1/S": {"a/b": 1, "nothing": "nan"}, "leiden_colors": np.array(["red", "blue"], object), "n": 3, "t": pd.DataFrame({"x/y": [1.5]})}
TASKS = {
    "impute": lambda model, data, **where: impute(model, data, hide=0.2, progress=False, **where),
    "denoise": lambda model, data, **where: denoise(model, data, rounds=1, folds=2, progress=False, **where),
    "embed": lambda model, data, **where: embed(model, data, progress=False, **where),
    "annotate": lambda model, data, **where: annotate(model, data, progress=False, **where),
    "score": lambda model, data, **where: score(model, data, reference=make_counts(40, seed=1), n_masks=2, progress=False, **where),
}
BESIDE = ("embed", "annotate", "score")
"""Tasks that put what they make beside the input."""


def own(made: pd.DataFrame) -> pd.DataFrame:
    """Columns of obs that a task did not make."""
    return made.iloc[:, [not str(name).startswith("sedd_") or name == "sedd_cell" for name in made.columns]]


def twice_in_uint8(values: np.ndarray) -> sp.csr_matrix:
    """Counts of up to 510 in uint8: each is stored as two entries."""
    indptr, indices, data = [0], [], []
    for row in values.astype(int):
        for column in np.flatnonzero(row):
            parts = [row[column] // 2, row[column] - row[column] // 2]
            indices += [column, column]
            data += parts
        indptr.append(len(indices))
    return sp.csr_matrix((np.array(data, np.uint8), np.array(indices, np.int32), np.array(indptr)), shape=values.shape)


MATRICES: dict[str, Any] = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "dense": np.asarray,
    "float16": lambda x: x.astype(np.float16),
    "dask": lambda x: da.from_array(x, chunks=(5, 60)),
    "stored twice in uint8": twice_in_uint8,
}


def values_of(seed: int) -> np.ndarray:
    values = dense(make_counts(N, seed=seed).X).copy()
    values[3, 7] = 400  # more than uint8 holds
    return values


def same_in_file(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    same_columns(found, expected)
    assert found.index.tolist() == expected.index.tolist()
    assert found.index.name in (expected.index.name, None)


def check(path: Path, kind: str, given: tuple[pd.DataFrame, pd.DataFrame], seed: int, model: Pretrained, task: str, suffix: str) -> None:
    """A task on one AnnData: in memory, and into a file."""
    values = values_of(seed)
    adata = ad.AnnData(MATRICES[kind](values), obs=given[0], var=given[1], uns=UNS)
    adata.obsm["X_pca"] = np.arange(N * 2.0).reshape(N, 2)
    adata.obsm["frame"] = pd.DataFrame({"a/b": np.arange(N), "c": pd.array([None, True] * (N // 2), dtype="boolean")}, index=adata.obs_names)
    obs, var = adata.obs.copy(), adata.var.copy()
    made = TASKS[task](model, adata)
    TASKS[task](model, adata, output=path / f"r{suffix}", overwrite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = ad.read_zarr(path / f"r{suffix}") if suffix == ".zarr" else ad.read_h5ad(path / f"r{suffix}")
    pd.testing.assert_frame_equal(own(made.obs), obs, check_column_type=False, check_names=False)
    pd.testing.assert_frame_equal(made.var, var, check_column_type=False, check_names=False)
    same_in_file(own(read.obs), obs)
    same_in_file(read.var, var)
    for result in (made, read):
        counts = result.X if task in BESIDE else result.layers["counts"]
        counts = counts.compute() if hasattr(counts, "compute") else counts
        if not (task in BESIDE and kind == "stored twice in uint8"):  # which anndata hands back in uint8
            assert np.array_equal(dense(counts), values)
        assert np.array_equal(result.obsm["X_pca"], adata.obsm["X_pca"])
        assert list(result.uns["leiden_colors"]) == ["red", "blue"]
        assert result.uns["sedd"]["task"] == task
    assert made.uns["G1/S"] == UNS["G1/S"]
    pd.testing.assert_frame_equal(made.obsm["frame"], adata.obsm["frame"])
    # In a file the name of an index that is a column's too is lost, as for obs itself.
    pd.testing.assert_frame_equal(read.obsm["frame"], adata.obsm["frame"], check_names=False)
    renamed = free_names(UNS, nested=False)["G1/S"]
    assert list(read.uns[renamed].values()) == [1, "nan"]
    assert (read.uns["t"]["x/y"] == 1.5).all()
    assert np.array_equal(adata.obsm["X_pca"], np.arange(N * 2.0).reshape(N, 2))
    assert "sedd" not in adata.uns  # the user's own is as it was


ANY = {
    "given": st.tuples(tables(CELLS, NAMES), tables(GENES, NAMES)),
    "kind": st.sampled_from(sorted(MATRICES)),
    "seed": st.integers(0, 99),
    "suffix": st.sampled_from([".h5ad", ".zarr"]),
}


@pytest.mark.parametrize("task", TASKS)
@given(**ANY)
@QUICK
def test_results_hold_the_tables_of_any_anndata(tmp_path_factory: pytest.TempPathFactory, model: Pretrained, task: str, **some: Any) -> None:
    check(tmp_path_factory.mktemp("r"), model=model, task=task, **some)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@given(**ANY)
@LONG
def test_results_hold_the_tables_of_many_anndata(tmp_path_factory: pytest.TempPathFactory, model: Pretrained, task: str, **some: Any) -> None:
    check(tmp_path_factory.mktemp("r"), model=model, task=task, **some)


def round_trip(folder: Path, obs: pd.DataFrame, kind: str, seed: int, suffix: str) -> None:
    """Convert, shuffled; train on the store; apply each task to it: the cells' table is what it was, in the order of the store."""
    values = values_of(seed)
    adata = ad.AnnData(MATRICES[kind](values), obs=obs, var=pd.DataFrame(index=GENES))
    if adata.obs.index.name in adata.obs.columns:
        adata.obs.index.name = None  # anndata itself cannot write such a table
    adata.obs["donor"] = pd.Categorical(["7", "8", None] * (N // 3), categories=["9", "8", "7"])
    with warnings.catch_warnings(), ad.settings.override(allow_write_nullable_strings=True):
        warnings.simplefilter("ignore")
        adata.write_h5ad(folder / "a.h5ad")
        expected = ad.read_h5ad(folder / "a.h5ad").obs
    store = convert(folder / "a.h5ad", folder / "a.zarr", shuffle=True, progress=False)
    order = store.obs["sedd_cell"].to_numpy()
    flags = [*TINY_FLAGS, "--num_epochs", "1", "--val_fraction", "0.3", "--condition", "donor"]
    assert main(["train", "--data_path", store.path, "--checkpoint_dir", str(folder / "run"), *flags]) == 0
    model = Pretrained.load(folder / "run")
    assert sorted(model.categories["donor"]) == ["7", "8"]
    for task, run in TASKS.items():
        output = folder / f"{task}{suffix}"
        run(model, store.path, output=output)
        read = ad.read_zarr(output) if suffix == ".zarr" else ad.read_h5ad(output)
        same_columns(own(read.obs), expected.iloc[order].assign(sedd_cell=order))
        assert read.obs_names.tolist() == [CELLS[k] for k in order]
        assert np.array_equal(dense(read.X if task in BESIDE else read.layers["counts"]), values[order])
        if task in BESIDE and suffix == ".zarr":
            assert verify(str(output))["cells"] == N


WAYS = {
    "obs": tables(CELLS, [name for name in NAMES if "/" not in name and name not in ("_index", "donor", ".", "..")]),
    "kind": st.sampled_from(sorted(set(MATRICES) - {"dask"})),
    "seed": st.integers(0, 99),
    "suffix": st.sampled_from([".h5ad", ".zarr"]),
}


@given(**WAYS)
@settings(QUICK, max_examples=1)
def test_cells_come_back_from_conversion_training_and_tasks_as_they_went(tmp_path_factory: pytest.TempPathFactory, **some: Any) -> None:
    round_trip(tmp_path_factory.mktemp("r"), **some)


@pytest.mark.slow
@given(**WAYS)
@settings(LONG, max_examples=8)
def test_many_cells_come_back_from_conversion_training_and_tasks(tmp_path_factory: pytest.TempPathFactory, **some: Any) -> None:
    round_trip(tmp_path_factory.mktemp("r"), **some)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_unused_categories_and_their_colours_are_kept_where_cells_are_chosen(model: Pretrained, suffix: str, tmp_path: Path) -> None:
    adata = make_counts()
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories(["unused"])
    adata.uns["cell_type_colors"] = ["#000000", "#111111", "#222222", "#333333"]
    adata.obsm["X_pca"] = np.arange(240.0)[:, None]
    for task in TASKS.values():
        output = tmp_path / f"r{suffix}"
        made = task(model, adata, cells="val")
        task(model, adata, cells="val", output=output, overwrite=True)
        for result in (made, ad.read_zarr(output) if suffix == ".zarr" else ad.read_h5ad(output)):
            chosen = [adata.obs_names.get_loc(name) for name in result.obs_names]
            pd.testing.assert_frame_equal(own(result.obs), adata.obs.iloc[chosen])
            assert result.n_obs == 24
            assert list(result.uns["cell_type_colors"]) == adata.uns["cell_type_colors"]
            assert result.obsm["X_pca"][:, 0].tolist() == chosen


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_dates_and_mixed_values_are_written_as_text_and_missing_ones_as_missing(model: Pretrained, suffix: str, tmp_path: Path) -> None:
    adata = make_counts(30)
    adata.obs["date"] = pd.date_range("2020-01-01", periods=30)
    adata.obs["mixed"] = [1, "a", None] * 10
    adata.obs["text"] = ["a", None, np.nan] * 10
    adata.obs["period"] = pd.period_range("2020-01", periods=30, freq="M")
    adata.obs["took"] = pd.to_timedelta(np.arange(30), unit="s")
    adata.var["seen"] = [datetime.date(2020, 1, 1), None] * 30
    for name, task in TASKS.items():
        output = tmp_path / f"{name}{suffix}"
        made = task(model, adata, output=output)
        read = ad.read_zarr(output) if suffix == ".zarr" else ad.read_h5ad(output)
        pd.testing.assert_frame_equal(own(made.obs), adata.obs)  # in memory nothing needs to be text
        assert read.obs["date"].tolist()[0].startswith("2020-01-01")
        assert [value if isinstance(value, str) else None for value in read.obs["mixed"]] == ["1", "a", None] * 10
        assert [value if isinstance(value, str) else None for value in read.obs["text"]] == ["a", None, None] * 10
        assert read.obs["period"].tolist()[1] == "2020-02"
        assert read.var["seen"].isna().tolist() == [False, True] * 30
        assert not list(tmp_path.glob("*.partial"))


def test_what_no_file_can_hold_is_said_before_any_work(model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adata = make_counts(30)
    adata.uns["thing"] = {"inside": {1, 2}}
    monkeypatch.setattr("sedd.inference.applying.batches", None)
    for task in TASKS.values():
        with pytest.raises(UserError, match=r"uns\['thing'\] is or holds .* Delete it"):
            task(model, adata, output=tmp_path / "r.h5ad")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", BESIDE)
def test_what_is_put_beside_a_store_makes_a_store(task: str, tiny_run: Path, tiny_h5ad: Path, tmp_path: Path) -> None:
    store = convert(tiny_h5ad, tmp_path / "s.zarr", progress=False)
    once, again = str(tmp_path / "once.zarr"), str(tmp_path / "again.zarr")
    assert main([task, str(tiny_run), store.path, "-o", once]) == 0
    assert main([task, str(tiny_run), once, "-o", again]) == 0
    for path in (once, again):
        verify(path, against=[str(tiny_h5ad)])
        copy = CellStore(path)
        assert copy.fingerprint == store.fingerprint
        assert own(copy.obs).equals(store.obs)
        read = ad.read_zarr(path)
        assert read.uns["sedd"]["task"] == task
        if task == "embed":
            assert read.obsm["X_sedd"].shape == (240, 16)
        elif task == "annotate":
            assert read.obsm["sedd_cell_type_probability"].shape == (240, 3)
        else:
            assert read.obs["sedd_surprise"].between(0, 1).all()
    assert main(["train", "--data_path", again, "--checkpoint_dir", str(tmp_path / "run"), *TINY_FLAGS]) == 0
    assert main([task, str(tiny_run), store.path, "-o", str(tmp_path / "few.zarr"), "--cells", "val"]) == 0
    with pytest.raises(UserError, match="sedd did not make it"):
        CellStore(tmp_path / "few.zarr")  # it has other cells


def test_layers_and_raw_come_with_an_embedding_of_another_kind_of_file(model: Pretrained, tmp_path: Path) -> None:
    adata = make_counts(40)
    adata.layers["raw_counts"] = adata.X.copy()
    adata.raw = adata.copy()
    adata.obsp["near"] = sp.csr_matrix(np.eye(40))
    adata.varm["loadings"] = np.ones((60, 2))
    adata.write_h5ad(tmp_path / "a.h5ad")
    embed(model, tmp_path / "a.h5ad", output=tmp_path / "e.zarr", progress=False)
    read = ad.read_zarr(tmp_path / "e.zarr")
    assert np.array_equal(dense(read.layers["raw_counts"]), dense(adata.X))
    assert np.array_equal(dense(read.raw.X), dense(adata.X))
    assert read.raw.var.equals(adata.var)
    assert np.array_equal(dense(read.obsp["near"]), np.eye(40))
    assert np.array_equal(read.varm["loadings"], np.ones((60, 2)))
