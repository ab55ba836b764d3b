"""What a GPU computes of the law of a count, on the CPU: the numbers of the kernels, and draws from the same laws."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from sedd.binning import UNBOUNDED
from sedd.graph import AbsorbingGraph
from sedd.kernels import count_law_draws, count_law_torch
from sedd.kernels.count_law_moments import Sums
from sedd.kernels.random_bits import mixed, uniforms
from sedd.model import SEDDTransformer
from sedd.nn.heads import CountHead
from sedd.noise import LogLinearNoise
from sedd.sampling import AnalyticSampler

CELLS, GENES, RANK = 5, 40, 4


@pytest.fixture(scope="module")
def head() -> CountHead:
    torch.manual_seed(0)
    start = torch.stack([torch.randn(GENES, 3), 2 * torch.randn(GENES, 3), 2 * torch.randn(GENES, 3)], -1)
    return CountHead(start, RANK)


@pytest.fixture(scope="module")
def readout() -> torch.Tensor:
    return torch.randn(CELLS, GENES, RANK, generator=torch.Generator().manual_seed(1)) / 2


@pytest.mark.parametrize("panel", [False, True])
@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_expectations_are_those_of_the_kernel(own: bool, panel: bool, head: CountHead, readout: torch.Tensor) -> None:
    rng = np.random.default_rng(2)
    masked = torch.from_numpy(rng.random((CELLS, GENES)) < 0.7)
    given = {"scale": torch.from_numpy(rng.uniform(0.1, 10, CELLS))}
    if own:
        given |= {"counts": torch.from_numpy(rng.poisson(2.0, (CELLS, GENES)).astype(np.float32)), "by_own": torch.from_numpy(rng.random(GENES) < 0.8)}
    genes = torch.from_numpy(rng.permutation(GENES)[:17]) if panel else None
    if genes is not None:
        readout, masked = readout[:, genes], masked[:, genes]
        given |= {"counts": given["counts"][:, genes], "by_own": given["by_own"][genes]} if own else {}
    here, there = (Sums.of_zeros((CELLS, GENES), zero=True, log1p=True) for _ in range(2))
    for _ in range(2):
        head.add_moments(here, readout, masked, genes=genes, **given)
        head._add_on_device(there, readout, masked, genes, **given)
    for name in Sums._fields:
        torch.testing.assert_close(getattr(there, name), getattr(here, name), rtol=1e-4, atol=1e-6, msg=name)
    assert (here.evidence > 0).sum() == masked.sum()


def test_log_probabilities_and_their_gradients_are_those_of_the_kernel(head: CountHead, readout: torch.Tensor) -> None:
    counts = torch.from_numpy(np.random.default_rng(3).poisson(3.0, (CELLS, GENES)))
    masked, found = torch.ones(CELLS, GENES, dtype=torch.bool), []
    for one in (lambda x: head.log_prob(x, counts, masked), lambda x: count_law_torch.log_probs(head._raw(x), counts)):
        head.zero_grad()
        x = readout.clone().requires_grad_()
        log_p = one(x)
        log_p.sum().backward()
        assert x.grad is not None and head.start.grad is not None and head.moves.grad is not None
        found.append((log_p, x.grad, head.start.grad, head.moves.grad))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-4, atol=2e-4)


LAWS = [(0.0, 0.0), (-2.0, -4.0), (3.0, 2.0), (8.0, -1.0), (2.0, 7.0), (18.0, 1.0)]


@pytest.mark.parametrize(("log_mean", "log_theta"), LAWS)
def test_draws_follow_the_mixture(log_mean: float, log_theta: float) -> None:
    n = 4000
    raw = torch.zeros(3, 3, dtype=torch.float64)
    raw[:, 0], raw[:, 1], raw[:, 2] = torch.tensor([0.0, 0.5, -1.0]), torch.tensor([0.0, 1.0, -1.0]) + log_mean, log_theta
    u = uniforms(5, 6, torch.arange(1), n)[0]
    drawn = count_law_torch.draw(raw.expand(n, 3, 3), u).numpy()
    weight, mean, theta = raw[:, 0].softmax(0).numpy(), raw[:, 1].exp().numpy(), raw[:, 2].exp().numpy()

    def below(k: np.ndarray) -> np.ndarray:
        return sum(w * stats.nbinom.cdf(k, t, t / (t + m)) for w, m, t in zip(weight, mean, theta, strict=True))

    v = np.random.default_rng(0).random(n)  # spreads each count over its own probability
    place = below(drawn - 1) + v * (below(drawn) - below(drawn - 1))
    assert stats.kstest(place, "uniform").pvalue > 1e-3


def test_a_law_that_is_not_a_number_draws_minus_one_and_no_mean_is_exceeded_without_end() -> None:
    raw = torch.zeros(3, 3, 3, dtype=torch.float64)
    raw[0, 1, 2] = torch.nan
    raw[1, :, 1] = -1e6  # kept within bounds
    raw[2, :, 1] = 1e6
    drawn = count_law_torch.draw(raw, torch.full((3,), 0.9, dtype=torch.float64)).tolist()
    assert drawn[:2] == [-1, 0]
    assert 10**8 < drawn[2] <= count_law_draws.LARGEST


def test_numbers_mixed_of_others_are_uniform_and_know_nothing_of_them() -> None:
    u = uniforms(1, 2, torch.arange(100), 200).flatten()
    v = mixed(u)
    assert stats.kstest(v.numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u, v)[0, 1]) * np.sqrt(len(u)) < 4
    low = u < 1e-2  # what is mixed of small numbers is not small
    assert stats.kstest(v[low].numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("scale", "mean", "theta"), [(3.0, 1.0, 0.5), (1e4, 0.01, 0.1), (5.0, 100.0, 2.0), (2.0, 900.0, 1000.0), (4.0, 3e3, 0.05), (0.0, 3.0, 1.0)])
def test_the_mean_logarithm_is_that_of_the_sum(scale: float, mean: float, theta: float) -> None:
    k = np.arange(1_000_000)
    expected = stats.nbinom.pmf(k, theta, theta / (theta + mean)) @ np.log1p(scale * k)
    own = count_law_torch.mean_log1p(*(torch.full((1,), x, dtype=torch.float64) for x in (scale, mean, theta)))
    assert own.item() == pytest.approx(expected, rel=1e-7)
    assert count_law_draws.mean_log1p(scale, mean, theta) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_tables_and_the_most_probable_count_are_those_of_the_kernel(head: CountHead, readout: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    genes = torch.arange(GENES).repeat(CELLS)
    x = readout.flatten(0, 1)
    tables, best, needed = head.log_table(x, genes, 90), head.best(x, genes), head.reach(x, genes, 1e-6)
    monkeypatch.setattr(CountHead, "has_kernel", lambda *_: False)
    torch.testing.assert_close(head.log_table(x, genes, 90), tables, rtol=1e-6, atol=1e-6)
    found = head.best(x, genes)
    assert (found > best - 1e-6).all()
    modes = (count_law_torch.laws(head._raw(x.double(), genes))[1]).exp().amax(1)
    torch.testing.assert_close(found[modes < 64], best[modes < 64], rtol=1e-6, atol=1e-6)
    found = head.reach(x, genes, 1e-6)
    assert (needed <= found).all() and (found <= 4 * needed + 8).all() and found.amax() <= 2.5 * needed.amax()


@pytest.mark.parametrize("log_rest", [-20.0, -200.0])
@pytest.mark.parametrize(("log_mean", "log_theta"), LAWS)
def test_beyond_its_reach_hardly_anything_is_left_of_a_law(log_mean: float, log_theta: float, log_rest: float) -> None:
    raw = torch.tensor([[[0.0, log_mean, log_theta], [-300.0, 21.0, 0.0], [-300.0, 0.0, 0.0]]], dtype=torch.float64)
    n, theta = int(count_law_torch.reach(raw, log_rest)), np.exp(log_theta)
    p = theta / (theta + np.exp(log_mean))
    if log_rest == -20.0 and n < count_law_draws.LARGEST:
        assert 1e-4 * np.exp(log_rest) < stats.nbinom.sf(n - 1, theta, p) < np.exp(log_rest)
    if log_rest == -200.0:  # the least likely components are followed too
        assert n == count_law_draws.LARGEST or n > count_law_torch.reach(raw, -20.0)


@pytest.mark.parametrize(("order", "temperature", "guidance"), [("random", 1.3, 1), ("confidence", 0.6, 2)])
def test_a_gpu_draws_what_a_cpu_draws_from_laws_that_are_changed_and_again_where_a_table_was_too_short(
    order: str, temperature: float, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    counts = np.random.default_rng(0).poisson(np.array([1.0, 5, 40, 700]), (60, 4))
    histogram = sp.csr_array(np.stack([np.bincount(gene, minlength=counts.max() + 1) for gene in counts.T]))
    model = SEDDTransformer(4, UNBOUNDED, hidden_dim=8, num_layers=1, num_heads=1, histogram=histogram, condition_sizes=(2,))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    sampler = AnalyticSampler(
        model, AbsorbingGraph(UNBOUNDED), LogLinearNoise(), num_steps=4, temperature=temperature, guidance=guidance, order=order, batch_size=20
    )
    runs: list[int] = []
    real = type(sampler._tempering).too_short
    monkeypatch.setattr(type(sampler._tempering), "too_short", lambda self, n: runs.append(n) or real(self, n))
    tokens, condition = torch.full((60, 4), sampler.graph.mask_token), torch.arange(60)[:, None] % 3
    tables: list[tuple[int, int]] = []
    make = CountHead.log_table
    monkeypatch.setattr(CountHead, "log_table", lambda self, *given: tables.append((len(given[1]), given[2])) or make(self, *given))
    here = sampler.sample(tokens, condition=condition, seed=3)
    assert runs == [0] * 3
    laws, lengths = np.array(tables).T
    assert laws @ lengths < 0.5 * laws.sum() * lengths.max() > 512  # three genes of four need short ones
    monkeypatch.setattr(CountHead, "has_kernel", lambda *_: False)
    there = sampler.sample(tokens, condition=condition, seed=3)
    assert len(runs) == 3 + 4  # once more in the first batch
    assert sampler._tempering.n_states >= max(runs) > there.max() > 512
    assert (here == there).double().mean() > 0.99
