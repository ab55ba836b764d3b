"""Tables of cells and genes, embeddings and uns go through a conversion as anndata alone would have them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sedd.errors import SeddWarning
from sedd.io.conversion.joins import concatenated
from sedd.io.convert import convert
from sedd.io.format.elements import free_names, write_elements
from tests.io.h5ads import counts, write
from tests.io.tables import KINDS, NAMES, column, tables

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")

N_OBS, N_VARS = 20, 12
CELLS, GENES = [f"cell{k}" for k in range(N_OBS)], [f"g{k}" for k in range(N_VARS)]
IN_H5 = [name for name in NAMES if name != "_index"]
QUICK = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_with(path: Path, obs: pd.DataFrame, var: pd.DataFrame, **kwargs: Any) -> str:
    """An h5ad with these tables, whatever their names."""
    write(path, counts(N_OBS, N_VARS), **kwargs)
    with h5py.File(path, "r+") as file:
        for name in ("obs", "var"):
            del file[name]
        write_elements(file, {"obs": obs, "var": var}, rows=None)
    return str(path)


def same_columns(read: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Same names (but for what a store cannot hold), types, values, categories, missing values and order."""
    names = free_names(expected.columns, reserved=("_index",))
    assert list(read.columns) == list(names.values())
    for old, new in names.items():
        pd.testing.assert_series_equal(read[new], expected[old], check_names=False)


@given(obs=tables(CELLS, IN_H5), var=tables(GENES, IN_H5), shuffle=st.booleans(), limit=st.sampled_from([None, 7]))
@QUICK
def test_tables_of_one_input(
    tmp_path_factory: pytest.TempPathFactory, obs: pd.DataFrame, var: pd.DataFrame, shuffle: bool, limit: int | None
) -> None:
    folder = tmp_path_factory.mktemp("one")
    path = write_with(folder / "a.h5ad", obs, var)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ad.read_h5ad(path)
    store = convert(path, folder / "a.zarr", shuffle=shuffle, limit_cells=limit, progress=False)
    read = ad.read_zarr(store.path)
    n = limit or N_OBS
    order = read.obs["sedd_cell"].to_numpy() if shuffle else np.arange(n)
    table = expected.obs.iloc[order]
    same_columns(read.obs, table.assign(sedd_cell=order) if shuffle else table)
    same_columns(read.var, expected.var)
    assert read.obs_names.tolist() == [CELLS[k] for k in order]
    assert read.obs.index.name in (expected.obs.index.name, None)
    assert store.obs.columns.tolist() == read.obs.columns.tolist()


