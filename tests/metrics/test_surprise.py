"""How a cell stands among others of its depth: against a plain computation, uniform among its like, and no matter of depth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, percentileofscore

from sedd.errors import UserError
from sedd.metrics.surprise import surprise


def like(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An excess that follows the total, more widely spread in deeper cells, and the totals."""
    rng = np.random.default_rng(seed)
    totals = rng.lognormal(7, 0.6, n)
    return np.log(totals) ** 2 / 10 - 3 + 0.1 * np.log(totals) * rng.normal(size=n), totals


def plain(excess: np.ndarray, totals: np.ndarray, others: np.ndarray, other_totals: np.ndarray) -> np.ndarray:
    """The same by numpy's own polynomial, the k nearest by a sort."""
    x, depth = np.log1p(totals), np.log1p(other_totals)
    curve = np.polyfit(depth, others, 2)
    k = min(len(depth), max(200, len(depth) // 5))
    found = []
    for value, at in zip(excess, x, strict=True):
        inside = np.clip(at, depth.min(), depth.max())
        expected = np.polyval(curve, inside) + np.polyval(np.polyder(curve), inside) * (at - inside)
        near = np.argsort(np.abs(depth - at), kind="stable")[:k]
        off = others[near] - np.polyval(curve, depth[near])
        found.append((percentileofscore(off, value - expected, "mean") / 100 * k + 0.5) / (k + 1))
    return np.array(found)


@pytest.mark.parametrize("m", [40, 300, 2000])
def test_it_is_the_share_of_the_nearest_that_exceeds_less(m: int) -> None:
    cells, others = like(100, 1), like(m, 2)
    cells[1][:2] = others[1].min() / 3, others[1].max() * 3  # beyond the reference
    np.testing.assert_allclose(surprise(*cells, *others), plain(*cells, *others), atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_uniform_among_its_like_at_any_depth(seed: int) -> None:
    cells, others = like(1000, seed + 10), like(4000, seed)
    found = surprise(*cells, *others)
    deep = cells[1] > np.median(cells[1])
    for part in (deep, ~deep):
        assert kstest(found[part], "uniform").pvalue > 1e-3
    assert kstest(surprise(cells[0] + 0.5, cells[1], *others), "uniform").pvalue < 1e-9


@given(st.integers(20, 400), st.integers(0, 50), st.floats(0.001, 3))
@settings(max_examples=30, deadline=None)
def test_a_cell_that_costs_more_at_the_same_depth_is_no_less_surprising(m: int, seed: int, more: float) -> None:
    cells, others = like(20, seed + 100), like(m, seed)
    low, high = surprise(*cells, *others), surprise(cells[0] + more, cells[1], *others)
    assert (high >= low).all()
    assert ((low > 0) & (high < 1)).all()


def test_a_cell_is_not_compared_with_itself() -> None:
    excess, totals = like(50, 0)
    found = surprise(excess, totals, excess, totals, np.arange(50))
    assert sorted(np.round(found * 50 - 0.5, 9)) == list(range(50))  # each has its rank among the 49 others
    none = surprise(excess, totals, excess, totals, np.full(50, -1))
    np.testing.assert_array_equal(none, surprise(excess, totals, excess, totals))
    assert not np.array_equal(none, found)


def test_cells_of_one_depth_are_compared_and_too_few_are_an_error() -> None:
    nats = np.random.default_rng(0).gamma(5, size=30)
    same = np.full(30, 100.0)
    order = np.argsort(np.argsort(nats))
    np.testing.assert_allclose(surprise(nats, same, nats, same), (order + 1) / 31)
    with pytest.raises(UserError, match="19 cells to compare with; expected at least 20"):
        surprise(nats, same, nats[:19], same[:19])
