from __future__ import annotations

import naive
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.binning import Binning
from sedd.kernels.discretize import MAX_TABLE
from sedd.kernels.gather import gather_rows, row_pointers
from sedd.kernels.mask import exact_mask, random_mask
from sedd.kernels.tokens import MaskRule, RowFiller, panel_columns

COUNTS = Binning("identity", 9, None, np.arange(9.0))


def rows_to_tokens(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    *,
    n_vars: int,
    binning: Binning | None,
    rows: np.ndarray | None = None,
    genes: np.ndarray | None = None,
) -> np.ndarray:
    """Fill dense rows from a CSR matrix in one call."""
    top = int(data.max()) if data.size and data.dtype.kind in "ui" else 0
    filler = RowFiller(n_vars, genes=genes, binning=binning, max_count=top)
    picked = np.arange(indptr.size - 1) if rows is None else rows
    out = np.empty((picked.size, filler.n_panel), filler.dtype)
    filler.fill(indices, data, indptr[picked].astype(np.int64), indptr[picked + 1].astype(np.int64), out)
    return out


def matrix(n_obs: int, n_vars: int, seed: int, dtype: type = np.uint8, index: type = np.uint16) -> tuple:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.7, size=(n_obs, n_vars)) * rng.integers(1, 20, size=(n_obs, n_vars))
    if np.dtype(dtype).kind == "f":
        dense = dense * 0.37
    x = sp.csr_matrix(dense.astype(dtype))
    return x.indptr, x.indices.astype(index), x.data, x.toarray()


@settings(deadline=None, max_examples=40)
@given(n_obs=st.integers(1, 12), n_vars=st.integers(1, 40), seed=st.integers(0, 1000), data=st.data())
def test_rows_to_tokens_selects_reorders_and_bins(n_obs: int, n_vars: int, seed: int, data: st.DataObject) -> None:
    indptr, indices, values, _ = matrix(n_obs, n_vars, seed)
    rows = np.array(data.draw(st.lists(st.integers(0, n_obs - 1), max_size=8)), dtype=np.int64)
    genes = np.array(data.draw(st.lists(st.integers(0, n_vars - 1), min_size=1, unique=True)))
    tokens = rows_to_tokens(indptr, indices, values, n_vars=n_vars, binning=COUNTS, rows=rows, genes=genes)
    dense = naive.dense_rows(indptr, indices, values, n_vars)
    np.testing.assert_array_equal(tokens, np.minimum(dense[rows][:, genes], 8).reshape(rows.size, genes.size))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("index", [np.uint16, np.int32])
def test_every_store_type_gives_the_same_tokens(dtype: type, index: type) -> None:
    indptr, indices, values, dense = matrix(20, 33, 5, dtype, index)
    for binning in (COUNTS, Binning.fit("linear", 300, values=dense.astype(float))):
        tokens = rows_to_tokens(indptr, indices, values, n_vars=33, binning=binning)
        assert tokens.dtype == binning.dtype_of(int(values.max()))
        np.testing.assert_array_equal(tokens, binning.tokens(dense))


def test_real_values_are_binned_by_edges_and_delivered_as_float32() -> None:
    indptr, indices, values, dense = matrix(20, 33, 6, np.float32)
    for kind in ("linear", "log"):
        binning = Binning.fit(kind, 12, values=dense)
        np.testing.assert_array_equal(
            rows_to_tokens(indptr, indices, values, n_vars=33, binning=binning), np.digitize(dense, binning.edges)
        )
    np.testing.assert_array_equal(rows_to_tokens(indptr, indices, values, n_vars=33, binning=None), dense)


def test_quantile_bins_are_those_of_the_cell_within_the_panel() -> None:
    indptr, indices, values, dense = matrix(30, 50, 7, np.uint16)
    genes = np.random.default_rng(0).permutation(50)[:31]
    binning = Binning("quantile", 7, None, np.zeros(7))
    tokens = rows_to_tokens(indptr, indices, values, n_vars=50, binning=binning, genes=genes)
    np.testing.assert_array_equal(tokens, naive.quantile_tokens(dense[:, genes], 7))


