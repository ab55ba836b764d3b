"""The store: an AnnData store that others read, whose damage is found and named."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from sedd.errors import UserError
from sedd.io.convert import convert
from sedd.io.store import CellStore, store_facts
from sedd.io.verify import verify
from tests.io.h5ads import PBMC, counts, write

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")

READERS = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    folder = tmp_path_factory.mktemp("store")
    return convert(write(folder / "a.h5ad", counts(largest=300)), folder / "a.zarr", progress=False)


@pytest.fixture(scope="module")
def pbmc(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    return convert(PBMC, tmp_path_factory.mktemp("pbmc") / "pbmc.zarr", progress=False)


@READERS
def test_the_shipped_data_survive(pbmc: CellStore) -> None:
    original, read = ad.read_h5ad(PBMC), ad.read_zarr(pbmc.path)
    assert (original.X != read.X).nnz == 0
    assert read.X.dtype == np.uint16
    assert list(read.var_names) == list(original.var_names)
    assert list(read.var["gene_ids"]) == list(original.var["gene_ids"])
    assert verify(pbmc.path, against=str(PBMC))["cells"] == 2700
    assert store_facts(pbmc.path)["files"] < 80


@given(lo=st.integers(0, 70), size=st.integers(0, 70))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_read_are_the_rows_written(store: CellStore, lo: int, size: int) -> None:
    hi = min(70, lo + size)
    indptr, indices, data = store.read_rows(lo, hi)
    read = sparse.csr_matrix((data, indices, indptr), shape=(hi - lo, store.n_vars))
    np.testing.assert_array_equal(read.toarray(), counts(largest=300)[lo:hi].toarray())
    assert (data.dtype, indices.dtype, indptr.dtype) == (np.uint16, np.uint16, np.int64)


def test_rows_that_are_not_there_are_refused(store: CellStore) -> None:
    with pytest.raises(UserError, match="has no cells 60:71; it has 70"):
        store.read_rows(60, 71)


def test_statistics_are_those_of_the_matrix(store: CellStore) -> None:
    dense = counts(largest=300).toarray()
    cells, genes = store.cell_stats(), store.gene_stats()
    np.testing.assert_array_equal(cells["total"], dense.sum(axis=1))
    np.testing.assert_array_equal(cells["n_genes"], (dense > 0).sum(axis=1))
    np.testing.assert_array_equal(cells["max"], dense.max(axis=1))
    np.testing.assert_array_equal(genes["sum"], dense.sum(axis=0))
    np.testing.assert_array_equal(genes["sum_sq"], (dense**2).sum(axis=0))
    np.testing.assert_array_equal(genes["nnz"], (dense > 0).sum(axis=0))
    np.testing.assert_array_equal(genes["max"], dense.max(axis=0))
    expected = np.stack([np.bincount(gene, minlength=301) for gene in dense.T])
    np.testing.assert_array_equal(store.gene_histogram().toarray(), expected)


def test_a_store_is_pickled_by_its_path_and_used_as_a_context(store: CellStore) -> None:
    with pickle.loads(pickle.dumps(store)) as other:
        np.testing.assert_array_equal(other.indptr, store.indptr)
        assert other.fingerprint == store.fingerprint
        assert "70 cells x 40 genes" in repr(other)


@READERS
def test_dask_and_scanpy_take_the_store(store: CellStore) -> None:
    import scanpy as sc

    dense = counts(largest=300).toarray()
    array = store.to_dask(block_values=200)
    assert array.numblocks[0] >= 3
    np.testing.assert_array_equal(np.asarray(array.sum(axis=0).compute()).reshape(-1), dense.sum(axis=0))
    adata = ad.AnnData(array.map_blocks(lambda block: block.astype(np.float32), dtype=np.float32, meta=array._meta), obs=store.obs)
    sc.pp.normalize_total(adata, target_sum=1000)
    sc.pp.log1p(adata)
    total = np.expm1(adata.X.compute().toarray()).sum(axis=1)
    np.testing.assert_allclose(total[dense.sum(axis=1) > 0], 1000, rtol=1e-4)


@READERS
def test_anndata_opens_the_store_lazily(store: CellStore) -> None:
    lazy = ad.experimental.read_lazy(store.path)
    np.testing.assert_array_equal(lazy.X[10:20].compute().toarray(), counts(largest=300)[10:20].toarray())
    assert list(lazy.obs["kind"][:3].values) == ["a", "b", "c"]


def test_every_flipped_bit_of_the_matrix_is_found_and_named(store: CellStore) -> None:
    rng = random.Random(0)
    for name in ("data", "indices", "indptr"):
        file = Path(store.path, "X", name, "c", "0")
        whole = file.read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            fresh = CellStore(store.path)
            with pytest.raises(UserError) as caught:
                fresh.read_rows(0, fresh.n_obs)
            assert f"X/{name}" in str(caught.value)
            assert str(file) in str(caught.value)
            with pytest.raises(UserError, match=f"X/{name}"):
                verify(store.path)
        for cut in (0, 10, len(whole) - 1):
            file.write_bytes(whole[:cut])
            with pytest.raises(UserError, match=f"X/{name}"):
                verify(store.path)
        file.unlink()
        with pytest.raises(UserError, match=f"X/{name}"):
            verify(store.path)
        file.write_bytes(whole)
    assert verify(store.path)["cells"] == 70


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_verify_compares_with_the_input_and_names_the_difference(tmp_path: Path, layout: str, shuffle: bool) -> None:
    original = counts()
    shape = {"csr": lambda m: m, "csc": lambda m: m.tocsc(), "dense": lambda m: m.toarray()}[layout]
    path = write(tmp_path / "a.h5ad", shape(original))
    store = convert(path, tmp_path / "a.zarr", shuffle=shuffle, progress=False)
    assert verify(store.path, against=path)["changed"] == []
    other = original.tolil()
    other[11, 3] = 9
    path = write(tmp_path / "b.h5ad", shape(other.tocsr()))
    with pytest.raises(UserError, match=r"gene 'gene3' is \d+, in .*b.h5ad it is 9"):
        verify(store.path, against=path)
    with pytest.raises(UserError, match="other genes"):
        verify(store.path, against=write(tmp_path / "c.h5ad", original, genes=[f"x{i}" for i in range(40)]))


@READERS
def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such store"):
        CellStore(tmp_path / "none.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(UserError, match="no zarr.json"):
        CellStore(tmp_path / "empty.zarr")
    with ad.settings.override(auto_shard_zarr_v3=False):
        ad.io.write_elem(zarr.open_group(tmp_path / "other.zarr", zarr_format=3), "/", ad.AnnData(np.ones((2, 2))))
    with pytest.raises(UserError, match="sedd did not make it"):
        CellStore(tmp_path / "other.zarr")


def test_facts_tell_what_is_in_a_store(store: CellStore) -> None:
    facts = store_facts(store.path)
    assert facts["cells"] == 70
    assert facts["dtype"] == "uint16"
    assert facts["obs"] == ["kind"]
    assert facts["inputs"][0]["path"].endswith("a.h5ad")
