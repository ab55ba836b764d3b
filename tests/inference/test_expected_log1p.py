"""The posterior predictive expectation against scipy's negative binomial."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sedd.errors import UserError
from sedd.inference.expected_log1p import expected_log1p


def by_enumeration(shape: float, mean: float, scale: float) -> float:
    """The expectation, term by term over all counts that matter."""
    law = stats.nbinom(shape, shape / (shape + mean))
    n = np.arange(int(law.isf(1e-12)) + 2)
    return float(law.pmf(n) @ np.log1p(scale * n))


@settings(deadline=None)  # the first call compiles
@given(shape=st.floats(0.05, 200), mean=st.floats(1e-4, 90), scale=st.floats(0, 50))
def test_it_is_the_sum_over_all_counts(shape, mean, scale):
    found = expected_log1p(np.array([[shape]]), np.array([[shape / mean]]), np.array([scale]))
    assert found[0, 0] == pytest.approx(by_enumeration(shape, mean, scale), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("mean", [101.0, 400.0, 5000.0])
def test_large_counts_follow_their_expansion(mean):
    shape = mean + 0.3  # what is left once a count of that size has been seen
    found = expected_log1p(np.array([[shape]]), np.array([[shape / mean]]), np.array([1.7]))
    assert found[0, 0] == pytest.approx(by_enumeration(shape, mean, 1.7), abs=1e-3)


def test_rows_keep_their_scale():
    shape, rate = np.full((2, 3), 2.0), np.array([[1.0, 2.0, 4.0]] * 2)
    found = expected_log1p(shape, rate, np.array([0.0, 3.0]))
    assert np.all(found[0] == 0)
    np.testing.assert_allclose(found[1], [by_enumeration(2.0, 2 / r, 3.0) for r in rate[1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "rate", "scale"),
    [(np.ones((1, 2)), np.ones((1, 3)), np.ones(1)), (np.zeros((1, 1)), np.ones((1, 1)), np.ones(1)),
     (np.ones((1, 1)), np.full((1, 1), np.nan), np.ones(1)), (np.ones((1, 1)), np.ones((1, 1)), -np.ones(1))],
)  # fmt: skip
def test_what_is_no_posterior_is_refused(shape, rate, scale):
    with pytest.raises(UserError):
        expected_log1p(shape, rate, scale)
