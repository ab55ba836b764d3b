from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.kernels.gather import gather_rows, row_pointers
from sedd.kernels.rows import BAD_INDEX, BAD_VALUE, check_row, choose, inside
from sedd.kernels.tokens import panel_columns


@settings(deadline=None, max_examples=60)
@given(
    genes=st.lists(st.integers(0, 19), max_size=60),
    panel=st.lists(st.integers(0, 19), min_size=1, max_size=19, unique=True),
)
def test_the_chosen_places_are_those_of_the_panels_genes(genes: list[int], panel: list[int]) -> None:
    """Also in a row that is longer than the store, as a damaged one may be."""
    chosen = np.empty(len(genes), np.uint32)
    count = choose(np.array(genes, np.uint16), (panel_columns(20, np.array(panel)) >= 0).astype(np.uint8), chosen)
    assert chosen[:count].tolist() == [place for place, gene in enumerate(genes) if gene in panel]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint64])
def test_one_index_outside_the_store_is_found_wherever_it_is(dtype: type) -> None:
    info = np.iinfo(dtype)
    assert inside(np.empty(0, dtype), 1)
    for at, length in ((0, 1), (0, 100), (57, 100), (99, 100)):
        for bad in {30, info.max, info.min or 30, -1 if info.min else 30}:
            genes = np.full(length, 29, dtype)
            assert inside(genes, 30)
            genes[at] = bad
            assert not inside(genes, 30)
            assert check_row(genes, np.ones(length, np.uint8), 30) == BAD_INDEX


@pytest.mark.parametrize("bad", [-1.0, -np.inf, np.nan])
def test_one_bad_value_is_found_wherever_it_is(bad: float) -> None:
    genes = np.zeros(100, np.uint16)
    for at in (0, 57, 99):
        values = np.ones(100, np.float32)
        assert check_row(genes, values, 1) == 0
        values[at] = bad
        assert check_row(genes, values, 1) == BAD_VALUE


@settings(deadline=None, max_examples=40)
@given(n_obs=st.integers(1, 9), n_vars=st.integers(1, 40), seed=st.integers(0, 1000), data=st.data())
def test_gathered_rows_equal_scipys(n_obs: int, n_vars: int, seed: int, data: st.DataObject) -> None:
    dense = np.random.default_rng(seed).poisson(0.5, (n_obs, n_vars))
    x = sp.csr_matrix(dense.astype(np.uint8))
    rows = np.array(data.draw(st.lists(st.integers(0, n_obs - 1), min_size=1, max_size=8)))
    genes = np.array(data.draw(st.lists(st.integers(0, n_vars - 1), min_size=1, unique=True)))
    columns = panel_columns(n_vars, genes)
    starts, stops = x.indptr[rows].astype(np.int64), x.indptr[rows + 1].astype(np.int64)
    indices = x.indices.astype(np.uint16)
    pointers = row_pointers(indices, starts, stops, n_store=n_vars, columns=columns)
    picked, values = np.empty(pointers[-1], np.int32), np.empty(pointers[-1], np.float32)
    gather_rows(indices, x.data, starts, stops, columns=columns, indptr=pointers, out_indices=picked, out_data=values)
    got = sp.csr_matrix((values, picked, pointers), shape=(rows.size, genes.size))
    np.testing.assert_array_equal(got.toarray(), dense[rows][:, genes])
