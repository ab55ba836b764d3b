"""The law of a count against scipy, float64 autograd, sums over all counts, integrals over rates, and a great many draws."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import logsumexp
from scipy.stats import chisquare, gamma, nbinom, poisson

from sedd.errors import UserError
from sedd.kernels import count_law, count_law_draws, count_law_torch
from sedd.kernels.count_law import gradients, log_probs
from sedd.kernels.count_law_draws import LARGEST, LOG_THETA
from sedd.kernels.count_law_fit import fit
from sedd.kernels.count_law_moments import Sums, add_moments
from sedd.kernels.vector_math import BLOCK, exp, log, log1p
from sedd.nn.heads import CountHead

NONE = np.zeros((1, 3, 3), np.float32)


def law(weights: list[float], means: list[float], thetas: list[float]) -> np.ndarray:
    """The numbers of one gene's law, (1, 3, 3)."""
    return np.log(np.stack([weights, means, thetas], -1)).astype(np.float32)[None]


def parts(start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and thetas in float64, of (..., 3, 3) numbers."""
    raw = start.astype(np.float64)
    weight = np.exp(raw[..., 0] - logsumexp(raw[..., 0], axis=-1, keepdims=True))
    return weight, np.exp(raw[..., 1]), np.exp(np.clip(raw[..., 2], *LOG_THETA))


def log_pmf(start: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The oracle: scipy's negative binomials, mixed."""
    weight, mean, theta = parts(start)
    return logsumexp(np.log(weight) + nbinom.logpmf(np.asarray(counts)[..., None], theta, theta / (theta + mean)), axis=-1)


def cells(n_cells: int, n_vars: int, seed: int, rank: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    start = np.stack([rng.normal(size=(n_vars, 3)), rng.normal(-2, 2, (n_vars, 3)), rng.normal(0, 1.5, (n_vars, 3))], -1)
    readout, moves = rng.normal(size=(n_cells, n_vars, rank)), 0.4 * rng.normal(size=(rank, 3, 3))
    whole = start + np.einsum("bgr,rjc->bgjc", readout, moves)
    return readout.astype(np.float32), start.astype(np.float32), moves.astype(np.float32), whole


@settings(deadline=None, max_examples=50)
@given(x=hnp.arrays(np.float32, BLOCK, elements=st.floats(-87, 88, width=32)))
def test_vector_functions_are_numpys(x: np.ndarray) -> None:
    out, bits, spare = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32)
    exp(x, out, bits)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=3e-7)
    log1p(out.clip(max=1e30), spare, bits, np.empty(BLOCK, np.float32))
    np.testing.assert_allclose(spare, np.log1p(out.clip(max=1e30).astype(np.float64)), rtol=3e-7, atol=1e-37)
    positive = out.clip(1e-37, 1e37)
    log(positive, spare, bits)
    np.testing.assert_allclose(spare, np.log(positive.astype(np.float64)), rtol=3e-7, atol=2e-7)


