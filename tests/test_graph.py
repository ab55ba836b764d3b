"""The forward processes against matrices and enumerated joints."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from toy import ExactModel, Joint

from sedd.errors import UserError
from sedd.graph import AbsorbingGraph, Graph, UniformGraph, make_graph

GRAPHS = ["absorbing", "uniform"]


def rate_matrix(graph: Graph) -> torch.Tensor:
    """Q with rows from, columns to; the mask is a state of its own also where it is not reached."""
    q = graph.rate(torch.arange(graph.vocabulary))
    if isinstance(graph, UniformGraph):
        q[graph.mask_token] = 0
    return q


def noised_joint(graph: Graph, joint: Joint, sigma: float) -> torch.Tensor:
    """p_t over the cells with noise, (n_bins + 1,) * n_vars."""
    step = torch.matrix_exp(sigma * rate_matrix(graph))[: graph.n_bins]
    p = joint.p
    for _ in range(joint.n_vars):  # each pass sends the leading gene through the chain and to the end
        p = torch.tensordot(p, step, dims=([0], [0]))
    return p


@pytest.mark.parametrize("name", GRAPHS)
def test_transition_is_the_matrix_exponential_of_the_rate(name: str) -> None:
    graph = make_graph(name, 5)
    values = torch.arange(graph.n_bins)
    for sigma in (1e-6, 0.3, 2.0, 9.0):
        want = torch.matrix_exp(sigma * rate_matrix(graph))[:-1]
        got = graph.transition(values, torch.tensor(sigma, dtype=torch.float64))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(got.sum(-1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", GRAPHS)
def test_rates_out_of_a_state_sum_to_zero_and_columns_are_those_of_the_matrix(name: str) -> None:
    graph = make_graph(name, 5)
    n = graph.n_bins + (name == "absorbing")
    q = graph.rate(torch.arange(n))
    assert q.sum(-1).abs().max() < 1e-15
    columns = graph.transposed_rate(torch.arange(n))[:, :n]
    assert torch.equal(columns, q[:, :n].T)


@pytest.mark.parametrize("name", GRAPHS)
def test_sampled_transitions_have_the_transition_probabilities(name: str) -> None:
    graph, n = make_graph(name, 4), 40_000
    tokens = torch.full((2, n), 3)
    sigma = torch.tensor([0.2, 1.5], dtype=torch.float64)
    drawn = graph.sample_transition(tokens, sigma, generator=torch.Generator().manual_seed(0))
    for row in range(2):
        p = graph.transition(torch.tensor(3), sigma[row])
        counts = torch.bincount(drawn[row], minlength=5)
        assert counts[p == 0].sum() == 0
        assert chisquare(counts[p > 0].numpy(), (n * p[p > 0]).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", GRAPHS)
def test_limit_is_where_infinite_noise_leads(name: str) -> None:
    graph = make_graph(name, 4)
    drawn = graph.sample_limiting((20_000,), generator=torch.Generator().manual_seed(1))
    p = graph.transition(torch.tensor(0), torch.tensor(60.0))
    share = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(share.double(), p, rtol=0, atol=0.015)  # five standard errors of a quarter
    assert share[p < 1e-12].sum() == 0


@pytest.mark.parametrize("name", GRAPHS)
def test_scores_from_exact_conditionals_are_the_ratios_of_the_enumerated_noisy_joint(name: str) -> None:
    joint, sigma = Joint.random(3, 4), 0.7
    graph, model = make_graph(name, 4), ExactModel(Joint.random(3, 4), uniform=name == "uniform")
    noisy = noised_joint(graph, joint, sigma)
    reached = (noisy > 0).nonzero()
    sigmas = torch.full((len(reached),), sigma, dtype=torch.float64)
    log_score = graph.log_score(model(reached, sigmas, everywhere=True), reached, sigmas)
    for i in range(3):
        for y in range(graph.n_bins):
            other = reached.clone()
            other[:, i] = y
            ratio = noisy[other.unbind(1)] / noisy[reached.unbind(1)]
            # From a visible value the absorbing chain has no reverse jump: those scores are settled, not ratios.
            known = torch.ones(len(reached), dtype=torch.bool)
            if name == "absorbing":
                known = (reached[:, i] == graph.mask_token) | (reached[:, i] == y)
            torch.testing.assert_close(log_score[known, i, y].exp(), ratio[known], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", GRAPHS)
def test_posterior_is_bayes_rule(name: str) -> None:
    graph = make_graph(name, 4)
    sigma, earlier = (torch.tensor([x], dtype=torch.float64) for x in (1.3, 0.4))
    q = rate_matrix(graph)
    mu = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    first = mu @ torch.matrix_exp(0.4 * q)[:4]
    second = torch.matrix_exp((1.3 - 0.4) * q)
    for token in range(4 + (name == "absorbing")):
        # A visible gene of an absorbing chain has been what it is; the table of mu does not enter.
        want = first * second[:, token] / (first * second[:, token]).sum()
        if name == "absorbing" and token < 4:
            want = torch.eye(5, dtype=torch.float64)[token]
        got = graph.posterior(mu.log()[None, None], torch.tensor([[token]]), sigma, earlier)
        torch.testing.assert_close(got[0, 0], want, rtol=1e-12, atol=1e-14)


def test_divergence_from_the_limit_is_that_of_the_transition() -> None:
    graph, sigma = UniformGraph(4), torch.tensor(0.9, dtype=torch.float64)
    p = graph.transition(torch.tensor(2), sigma)[:4]
    assert float(graph.limit_divergence(sigma)) == pytest.approx(float((p * (4 * p).log()).sum()), abs=1e-14)
    assert float(AbsorbingGraph(4).limit_divergence(sigma)) == 0


def test_unknown_graph_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match="unknown graph 'cyclic'; expected one of absorbing, uniform"):
        make_graph("cyclic", 4)
    with pytest.raises(UserError, match="n_bins is 1"):
        make_graph("uniform", 1)
