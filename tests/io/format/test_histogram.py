"""Histograms, and genes chosen from them."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from sedd.errors import UserError
from sedd.io.convert import convert
from sedd.io.format.histogram import KeyCounter, histogram, select_genes
from sedd.io.store import CellStore
from tests.io.h5ads import PBMC, counts, write

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    folder = tmp_path_factory.mktemp("stats")
    return convert(write(folder / "a.h5ad", counts(largest=200)), folder / "a.zarr", progress=False)


@pytest.mark.parametrize("n", [0, 1, 20, 60, 70])
def test_histogram_of_some_cells_counts_those_cells(store: CellStore, n: int) -> None:
    cells = np.sort(np.random.default_rng(n).choice(70, n, replace=False))
    dense = counts(largest=200).toarray()[cells]
    expected = np.stack([np.bincount(gene, minlength=201) for gene in dense.T])
    np.testing.assert_array_equal(histogram(store, cells).toarray(), expected)
    others = np.setdiff1d(np.arange(70), cells)
    np.testing.assert_array_equal(histogram(store, without=others).toarray(), expected)


@pytest.mark.parametrize("n", [2, 30])
def test_a_histogram_reads_in_several_blocks(store: CellStore, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sedd.io.format.histogram.BLOCK", 1)
    test_histogram_of_some_cells_counts_those_cells(store, n)


def test_histogram_refuses_cells_out_of_order(store: CellStore) -> None:
    for cells in ([3, 2], [-1], [70], [4, 4]):
        with pytest.raises(UserError, match="ascend"):
            histogram(store, np.array(cells))


def test_counter_adds_small_and_large_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sedd.io.format.tally.MANY", 100)  # so that the list is added up on the way, several times
    rng = np.random.default_rng(0)
    counter, expected = KeyCounter(5), np.zeros((5, 300), np.int64)
    for _ in range(20):
        keys = np.unique(rng.integers(0, 5, 50) << 32 | rng.integers(1, 301, 50))
        numbers = rng.integers(1, 9, keys.size)
        counter.add(keys, numbers)
        np.add.at(expected, (keys >> 32, (keys & 0xFFFFFFFF) - 1), numbers)
    np.testing.assert_array_equal(counter.histogram(300).toarray(), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_variable_genes_are_those_of_scanpy(tmp_path: Path) -> None:
    import scanpy as sc

    store = convert(PBMC, tmp_path / "pbmc.zarr", progress=False)
    adata = ad.read_h5ad(PBMC)
    kept = np.flatnonzero(adata.X.getnnz(axis=0) >= 3)
    adata = adata[:, kept].copy()
    hist = store.gene_histogram()
    for n_top in (500, 2000):
        table = sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=n_top, inplace=False)
        expected = kept[np.flatnonzero(table["highly_variable"])]
        np.testing.assert_array_equal(select_genes(hist, n_top), expected)


def test_few_genes_are_all_chosen(store: CellStore) -> None:
    chosen = select_genes(store.gene_histogram(), 1000)
    assert chosen.size == 39
    assert (np.diff(chosen) > 0).all()
    with pytest.raises(UserError, match="must be positive"):
        select_genes(store.gene_histogram(), 0)


@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_too_few_cells_to_choose_genes_by_are_an_error_that_says_so(tmp_path: Path) -> None:
    store = convert(PBMC, tmp_path / "pbmc.zarr", progress=False)
    cells = np.sort(np.random.default_rng(0).choice(store.n_obs, 36, replace=False))
    with pytest.raises(UserError, match="the 36 cells are too few to choose 50 variable genes by"):
        select_genes(histogram(store, cells), 50)