@pytest.mark.parametrize("n_vars", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 700])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_log_probabilities_and_gradients_are_scipys_and_float64s(n_vars: int, dtype: type) -> None:
    readout, start, moves, whole = cells(3, n_vars, 1)
    rng = np.random.default_rng(2)
    top = min(np.iinfo(dtype).max, 3_000_000)
    targets = np.minimum(rng.negative_binomial(0.3, 0.02, (3, n_vars)) * rng.choice([0, 1, 50], (3, n_vars)), top).astype(dtype)
    targets[0, 0] = top
    masked = rng.random((3, n_vars)) < 0.6
    masked[0, 0], masked[1] = True, False
    log_p, slopes = log_probs(readout, start, moves, targets, masked, slopes=True)
    want = log_pmf(whole, targets)
    np.testing.assert_allclose(log_p[masked], want[masked], rtol=2e-6, atol=3e-6)
    assert not log_p[~masked].any()

    x = [torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in (readout, start, moves)]
    raw = x[1] + torch.einsum("bgr,rjc->bgjc", x[0], x[2])
    k, log_theta = torch.from_numpy(targets.astype(np.float64))[..., None], raw[..., 2].clamp(*LOG_THETA)
    theta, ratio = log_theta.exp(), raw[..., 1] - log_theta
    terms = torch.lgamma(theta + k) - torch.lgamma(theta) - torch.lgamma(k + 1) - (theta + k) * ratio.exp().log1p() + k * ratio
    out = (raw[..., 0].log_softmax(-1) + terms).logsumexp(-1)
    upstream = rng.normal(size=masked.shape).astype(np.float32)
    given = torch.autograd.grad((out * torch.from_numpy(upstream * masked)).sum(), x)
    for got, exact in zip(gradients(slopes, upstream, readout, moves), given, strict=True):
        scale = 1 + np.abs(exact.numpy()).max()
        np.testing.assert_allclose(got / scale, exact.numpy() / scale, atol=1e-5)

    head = CountHead(torch.from_numpy(start), 4)
    with torch.no_grad():
        head.moves.copy_(torch.from_numpy(moves))
    everywhere = count_law_torch.log_probs(head._raw(torch.from_numpy(readout)), torch.from_numpy(targets.astype(np.int64)))
    small = masked & (targets < 1000)  # float32 loses digits in the gamma functions of large counts
    np.testing.assert_allclose(everywhere.detach().numpy()[small], want[small], rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=30)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    means=st.lists(st.floats(1e-4, 60), min_size=3, max_size=3),
    thetas=st.lists(st.floats(0.05, 1000), min_size=3, max_size=3),
)
def test_all_counts_have_probability_one_and_the_moments_of_their_sum(
    weights: list[float], means: list[float], thetas: list[float]
) -> None:
    start = law(weights, means, thetas)
    counts = np.arange(60_000)
    one = np.zeros((1, counts.size, 1), np.float32)
    log_p, _ = log_probs(one, np.repeat(start, counts.size, 0), NONE, counts[None], np.ones((1, counts.size), bool))
    p = np.exp(log_p[0].astype(np.float64))
    assert p.sum() == pytest.approx(1, abs=1e-6)
    sums = Sums.of_zeros((1, 1), zero=True, log1p=True)
    add_moments(sums, one[:, :1], start, NONE, np.ones((1, 1), bool), scale=np.array([3.0]))
    mean, std = sums.mean_and_std()
    assert mean[0, 0] == pytest.approx(p @ counts, rel=1e-4)
    assert std[0, 0] ** 2 == pytest.approx(p @ counts**2 - (p @ counts) ** 2, rel=1e-3)
    assert sums.zero[0, 0] == pytest.approx(p[0], rel=1e-5)
    assert sums.log1p[0, 0] == pytest.approx(p @ np.log1p(3.0 * counts), rel=1e-4)
    at = np.unique(np.geomspace(1, 5_000, 40).astype(int))
    readouts, genes = np.zeros((at.size, 1), np.float32), np.zeros(at.size, np.int64)
    found, below, expected = count_law_draws.distribution(readouts, start, NONE, genes, at)
    np.testing.assert_allclose(found, log_pmf(start[0], at), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(below, np.cumsum(p)[at - 1], atol=2e-6)
    np.testing.assert_allclose(expected, p @ counts, rtol=1e-4)
    n = int(count_law_draws.reach(readouts[:1], start, NONE, genes[:1], 1e-9)[0])
    table = count_law_draws.table(readouts[:1], start, NONE, genes[:1], n)[0]
    assert 1 - np.exp(table).sum() < 3e-9
    np.testing.assert_allclose(table, log_pmf(start[0], np.arange(n)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mean", "theta"), [(0.01, 0.3), (40.0, 900.0), (70.0, 0.3), (990.0, 1000.0), (5_000.0, 900.0), (3e5, 0.5)])
def test_the_mean_logarithm_is_that_of_the_sum(mean: float, theta: float) -> None:
    counts = np.arange(10_000_000 if mean > 1e4 else 400_000)
    want = nbinom.pmf(counts, theta, theta / (theta + mean)) @ np.log1p(2.5 * counts)
    assert count_law_draws.mean_log1p(2.5, mean, theta) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("count", [0, 1, 4, 30])
def test_the_own_count_updates_the_law_of_the_rate(count: int) -> None:
    start = law([0.6, 0.3, 0.1], [0.2, 4.0, 25.0], [0.5, 3.0, 20.0])
    weight, mean, theta = parts(start[0])
    rates = np.geomspace(1e-9, 500, 400_001)  # the integral, by the trapezoidal rule on a grid of the logarithm
    step = np.log(rates[1] / rates[0])
    prior = sum(w * gamma.pdf(rates, t, scale=m / t) for w, m, t in zip(weight, mean, theta, strict=True)) * rates * step
    posterior = prior * poisson.pmf(count, rates)
    evidence = posterior.sum()
    sums = Sums.of_zeros((1, 1), log1p=True)
    given = {"counts": np.full((1, 1), count, np.float32), "by_own": np.ones(1, bool), "scale": np.array([2.0])}
    add_moments(sums, np.zeros((1, 1, 1), np.float32), start, NONE, np.ones((1, 1), bool), **given)
    got_mean, got_std = sums.mean_and_std()
    assert sums.evidence[0, 0] == pytest.approx(np.exp(log_pmf(start[0], np.array(count))), rel=1e-5)
    assert got_mean[0, 0] == pytest.approx(posterior @ rates / evidence, rel=1e-4)
    assert got_std[0, 0] ** 2 == pytest.approx(posterior @ rates**2 / evidence - (posterior @ rates / evidence) ** 2, rel=1e-3)
    again = np.arange(2000)
    predictive = np.array([posterior[::200] @ poisson.pmf(n, rates[::200]) for n in again]) / posterior[::200].sum()
    assert sums.log1p[0, 0] / sums.evidence[0, 0] == pytest.approx(predictive @ np.log1p(2.0 * again), rel=1e-3)


def test_predictions_given_the_own_count_are_weighed_by_how_probable_they_made_it() -> None:
    one, other = law([1, 1e-9, 1e-9], [1.0, 1, 1], [900.0, 1, 1]), law([1, 1e-9, 1e-9], [20.0, 1, 1], [900.0, 1, 1])
    sums = Sums.of_zeros((1, 1))
    for start in (one, other):
        given = {"counts": np.full((1, 1), 18, np.float32), "by_own": np.ones(1, bool)}
        add_moments(sums, np.zeros((1, 1, 1), np.float32), start, NONE, np.ones((1, 1), bool), **given)
    assert sums.mean_and_std()[0][0, 0] == pytest.approx(20, abs=0.1)  # not the mean of 1 and 20: the first is refuted


def tail_of(start: np.ndarray, n: int, seed: int) -> float:
    """P-value of draws, of a sum over many counts and all that are above."""
    u = np.random.default_rng(seed).random(n)
    drawn = count_law_draws.draw(np.zeros((n, 1), np.float32), start, NONE, np.zeros(n, np.int64), u)
    counts = np.arange(drawn.max() + 2)
    want = np.exp(log_pmf(start[0], counts)) * n
    cut = int(np.argmax(np.cumsum(want[::-1]) >= 20))
    last = counts.size - 1 - cut  # from here on at least 20 are expected
    seen, hoped = np.bincount(drawn, minlength=counts.size)[:last], want[:last]
    keep = hoped >= 5
    seen = np.append(seen[keep], n - seen[keep].sum())
    hoped = np.append(hoped[keep], n - hoped[keep].sum())
    return float(chisquare(seen, hoped).pvalue)


LAWS = [
    law([0.7, 0.25, 0.05], [0.05, 0.8, 6.0], [0.5, 2.0, 1.0]),
    law([0.5, 0.3, 0.2], [3.0, 63.0, 65.0], [0.1, 900.0, 2.0]),  # on both sides of where sums end and bisection begins
    law([0.2, 0.5, 0.3], [100.0, 300.0, 2.0], [1000.0, 0.2, 5.0]),
]


@pytest.mark.parametrize("start", LAWS)
def test_draws_follow_the_law_far_into_its_tail(start: np.ndarray) -> None:
    assert tail_of(start, 300_000, seed=3) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("start", LAWS[:2])
def test_ten_million_draws_follow_the_law(start: np.ndarray) -> None:
    assert tail_of(start, 10_000_000, seed=4) > 1e-3


def test_draws_are_by_inversion_of_each_component_and_never_leave_the_counts() -> None:
    start = law([1, 1e-12, 1e-12], [1e9, 1, 1], [0.01, 1, 1])
    u = np.array([0.0, 1 - 2.0**-53])
    low, high = count_law_draws.draw(np.zeros((2, 1), np.float32), start, NONE, np.zeros(2, np.int64), u)
    assert low == 0 and high <= LARGEST
    assert count_law_draws.draw(np.full((1, 1), np.nan, np.float32), start, NONE + 1, np.zeros(1, np.int64), u[:1]) == -1


def test_what_is_not_a_number_is_not_hidden_by_the_bounds() -> None:
    readout, start, moves, _ = cells(1, 4, 0)
    for bad in (np.nan, np.inf):
        for entry in ((1, 0, 0), (1, 2, 1), (1, 1, 2)):
            broken = start.copy()
            broken[entry] = bad
            log_p, _ = log_probs(readout, broken, moves, np.zeros((1, 4), np.int64), np.ones((1, 4), bool))
            assert np.isnan(log_p[0, 1]) and np.isfinite(log_p[0, [0, 2, 3]]).all()


def test_a_fit_has_the_means_of_the_genes_and_hardly_any_mass_above_what_was_seen() -> None:
    rng = np.random.default_rng(5)
    means = np.array([0.002, 0.02, 0.3, 4.0, 200.0])
    counts = np.stack([rng.negative_binomial(1.5, 1.5 / (1.5 + m), 3000) for m in means], 1)
    hist = sp.csr_array(np.stack([np.bincount(c, minlength=counts.max() + 1) for c in counts.T]))
    start = fit(hist)
    weight, mean, _ = parts(start)
    seen = counts.mean(0)
    np.testing.assert_allclose((weight * mean).sum(1)[seen > 0], seen[seen > 0], rtol=0.25)
    held_out = np.stack([rng.negative_binomial(1.5, 1.5 / (1.5 + m), 20_000) for m in means], 1)
    for g, m in enumerate(means):
        true = nbinom.logpmf(held_out[:, g], 1.5, 1.5 / (1.5 + m)).mean()
        assert log_pmf(start[g], held_out[:, g]).mean() > true - 0.01
    every = np.arange(counts.max() * 50)
    for g, top in enumerate(counts.max(0)):
        assert np.exp(log_pmf(start[g], every[top + 1 :])).sum() < 2 / 3000


def test_a_gene_never_seen_and_one_with_a_huge_count_start_somewhere() -> None:
    hist = sp.csr_array((np.array([10, 9, 1]), np.array([0, 0, 2_000_000]), np.array([0, 1, 3])), shape=(2, 2_000_001))
    start = fit(hist)
    assert np.isfinite(start).all()
    weight, mean, _ = parts(start)
    assert 0 < (weight * mean).sum(1)[0] < 0.3
    assert 2e4 < (weight * mean).sum(1)[1] < 2e6


def test_numbers_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(UserError, match="expected \\(3, 3\\)"):
        count_law.log_probs(np.zeros((1, 2, 1), np.float32), np.zeros((2, 2, 3), np.float32), NONE, np.zeros((1, 2)), np.ones((1, 2), bool))


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    means=st.lists(st.floats(1e-4, 500), min_size=3, max_size=3),
    thetas=st.lists(st.floats(0.05, 1000), min_size=3, max_size=3),
)
def test_the_best_count_is_the_most_probable_of_all(weights: list[float], means: list[float], thetas: list[float]) -> None:
    start = law(weights, means, thetas)
    found = count_law_draws.best(np.zeros((1, 1), np.float32), start, NONE, np.zeros(1, np.int64))[0]
    want = log_pmf(start[0], np.arange(2_000)).max()
    near = max(means) <= 60  # else that of the best mode of a component
    assert found == pytest.approx(want, rel=1e-5, abs=1e-5) if near else want - 0.7 < found <= want + 1e-4
