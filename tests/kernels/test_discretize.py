from __future__ import annotations

import json

import naive
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sedd.binning import Binning, smoothed_log_shares
from sedd.kernels.discretize import bin_counts, token_dtype, unbin_tokens


def histogram(counts: np.ndarray) -> sp.csr_array:
    dense = np.stack([np.bincount(column, minlength=counts.max() + 1) for column in counts.T])
    return sp.csr_array(dense)


def test_tokens_are_one_byte_up_to_256_bins() -> None:
    assert token_dtype(256) == np.uint8
    assert token_dtype(257) == np.uint16
    for bad in (0, 65_537):
        with pytest.raises(ValueError, match="expected 1 to 65536"):
            token_dtype(bad)


@settings(deadline=None, max_examples=60)
@given(
    counts=hnp.arrays(np.float64, st.integers(0, 40), elements=st.floats(0, 1e6)),
    edges=st.lists(st.floats(-10, 1e6), min_size=1, max_size=30, unique=True),
)
def test_bin_counts_equals_digitize(counts: np.ndarray, edges: list[float]) -> None:
    increasing = np.sort(np.array(edges))
    increasing = increasing[np.r_[True, np.diff(increasing) > 0]]
    np.testing.assert_array_equal(bin_counts(counts, edges=increasing), np.digitize(counts, increasing))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, np.float32, np.float64])
def test_bin_counts_takes_any_number_type(dtype: type) -> None:
    counts = np.arange(200).astype(dtype).reshape(20, 10)
    edges = np.array([0.5, 3, 7, 100])
    tokens = bin_counts(counts, edges=edges)
    assert tokens.dtype == np.uint8
    np.testing.assert_array_equal(tokens, np.digitize(counts, edges))


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_bin_counts_refuses_what_is_no_count(bad: float) -> None:
    with pytest.raises(ValueError, match="expected numbers >= 0"):
        bin_counts(np.array([0.0, bad]), edges=np.array([1.0]))


@pytest.mark.parametrize("edges", [[1.0, 1.0], [2.0, 1.0], [], [0.0, np.inf]])
def test_bin_counts_refuses_edges_that_do_not_increase(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="strictly increasing"):
        bin_counts(np.zeros(1), edges=np.array(edges))


def test_no_token_outside_the_bins_is_decoded() -> None:
    values = np.array([0.0, 1.0, 2.5])
    np.testing.assert_array_equal(unbin_tokens(np.array([[2, 0]]), values=values), np.array([[2.5, 0]], np.float32))
    for bad in (3, -1):
        with pytest.raises(ValueError, match="expected 0 to 2"):
            unbin_tokens(np.array([0, bad]), values=values)


def test_a_count_is_its_own_token_however_large() -> None:
    counts = np.array([[0, 1, 7], [2, 0, 12], [0, 0, 2**31 - 2]])
    hist = sp.csr_array((np.ones(3), (np.arange(3), [0, 3, 300])), shape=(3, 301))
    binning = Binning.fit("auto", 70, hist=hist)
    assert binning == Binning.of_counts() == Binning.fit("counts", 2, hist=hist)
    np.testing.assert_array_equal(binning.tokens(counts), counts)
    np.testing.assert_array_equal(binning.decode(binning.tokens(counts)), counts.astype(np.float32))
    assert binning.token_histogram(hist) is hist
    for top, dtype in ((0, np.uint8), (255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.int32)):
        assert binning.dtype_of(top) == binning.tokens(np.array([top])).dtype == dtype
        assert binning.tokens(np.array([top]))[0] == top
    for dtype in (np.float32, np.float64, np.uint32, np.int64):
        with pytest.raises(ValueError, match="a value is 2147483648; expected counts up to 2147483646"):
            binning.tokens(np.array([1, 2**31], dtype))
    with pytest.raises(ValueError, match="expected counts up to 2147483646"):
        binning.dtype_of(2**31)  # of a store whose largest count that is


def test_binned_whole_numbers_share_the_last_bin_only_in_data_never_seen() -> None:
    counts = np.array([[0, 1, 7], [2, 0, 12], [0, 0, 3]])
    hist = histogram(counts)
    with pytest.raises(ValueError, match="--num_bins 13, or --binning counts"):
        Binning.fit("identity", 12, hist=hist)
    binning = Binning.fit("identity", 13, hist=hist)
    np.testing.assert_array_equal(binning.tokens(np.array([12, 13, 900])), [12, 12, 12])


