"""Kernels of the conversion against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sedd.io.conversion import counts as pack
from sedd.io.format.tally import cell_hashes, tally
from tests.io.h5ads import counts

NARROW = [np.dtype(kind) for kind in (np.uint8, np.uint16, np.uint32)]
STORED = [np.dtype(kind) for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")]


def first_bad(values: np.ndarray) -> int:
    """Position of the first value that is no count, as numpy finds it."""
    wide = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        near = wide if values.dtype.kind != "f" else values
        ok = (np.abs(near - np.rint(near)) <= values.dtype.type(1e-6) if values.dtype.kind == "f" else True) & (
            np.rint(wide) >= 0
        )
        ok &= np.rint(wide) <= np.iinfo(np.uint32).max
    ok = np.broadcast_to(ok, values.shape)
    return -1 if ok.all() else int(np.argmin(ok))


@given(data=st.data(), dtype=st.sampled_from(STORED), narrow=st.sampled_from(NARROW))
@settings(max_examples=300, deadline=None)
def test_counts_are_narrowed_or_the_first_that_is_none_is_found(data: st.DataObject, dtype: np.dtype, narrow: np.dtype) -> None:
    small = st.integers(0, 100).map(lambda n: dtype.type(n))
    values = data.draw(hnp.arrays(dtype, st.integers(0, 40), elements=st.one_of(small, hnp.from_dtype(dtype))))
    got = pack.to_counts(values, narrow)
    single = values.astype(np.float32) if dtype == np.float16 else values
    assert got.bad == first_bad(single)
    if got.bad < 0:
        np.testing.assert_array_equal(got.values, np.rint(values.astype(np.float64)))
        assert got.n_zero == (got.values == 0).sum()
        assert got.n_rounded == (values.astype(np.float64) != got.values).sum()
        assert got.values.dtype.itemsize == max(narrow.itemsize, pack.count_dtype(int(got.values.max(initial=0))).itemsize)


@pytest.mark.parametrize(("value", "bad"), [(2.0**32, 1), (2.0**32 - 256, -1), (np.nan, 1), (-1.0, 1), (0.5, 1)])
def test_the_largest_float32_count(value: float, bad: int) -> None:
    values = np.array([3, value], np.float32)
    got = pack.to_counts(values, np.dtype(np.uint8))
    assert got.bad == bad
    if bad < 0:
        np.testing.assert_array_equal(got.values, values.astype(np.float64))


@given(data=st.data(), n_vars=st.integers(1, 200), real=st.booleans())
@settings(max_examples=150, deadline=None)
def test_rows_are_cleaned_as_scipy_cleans_them(data: st.DataObject, n_vars: int, real: bool) -> None:
    """Genes renamed or left out, in any order, repeated, zero or with a sum of zero; rows that are empty."""
    n_own = data.draw(st.integers(1, 150))
    genes = np.array(data.draw(st.permutations(range(n_vars)))[:n_own], np.int32)
    genes = np.concatenate([genes, np.full(n_own - genes.size, -1, np.int32)])[np.array(data.draw(st.permutations(range(n_own))))]
    rows = data.draw(st.lists(st.lists(st.integers(0, n_own - 1), max_size=40), max_size=6))
    indptr = np.cumsum([0, *map(len, rows)])
    indices = np.array([gene for row in rows for gene in row], np.uint16)
    numbers = st.integers(-2 if real else 0, 3)
    values = np.array(data.draw(st.lists(numbers, min_size=indices.size, max_size=indices.size)), np.float32 if real else np.uint8)
    got_indptr, got_indices, got_values, n_summed = pack.clean_rows(indptr, indices, values, n_vars, genes)
    expected = np.zeros((len(rows), n_vars))
    pairs: list[tuple[int, int]] = []
    for k in np.flatnonzero((genes[indices] >= 0) & (values != 0)):
        pairs.append((int(np.searchsorted(indptr, k, side="right")) - 1, int(genes[indices[k]])))
        expected[pairs[-1]] += values[k]
    assert n_summed == len(pairs) - len(set(pairs))
    np.testing.assert_array_equal(sp.csr_array((got_values, got_indices, got_indptr), shape=expected.shape).toarray(), expected)
    assert got_indptr[-1] == np.count_nonzero(expected)
    assert pack.first_disorder(got_indptr, got_indices) < 0


def test_a_tally_counts_what_numpy_counts() -> None:
    matrix = counts(50, 30, largest=200, seed=3)
    values = matrix.data.astype(np.uint16)
    got = tally(matrix.indptr.astype(np.int64), matrix.indices.astype(np.uint16), values, 30)
    dense = matrix.toarray().astype(np.int64)
    np.testing.assert_array_equal(got.total, dense.sum(axis=1))
    np.testing.assert_array_equal(got.largest, dense.max(axis=1))
    genes, found = np.nonzero(dense.T)[0], dense.T[np.nonzero(dense.T)]
    keys, numbers = np.unique(genes.astype(np.int64) << 32 | found, return_counts=True)
    order = np.argsort(got.keys)
    np.testing.assert_array_equal(got.keys[order], keys)
    np.testing.assert_array_equal(got.numbers[order], numbers)
    np.testing.assert_array_equal(got.hashes, cell_hashes(matrix.indptr, matrix.indices, values))


def test_a_hash_changes_with_every_value_and_every_gene_and_not_with_their_order() -> None:
    genes, values = np.array([2, 5, 9], np.uint16), np.array([1, 7, 255], np.uint8)
    indptr = np.array([0, 3])
    own = cell_hashes(indptr, genes, values)[0]
    assert own == cell_hashes(indptr, genes[::-1].copy(), values[::-1].copy())[0]
    split = cell_hashes(np.array([0, 1, 3]), genes, values)
    assert own == split.sum(dtype=np.uint64)
    others = {own}
    for place in range(3):
        for bit in range(8):
            changed, moved = values.copy(), genes.copy()
            changed[place] ^= np.uint8(1 << bit)
            moved[place] ^= np.uint16(1 << bit)
            others |= {cell_hashes(indptr, genes, changed)[0], cell_hashes(indptr, moved, values)[0]}
    assert len(others) == 1 + 2 * 3 * 8
