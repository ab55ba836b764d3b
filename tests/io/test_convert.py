"""The converter: every layout gives the same matrix, bad input gives one line."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse

from sedd.errors import SeddWarning, UserError
from sedd.io.convert import convert, ensure_store
from tests.io.h5ads import counts, write

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")

LAYOUTS = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda matrix: matrix.toarray()}


def matrix_of(path: Any) -> np.ndarray:
    return ad.read_zarr(str(path)).X.toarray()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_layout_and_dtype_gives_the_same_matrix(tmp_path: Path, layout: str, dtype: str, shuffle: bool) -> None:
    expected = counts()
    path = write(tmp_path / "a.h5ad", LAYOUTS[layout](expected.astype(dtype)), compression="gzip")
    store = convert(path, tmp_path / "a.zarr", shuffle=shuffle, seed=3, progress=False)
    read = ad.read_zarr(tmp_path / "a.zarr")
    order = read.obs["sedd_cell"].to_numpy() if shuffle else np.arange(expected.shape[0])
    assert shuffle == (not np.array_equal(order, np.arange(expected.shape[0])))
    np.testing.assert_array_equal(read.X.toarray(), expected.toarray()[order])
    assert list(read.obs_names) == [f"cell{i}" for i in order]
    assert store.dtype == np.uint8
    np.testing.assert_array_equal(store.cell_stats()["total"], expected.toarray().sum(axis=1)[order])
    np.testing.assert_array_equal(store.gene_stats()["max"], expected.toarray().max(axis=0))


def test_counts_are_kept_in_the_narrowest_type_even_when_a_late_cell_needs_more(tmp_path: Path) -> None:
    matrix = counts(n_obs=9000, n_vars=30).tolil()
    matrix[8999, 3] = 70_000
    path = write(tmp_path / "a.h5ad", matrix.tocsr().astype(np.float32))
    store = convert(path, tmp_path / "a.zarr", memory_budget="64MiB", progress=False)
    assert store.dtype == np.uint32
    np.testing.assert_array_equal(matrix_of(store.path), matrix.toarray())


def test_ensure_store_converts_once_and_again_when_the_file_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    first = ensure_store(path, progress=False)
    stamp = Path(first.path, "zarr.json").stat().st_mtime_ns
    ensure_store(path, progress=False)
    assert Path(first.path, "zarr.json").stat().st_mtime_ns == stamp
    write(tmp_path / "a.h5ad", counts(seed=1))
    np.testing.assert_array_equal(matrix_of(ensure_store(path, progress=False).path), counts(seed=1).toarray())


def test_the_store_that_a_user_made_beside_the_file_is_neither_used_nor_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.h5ad", counts())
    mine = convert(path, tmp_path / "mine.zarr", shuffle=True, seed=7, progress=False)
    stamp = Path(mine.path, "zarr.json").stat().st_mtime_ns
    assert Path(ensure_store(path, progress=False).path).name == "mine.sedd.zarr"
    assert Path(mine.path, "zarr.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("what", ["a file", "a folder", "a store of another file", "a link"])
def test_what_is_in_the_way_of_an_automatic_store_is_kept(tmp_path: Path, what: str) -> None:
    path, place = write(tmp_path / "mine.h5ad", counts()), tmp_path / "mine.sedd.zarr"
    if what == "a file":
        place.write_text("mine")
    elif what == "a folder":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    else:
        other = convert(write(tmp_path / "other.h5ad", counts(seed=4)), tmp_path / "other.zarr", progress=False)
        os.symlink(other.path, place) if what == "a link" else os.rename(other.path, place)
    before = sorted(str(item) for item in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="in the way of the store of"):
        ensure_store(path, progress=False)
    assert sorted(str(item) for item in tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="mine.h5ad: no directory can be made there .*; pass another --cache_dir"):
        ensure_store(path, cache_dir=path, progress=False)
    assert Path(ensure_store(path, cache_dir=tmp_path / "cache", progress=False).path).parent.name == "cache"


def test_a_layer_with_a_slash_has_a_store_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "a") as h5:
        h5.require_group("layers")
        h5.copy("X", h5["layers"], "spliced/raw")
    store = ensure_store(path, layer="spliced/raw", progress=False)
    assert Path(store.path).parent == tmp_path
    np.testing.assert_array_equal(matrix_of(store.path), counts().toarray())


def bad(kind: str) -> np.ndarray:
    dense = counts().toarray().astype(np.float32)
    dense[3, 4] = {"negative": -2, "nan": np.nan, "inf": np.inf, "log": np.log1p(2)}[kind]
    return dense


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "says"), [("negative", "negative"), ("nan", "NaN"), ("inf", "infinite"), ("log", "non-integer")])
def test_values_that_are_no_counts_are_named(tmp_path: Path, layout: str, kind: str, says: str) -> None:
    path = write(tmp_path / "a.h5ad", LAYOUTS[layout](sparse.csr_matrix(bad(kind))))
    with pytest.raises(UserError) as caught:
        convert(path, tmp_path / "a.zarr", progress=False)
    message = str(caught.value)
    assert says in message
    assert "cell 3 ('cell3'), gene 'gene4'" in message
    assert "\n" not in message
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5ad"]


def test_the_layer_that_holds_counts_is_named(tmp_path: Path) -> None:
    scaled = counts().toarray() - 1.5
    path = write(tmp_path / "a.h5ad", scaled, layers={"counts": counts(), "log": np.log1p(counts().toarray())})
    with pytest.raises(UserError, match=r"scaled.*--layer counts, which holds counts"):
        convert(path, tmp_path / "a.zarr", progress=False)
    with pytest.raises(UserError, match=r"no layers/missing; it has X, --layer counts, --layer log"):
        convert(path, tmp_path / "a.zarr", layer="missing", progress=False)
    convert(path, tmp_path / "a.zarr", layer="counts", progress=False)
    np.testing.assert_array_equal(matrix_of(tmp_path / "a.zarr"), counts().toarray())


def test_real_values_are_kept_as_float32(tmp_path: Path) -> None:
    values = np.log1p(counts().toarray()).astype(np.float32) - 0.25
    path = write(tmp_path / "a.h5ad", values)
    store = convert(path, tmp_path / "a.zarr", values="real", progress=False)
    assert not store.is_counts
    np.testing.assert_array_equal(matrix_of(store.path), values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_matrix_of_zeros_is_converted(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "a.h5ad", LAYOUTS[layout](sparse.csr_matrix((6, 4), dtype=np.float32)))
    store = convert(path, tmp_path / "a.zarr", progress=False)
    assert store.nnz == 0
    np.testing.assert_array_equal(matrix_of(store.path), np.zeros((6, 4)))


def test_empty_inputs_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", sparse.csr_matrix((0, 5), dtype=np.float32))
    with pytest.raises(UserError, match="has no cells"):
        convert(path, tmp_path / "a.zarr", progress=False)
    with pytest.raises(UserError, match=r"a.h5ad: has no cells; .* Leave it out\."):
        convert([write(tmp_path / "some.h5ad", counts()), path], tmp_path / "a.zarr", progress=False)
    path = write(tmp_path / "b.h5ad", sparse.csr_matrix((5, 0), dtype=np.float32))
    with pytest.raises(UserError, match="has no genes"):
        convert(path, tmp_path / "a.zarr", progress=False)


def test_repeated_gene_names_empty_cells_and_unseen_genes_are_reported(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not unique"):
        path = write(tmp_path / "a.h5ad", counts(), genes=["g", "g"] + [f"g{i}" for i in range(38)])
    with pytest.warns(SeddWarning) as caught:
        store = convert(path, tmp_path / "a.zarr", progress=False)
    said = " ".join(str(warning.message) for warning in caught)
    assert "1 gene names repeat" in said
    assert "1 of 70 cells have no counts" in said
    assert "1 of 40 genes are never seen" in said
    assert store.var_names[:2].tolist() == ["g", "g-1"]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("kind", ["tidy", "stored zero", "layers"])
def test_repeated_names_of_genes_are_said_once(kind: str, tmp_path: Path) -> None:
    matrix = counts()
    if kind == "stored zero":
        matrix.data[0] = 0
    path = write(tmp_path / "a.h5ad", matrix, genes=["same", "same", *(f"gene{k}" for k in range(38))], layers={"counts": matrix.copy(), "more": matrix.tocsc()})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        convert(path, tmp_path / "a.zarr", progress=False, keep_layers=("counts", "more") if kind == "layers" else ())
    assert sum("gene names repeat" in str(one.message) for one in said) == 1