@pytest.mark.parametrize("num_bins", [2, 5, 64, 100, 300])
def test_linear_is_the_usual_preparation_script(num_bins: int) -> None:
    rng = np.random.default_rng(num_bins)
    x = rng.gamma(1.0, 2.0, size=(40, 30)) * (rng.random((40, 30)) < 0.4)
    binning = Binning.fit("linear", num_bins, values=x)
    assert binning.n_bins == num_bins + 1
    tokens = binning.tokens(x)
    np.testing.assert_array_equal(tokens, np.digitize(x, np.linspace(0, x.max(), num_bins)))
    assert tokens.min() == 1
    assert tokens.max() == num_bins


def test_log_bins_are_equally_wide_in_log1p() -> None:
    counts = np.arange(1001)[None]
    binning = Binning.fit("log", 10, hist=histogram(counts.T))
    assert binning.edges is not None
    np.testing.assert_allclose(np.diff(np.log1p(binning.edges)), np.log1p(1000) / 10)
    tokens = binning.tokens(counts)
    assert tokens[0, 0] == 0
    assert tokens.max() == 9


@settings(deadline=None, max_examples=40)
@given(
    counts=hnp.arrays(np.uint16, (3, 25), elements=st.integers(0, 40)),
    n_bins=st.integers(3, 60),
)
def test_quantile_bins_equal_numpys(counts: np.ndarray, n_bins: int) -> None:
    binning = Binning("quantile", n_bins, None, np.zeros(n_bins))
    np.testing.assert_array_equal(binning.tokens(counts), naive.quantile_tokens(counts, n_bins))


def test_quantile_bins_of_real_values_equal_numpys() -> None:
    values = np.random.default_rng(0).gamma(1, 1, size=(30, 200)).astype(np.float32)
    binning = Binning.fit("quantile", 51, values=values)
    np.testing.assert_array_equal(binning.tokens(values), naive.quantile_tokens(values, 51))
    assert (np.diff(binning.values) > 0).all()


def test_a_bin_decodes_to_the_mean_count_inside_it() -> None:
    counts = np.random.default_rng(1).poisson(4, size=(500, 6))
    binning = Binning.fit("linear", 4, hist=histogram(counts))
    tokens = binning.tokens(counts)
    for token in np.unique(tokens):
        assert binning.values[token] == pytest.approx(counts[tokens == token].mean(), rel=1e-6)
    assert (binning.decode(tokens) == binning.values[tokens]).all()


def test_a_binning_survives_json_bit_for_bit() -> None:
    for kind in ("counts", "identity", "linear", "log"):
        binning = Binning.fit(kind, 40, hist=histogram(np.random.default_rng(2).poisson(9, size=(50, 4))))
        again = Binning.from_dict(json.loads(json.dumps(binning.to_dict())))
        assert again == binning
        assert hash(again) == hash(binning)


def test_a_token_histogram_counts_the_tokens_and_its_shares_are_smoothed() -> None:
    counts = np.random.default_rng(3).poisson([0.1, 2, 5], size=(4000, 3))
    binning = Binning.fit("linear", 7, hist=histogram(counts))
    got = binning.token_histogram(histogram(counts)).toarray()
    want = np.stack([np.bincount(column, minlength=8) for column in binning.tokens(counts).T])
    assert np.array_equal(got, want)
    shares = np.exp(smoothed_log_shares(want.astype(np.float64), binning.falloff))
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(shares, want / 4000, atol=5e-4)
    assert (shares > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Binning.fit("nonsense", 5, values=np.ones(3)), "unknown binning 'nonsense'"),
        (lambda: Binning.fit("identity", 5), "either hist= .* or values="),
        (lambda: Binning.fit("auto", 5, values=np.ones(3)), "real numbers"),
        (lambda: Binning.fit("counts", 5, values=np.ones(3)), "'counts' is for counts"),
        (lambda: Binning.fit("identity", 5, values=np.ones(3)), "'identity' is for whole numbers"),
        (lambda: Binning("counts", 5, None, np.zeros(5)), "make it with Binning.of_counts"),
        (lambda: Binning.of_counts().tokens(np.array([0.5])), "not integers"),
        (lambda: Binning.fit("linear", 5, values=np.array([-1.0])), "finite numbers >= 0"),
        (lambda: Binning.fit("linear", 5, values=np.empty(0)), "training split is empty"),
        (lambda: Binning("identity", 5, None, np.zeros(4)), "expected 5"),
        (lambda: Binning("linear", 5, None, np.zeros(5)), "needs edges"),
        (lambda: Binning("identity", 5, None, np.zeros(5)).tokens(np.array([-1])), "expected counts >= 0"),
        (lambda: Binning("identity", 5, None, np.zeros(5)).tokens(np.array([0.5])), "not integers"),
    ],
)
def test_bad_binnings_are_refused_in_one_line(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