def test_counts_beyond_the_lookup_table_are_binned_by_their_edges() -> None:
    values = np.array([1, MAX_TABLE + 5, 4_000_000_000], np.uint32)
    binning = Binning.fit("linear", 50, values=values.astype(float))
    tokens = rows_to_tokens(np.array([0, 3]), np.arange(3), values, n_vars=3, binning=binning)
    np.testing.assert_array_equal(tokens[0], np.digitize(values, binning.edges))


def test_masks_and_library_come_with_the_tokens() -> None:
    indptr, indices, values, dense = matrix(16, 50, 9)
    genes = np.arange(40)[::-1].copy()
    filler = RowFiller(50, genes=genes, binning=COUNTS, max_count=255)
    cells, p = np.arange(16) + 1000, np.linspace(0, 1, 16)
    out, masked = np.empty((16, 40), np.uint8), np.empty((16, 40), bool)
    bounds = indptr.astype(np.int64)
    for rule, want in (
        (MaskRule(3, 4), random_mask(3, 4, cells, 40, p)),
        (MaskRule(3, 4, count=6), exact_mask(3, 4, cells, 40, 6)),
    ):
        library = filler.fill(
            indices, values, bounds[:-1], bounds[1:], out, mask=rule, cells=cells, probability=p, masked=masked
        )
        np.testing.assert_array_equal(masked, want)
        np.testing.assert_array_equal(out, np.minimum(dense[:, genes], 8))
        np.testing.assert_array_equal(library, dense[:, genes].sum(axis=1))


def test_float32_rows_are_normalised_on_request() -> None:
    indptr, indices, values, dense = matrix(16, 50, 10)
    filler = RowFiller(50, genes=None, binning=None, target_sum=1e4, log1p=True)
    out = np.empty((16, 50), np.float32)
    bounds = indptr.astype(np.int64)
    filler.fill(indices, values, bounds[:-1], bounds[1:], out)
    want = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_gathered_rows_are_the_rows_of_the_matrix() -> None:
    indptr, indices, values, dense = matrix(16, 50, 11)
    bounds = indptr.astype(np.int64)
    rows = np.array([3, 3, 15, 0])
    for genes in (None, np.arange(49, 20, -1)):
        columns = panel_columns(50, genes)
        starts, stops = bounds[rows], bounds[rows + 1]
        pointers = row_pointers(indices, starts, stops, n_store=50, columns=columns)
        out_indices, out_data = np.empty(pointers[-1], np.int32), np.empty(pointers[-1], np.float32)
        gather_rows(
            indices, values, starts, stops, columns=columns, indptr=pointers, out_indices=out_indices, out_data=out_data
        )
        want = dense[rows] if genes is None else dense[rows][:, genes]
        got = sp.csr_matrix((out_data, out_indices, pointers), shape=want.shape)
        np.testing.assert_array_equal(got.toarray(), want)


def test_no_value_or_index_out_of_range_gets_through() -> None:
    indptr = np.array([0, 2])
    with pytest.raises(ValueError, match="outside the store's 3 genes"):
        rows_to_tokens(indptr, np.array([0, 3]), np.ones(2, np.uint8), n_vars=3, binning=COUNTS)
    with pytest.raises(ValueError, match="outside the store's 3 genes"):
        rows_to_tokens(indptr, np.array([0, -1]), np.ones(2, np.uint8), n_vars=3, binning=COUNTS)
    linear = Binning.fit("linear", 4, values=np.array([3.0]))
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="negative or NaN"):
            rows_to_tokens(indptr, np.array([0, 1]), np.array([1.0, bad]), n_vars=3, binning=linear)
    with pytest.raises(ValueError, match="rows reach"):
        rows_to_tokens(np.array([0, 5]), np.array([0, 1]), np.ones(2, np.uint8), n_vars=3, binning=COUNTS)
    with pytest.raises(ValueError, match="bin real values with linear"):
        rows_to_tokens(indptr, np.array([0, 1]), np.array([0.5, 1.0]), n_vars=3, binning=COUNTS)
    with pytest.raises(ValueError, match="outside the store"):
        row_pointers(np.array([9]), np.array([0]), np.array([1]), n_store=3, columns=np.empty(0, np.int32))


@pytest.mark.parametrize("genes", [[], [0, 0], [3], [-1]])
def test_a_panel_names_distinct_genes_of_the_store(genes: list[int]) -> None:
    with pytest.raises(ValueError, match="panel"):
        panel_columns(3, np.array(genes, dtype=np.int64))