@given(
    kinds=st.dictionaries(
        st.sampled_from(["G1/S", "donor", "batch", "source", "n"]), st.sampled_from(sorted(KINDS)), max_size=4
    ),
    present=st.lists(st.integers(0, 15), min_size=2, max_size=3),
    shuffle=st.booleans(),
)
@QUICK
def test_tables_of_several_inputs(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, str], present: list[int], shuffle: bool
) -> None:
    folder = tmp_path_factory.mktemp("many")
    paths, read, var = [], [], pd.DataFrame(index=GENES)
    for number, mask in enumerate(present):
        own = {
            name: column(kind, N_OBS, True, number).array
            for k, (name, kind) in enumerate(kinds.items())
            if mask >> k & 1
        }
        obs = pd.DataFrame(own, index=[f"{number}-{name}" for name in CELLS])
        paths.append(write_with(folder / f"{number}.h5ad", obs, var))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read.append(ad.read_h5ad(paths[-1]))
    label = "sedd_source" if any("source" in own.obs for own in read) else "source"
    joined = ad.concat(read, join="outer", label=label, keys=[f"{k}.h5ad" for k in range(len(paths))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ad.settings.override(allow_write_nullable_strings=True, disallow_forward_slash_in_h5ad=False):
            joined.write_h5ad(folder / "expected.h5ad")
        expected = ad.read_h5ad(folder / "expected.h5ad").obs
    store = convert(paths, folder / "o.zarr", shuffle=shuffle, progress=False)
    found = ad.read_zarr(store.path).obs
    if shuffle:
        expected = expected.iloc[found.pop("sedd_cell").to_numpy()]
    assert set(found) == set(expected)
    for name in expected:
        here, there = ([None if pd.isna(value) else value for value in frame[name]] for frame in (found, expected))
        assert here == there


def test_rows_of_var_come_from_the_first_input_that_has_the_gene(tmp_path: Path) -> None:
    frames = [
        pd.DataFrame({"mt": [True, False] * 6, "type": pd.Categorical(["x"] * 12), "n": np.arange(12)}, index=GENES),
        pd.DataFrame({"type": pd.Categorical(["y", None] * 6)}, index=[f"g{k}" for k in range(6, 18)]),
    ]
    paths = [write_with(tmp_path / f"{k}.h5ad", pd.DataFrame(index=CELLS), frame) for k, frame in enumerate(frames)]
    var = ad.read_zarr(convert(paths, tmp_path / "o.zarr", join="outer", progress=False).path).var
    assert var["mt"].dtype == "boolean"
    assert var["mt"].tolist()[:12] == [True, False] * 6
    assert var["mt"].isna().sum() == 6
    assert var["type"].tolist()[:12] == ["x"] * 12
    assert [value if isinstance(value, str) else None for value in var["type"][12:]] == ["y", None] * 3
    assert var["n"].tolist()[:12] == list(range(12))
    assert var["n"].isna().sum() == 6


@pytest.mark.parametrize("shuffle", [False, True])
def test_unused_categories_keep_their_colours(tmp_path: Path, shuffle: bool) -> None:
    obs = pd.DataFrame({"leiden": pd.Categorical(["1", "2"] * 10, categories=["0", "1", "2"])}, index=CELLS)
    path = write_with(
        tmp_path / "a.h5ad", obs, pd.DataFrame(index=GENES), uns={"leiden_colors": ["red", "green", "blue"]}
    )
    read = ad.read_zarr(convert(path, tmp_path / "a.zarr", shuffle=shuffle, limit_cells=1, progress=False).path)
    assert dict(zip(read.obs["leiden"].cat.categories, read.uns["leiden_colors"], strict=True)) == {
        "0": "red",
        "1": "green",
        "2": "blue",
    }


def test_inputs_of_one_name_are_told_apart_and_the_users_source_is_kept(tmp_path: Path) -> None:
    paths = []
    for k in "ab":
        (tmp_path / k).mkdir()
        obs = pd.DataFrame({"source": f"patient {k}"}, index=pd.Index([f"{k}{name}" for name in CELLS]))
        paths.append(write_with(tmp_path / k / "adata.h5ad", obs, pd.DataFrame(index=GENES)))
    with pytest.warns(SeddWarning, match=r"obs\['sedd_source'\]"):
        store = convert(paths, tmp_path / "o.zarr", progress=False)
    assert store.obs["source"].tolist() == ["patient a"] * 20 + ["patient b"] * 20
    assert store.obs["sedd_source"].tolist() == ["a/adata.h5ad"] * 20 + ["b/adata.h5ad"] * 20


def test_cells_of_one_name_are_told_apart_and_the_column_of_the_index_is_kept(tmp_path: Path) -> None:
    obs = pd.DataFrame({"barcode": CELLS}, index=pd.Index(CELLS, name="barcode"))
    paths = [write_with(tmp_path / f"{k}.h5ad", obs, pd.DataFrame(index=GENES)) for k in "ab"]
    store = convert(paths, tmp_path / "o.zarr", progress=False)
    assert store.obs.index.is_unique
    assert store.obs["barcode"].tolist() == CELLS * 2


def test_what_several_inputs_have_in_common_in_uns_and_obsm_is_kept_and_the_rest_named(tmp_path: Path) -> None:
    paths = []
    for k, (width, first) in enumerate([(5, "0"), (3, "1")]):
        obs = pd.DataFrame({"kind": pd.Categorical([first] * 20)}, index=[f"{k}{name}" for name in CELLS])
        uns = {"genome": "GRCh38", "lane": k, "kind_colors": ["red"]}
        obsm = {"X_pca": np.ones((20, width)), "X_umap": np.full((20, 2), k)}
        paths.append(write_with(tmp_path / f"{k}.h5ad", obs, pd.DataFrame(index=GENES), uns=uns, obsm=obsm))
    with pytest.warns(SeddWarning) as said:
        store = convert(paths, tmp_path / "o.zarr", progress=False)
    read = ad.read_zarr(store.path)
    assert set(read.uns) == {"genome", "sedd"}
    np.testing.assert_array_equal(read.obsm["X_umap"][:, 0], [0] * 20 + [1] * 20)
    assert list(read.obsm) == ["X_umap"]
    messages = [str(warning.message) for warning in said]
    assert any(message.startswith("obsm X_pca: left out") for message in messages)
    assert any(message.startswith("uns kind_colors, lane: left out") for message in messages)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_tables_of_the_same_columns_are_joined_as_anndata_joins_them(data: Any) -> None:
    """Those that are joined without anndata are most of them; all are as it has them."""
    kinds = data.draw(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(sorted(KINDS)), max_size=3))
    frames = []
    for number in range(data.draw(st.integers(2, 3))):
        n = data.draw(st.integers(1, 5))
        made = {name: column(kind, n, data.draw(st.booleans()), data.draw(st.integers(0, 9))).array for name, kind in kinds.items()}
        index = pd.Index([f"{number * data.draw(st.integers(0, 1))}-{k}" for k in range(n)], name=data.draw(st.sampled_from([None, "barcode"])))
        frame = pd.DataFrame(made, index=index)
        for name in (name for name in frame if isinstance(frame[name].dtype, pd.CategoricalDtype) and data.draw(st.booleans())):
            frame[name] = frame[name].cat.remove_unused_categories()
        frames.append(frame)
    arrays = [{"X_pca": np.full((len(frame), 2), k)} for k, frame in enumerate(frames)]
    obs, obsm = concatenated(frames, arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = ad.concat([ad.AnnData(obs=frame, obsm=own) for frame, own in zip(frames, arrays, strict=True)], join="outer")
    pd.testing.assert_frame_equal(obs, wanted.obs, check_column_type=False)
    for name in (name for name in kinds if isinstance(obs[name].dtype, pd.CategoricalDtype)):
        assert obs[name].cat.categories.tolist() == wanted.obs[name].cat.categories.tolist()
    assert np.array_equal(obsm["X_pca"], wanted.obsm["X_pca"])


@pytest.mark.parametrize("categories", [(["y", "x"], ["y", "x"]), (["y", "x"], ["x", "y"]), (["y10", "y9"], ["z", "y9"]), (["y"], [])])
def test_categories_of_joined_tables_are_in_the_order_of_anndata(categories: tuple[list[str], list[str]]) -> None:
    frames = [
        pd.DataFrame({"kind": pd.Categorical([*own, None], categories=own)}, index=[f"{k}-{at}" for at in range(len(own) + 1)])
        for k, own in enumerate(categories)
    ]
    wanted = ad.concat([ad.AnnData(obs=frame) for frame in frames], join="outer").obs["kind"]
    found = concatenated(frames, [{}, {}])[0]["kind"]
    assert found.cat.categories.tolist() == wanted.cat.categories.tolist()
    assert found.astype(object).equals(wanted.astype(object))
