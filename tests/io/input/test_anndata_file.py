"""The reader of h5ads: every age, layout and compression; damage gives one line."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from sedd.errors import UserError
from sedd.io.convert import convert
from sedd.io.input.opening import open_input
from tests.io.h5ads import counts, write

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_rows_of_every_layout_and_compression(tmp_path: Path, layout: str, compression: str | None) -> None:
    expected = counts()
    matrix = {"csr": expected, "csc": expected.tocsc(), "dense": expected.toarray()}[layout]
    with open_input(write(tmp_path / "a.h5ad", matrix, compression=compression)) as file:
        indptr, indices, values = file.matrix().read_rows(7, 41)
        read = sparse.csr_matrix((values, indices, indptr), shape=(34, expected.shape[1]))
        np.testing.assert_array_equal(read.toarray(), expected[7:41].toarray())


@given(
    chunk=st.integers(1, 50), lo=st.integers(0, 300), size=st.integers(0, 300), shuffle=st.booleans(), gzip=st.booleans(),
    dtype=st.sampled_from(["<f4", "<f8", ">f4", "<i8", "u1", ">i4"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_of_any_layout_come_in_native_byte_order(
    tmp_path: Path, chunk: int, lo: int, size: int, shuffle: bool, gzip: bool, dtype: str
) -> None:
    values = np.random.default_rng(0).integers(0, 200, 300).astype(dtype)
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "a") as h5:
        del h5["X/data"], h5["X/indices"]
        filters = {"compression": "gzip" if gzip else None, "shuffle": shuffle}
        h5.create_dataset("X/data", data=values, chunks=(chunk,), **filters)
        h5.create_dataset("X/indices", data=np.zeros(300, np.int32))
    with open_input(path) as file:
        read = file.matrix().data.read(lo, min(300, lo + size))
        assert read.dtype.isnative
        np.testing.assert_array_equal(read, values[lo : lo + size])


@pytest.mark.parametrize("gzip", [False, True])
def test_a_matrix_behind_an_external_link_is_read_where_it_leads(tmp_path: Path, gzip: bool) -> None:
    expected = counts()
    path, elsewhere = write(tmp_path / "a.h5ad", expected), tmp_path / "b.h5"
    with h5py.File(path, "a") as h5, h5py.File(elsewhere, "w") as other:
        h5.copy("X", other)
        if gzip:
            data = other["X/data"][:]
            del other["X/data"]
            other.create_dataset("X/data", data=data, compression="gzip")
        del h5["X"]
        h5["X"] = h5py.ExternalLink("b.h5", "/X")
    store = convert(path, tmp_path / "a.zarr", progress=False)
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), expected.toarray())


def old_h5ad(path: Path, matrix: sparse.csr_matrix) -> str:
    """A file as anndata 0.6 wrote it: compound tables, categories in uns, `h5sparse_format`."""
    n_obs, n_vars = matrix.shape
    obs = np.zeros(n_obs, [("index", "S8"), ("kind", "i1"), ("depth", "f4")])
    obs["index"], obs["kind"] = [f"cell{i}" for i in range(n_obs)], np.arange(n_obs) % 2
    var = np.zeros(n_vars, [("index", "S8")])
    var["index"] = [f"gene{i}" for i in range(n_vars)]
    with h5py.File(path, "w") as h5:
        group = h5.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", matrix.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        h5["obs"], h5["var"] = obs, var
        h5["uns/kind_categories"] = np.array([b"a", b"b"])
        h5["obsm"] = np.zeros(n_obs, [("X_pca", "f4", (2,))])
    return str(path)


def test_a_file_of_anndata_0_6_is_converted(tmp_path: Path) -> None:
    expected = counts()
    store = convert(old_h5ad(tmp_path / "old.h5ad", expected), tmp_path / "old.zarr", progress=False)
    read = ad.read_zarr(store.path)
    np.testing.assert_array_equal(read.X.toarray(), expected.toarray())
    assert read.obs_names[3] == "cell3"
    assert list(read.obs["kind"][:3]) == ["a", "b", "a"]
    assert read.obsm["X_pca"].shape == (70, 2)


def test_every_kind_of_obs_column_survives(tmp_path: Path) -> None:
    matrix = counts(6, 8)
    obs = pd.DataFrame(
        {
            "category": pd.Categorical(["x", None, "y", "x", "y", "x"]),
            "nullable": pd.array([1, None, 3, 4, 5, 6], dtype="Int64"),
            "flag": pd.array([True, None, False, True, True, False], dtype="boolean"),
            "text": ["a", "b", "c", "d", "e", "f"],
            "real": [1.0, np.nan, 3.0, 4.0, 5.0, 6.0],
        },
        index=[f"c{i}" for i in range(6)],
    )
    adata = ad.AnnData(matrix, obs=obs, obsm={"X_pca": np.ones((6, 2))}, uns={"note": "kept", "more": {"k": np.arange(3)}})
    adata.write_h5ad(tmp_path / "a.h5ad")
    store = convert(tmp_path / "a.h5ad", tmp_path / "a.zarr", progress=False)
    read = ad.read_zarr(store.path)
    pd.testing.assert_frame_equal(read.obs, ad.read_h5ad(tmp_path / "a.h5ad").obs)
    np.testing.assert_array_equal(read.obsm["X_pca"], np.ones((6, 2)))
    assert read.uns["note"] == "kept"
    np.testing.assert_array_equal(read.uns["more"]["k"], np.arange(3))


def test_a_file_without_obs_and_var_gets_numbered_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "a") as h5:
        del h5["obs"], h5["var"]
    store = convert(path, tmp_path / "a.zarr", progress=False)
    assert store.obs.index[:2].tolist() == ["0", "1"]
    assert store.var_names[-1] == "39"


def damage(path: str, kind: str) -> None:
    with h5py.File(path, "a") as h5:
        if kind == "no X":
            del h5["X"]
        elif kind == "index out of range":
            h5["X/indices"][5] = 4000
        elif kind == "negative index":
            h5["X/indices"][5] = -1
        elif kind == "indptr decreases":
            h5["X/indptr"][3] = 10**6
        elif kind == "shape":
            h5["X"].attrs["shape"] = [70, 41]
        elif kind == "short indices":
            values = h5["X/indices"][:-1]
            del h5["X/indices"]
            h5["X/indices"] = values
        elif kind == "text":
            del h5["X/data"]
            h5["X/data"] = np.array([b"a"] * h5["X/indices"].shape[0])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no X", "has no X"),
        ("index out of range", "indices holds 4000 at cell 0, but there are 40 genes"),
        ("negative index", "indices holds -1"),
        ("indptr decreases", "indptr does not increase"),
        ("shape", "70 x 41 but obs has 70 rows and var 40"),
        ("short indices", "values but"),
        ("text", "expected numbers"),
    ],
)
def test_damage_is_named_and_leaves_nothing_behind(tmp_path: Path, kind: str, says: str) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    damage(path, kind)
    with pytest.raises(UserError, match=says) as caught:
        convert(path, tmp_path / "a.zarr", progress=False)
    assert str(caught.value).startswith(path)
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5ad"]


def test_files_that_are_no_h5ad_are_named(tmp_path: Path) -> None:
    text = tmp_path / "a.h5ad"
    with pytest.raises(UserError, match="there is no such file"):
        convert(text, tmp_path / "a.zarr")
    text.write_text("not HDF5")
    with pytest.raises(UserError, match="not an .h5ad"):
        convert(text, tmp_path / "a.zarr")
    whole = Path(write(tmp_path / "b.h5ad", counts())).read_bytes()
    text.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut short|cannot read"):
        convert(text, tmp_path / "a.zarr", progress=False)
    with h5py.File(tmp_path / "c.h5ad", "w") as h5:
        h5["matrix/data"] = np.zeros(3)
    with pytest.raises(UserError, match=r"not an h5ad.*10x"):
        convert(tmp_path / "c.h5ad", tmp_path / "a.zarr")
    with pytest.raises(UserError, match="is a directory"):
        convert(tmp_path, tmp_path / "a.zarr")


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_untidy_entries_are_sorted_summed_and_dropped(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "a.h5ad", counts() if layout == "csr" else counts().tocsc())
    with h5py.File(path, "a") as h5:
        for name, extra in (("data", [2.0, 0.0, 3.0, 4.0]), ("indices", [5, 7, 5, 2])):
            values = np.concatenate([extra, h5[f"X/{name}"][:]]).astype(h5[f"X/{name}"].dtype)
            del h5[f"X/{name}"]
            h5[f"X/{name}"] = values
        h5["X/indptr"][1:] += 4
    with h5py.File(path) as h5:
        kind = sparse.csr_matrix if layout == "csr" else sparse.csc_matrix
        expected = kind((h5["X/data"][:], h5["X/indices"][:], h5["X/indptr"][:]), shape=(70, 40)).toarray()
    with pytest.warns(UserWarning, match="summed"):
        store = convert(path, tmp_path / "a.zarr", progress=False)
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), expected)
    assert store.nnz == np.count_nonzero(expected)
