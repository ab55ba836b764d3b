"""The score entropy against its definition, its closed forms and enumerated joints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import ExactModel, FreeModel, Joint

from sedd.errors import UserError
from sedd.graph import AbsorbingGraph, Graph, UniformGraph, _exp_minus_line, make_graph
from sedd.likelihood import nelbo
from sedd.loss import LABEL_EMPHASIS, diffusion_loss, hide, score_entropy
from sedd.model import SEDDTransformer
from sedd.noise import GeometricNoise, LogLinearNoise, Noise, stratified_times

GRAPHS = ["absorbing", "uniform"]
NOISE = LogLinearNoise()


def random_case(graph: Graph, n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log scores, noised tokens, clean tokens and times of n cells with 3 genes."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(n, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    clean = torch.randint(graph.n_bins, (n, 3), generator=generator)
    tokens = graph.sample_transition(clean, NOISE.sigma(t), generator=generator)
    log_score = torch.randn(n, 3, graph.vocabulary, generator=generator, dtype=torch.float64)
    return log_score, tokens, clean, t


def defined_score_entropy(graph: Graph, log_score: Tensor, tokens: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """The definition, term by term: sum over y != x of Q(y, x) (s_y - a_y log s_y + a_y (log a_y - 1))."""
    sigma = NOISE.sigma(t)[:, None]
    p = graph.transition(clean, sigma)
    a = p / p.gather(-1, tokens[..., None])
    rate = graph.transposed_rate(tokens)
    rate = rate.scatter(-1, tokens[..., None], 0.0)
    terms = log_score.exp() - a * log_score + torch.where(a > 0, a * (a.clamp(min=1e-300).log() - 1), 0.0)
    return NOISE.dsigma(t)[:, None] * (rate * terms).sum(-1)


@pytest.mark.parametrize("name", GRAPHS)
def test_closed_form_is_the_definition(name: str) -> None:
    graph = make_graph(name, 5)
    case = random_case(graph)
    got = score_entropy(graph, NOISE, *case)
    torch.testing.assert_close(got, defined_score_entropy(graph, *case), rtol=1e-10, atol=1e-10)


def test_of_normalised_probabilities_it_is_cross_entropy_over_time() -> None:
    graph = AbsorbingGraph(5)
    logits, _, clean, t = random_case(graph)
    log_mu = logits[..., :5].log_softmax(-1)
    masks = torch.full_like(clean, graph.mask_token)
    log_score = graph.log_score(log_mu, masks, NOISE.sigma(t))
    want = -log_mu.gather(-1, clean[..., None]).squeeze(-1) / t[:, None]
    got = score_entropy(graph, NOISE, log_score, masks, clean, t)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GRAPHS)
def test_given_the_noised_cell_it_is_least_at_the_true_ratios(name: str) -> None:
    graph, joint = make_graph(name, 4), Joint.random(3, 4)
    model = ExactModel(joint, uniform=name == "uniform")
    cells = joint.states
    t = torch.full((len(cells),), 0.6, dtype=torch.float64)
    noised = graph.sample_transition(cells, NOISE.sigma(t), generator=torch.Generator().manual_seed(0))
    sigma = NOISE.sigma(t)
    log_mu = model(noised, sigma, everywhere=True)
    # p(clean value of a gene | noised cell): what the other genes say times what the gene itself says.
    clean = graph.posterior(log_mu, noised, sigma, torch.zeros_like(sigma))[..., :4]

    def expected(log_score: Tensor) -> Tensor:
        values = torch.arange(4)
        each = [score_entropy(graph, NOISE, log_score, noised, v.expand_as(noised), t) for v in values]
        return (torch.stack(each, -1) * clean).sum(-1)

    true = graph.log_score(log_mu, noised, sigma).requires_grad_()
    least = expected(true)
    (gradient,) = torch.autograd.grad(least.sum(), true)
    assert gradient.abs().max() < 1e-12
    assert least.min() > -1e-12
    generator = torch.Generator().manual_seed(1)
    for size in (0.01, 0.3, 3.0):
        other = true.detach() + size * torch.randn(true.shape, generator=generator, dtype=torch.float64)
        assert (expected(other) - least.detach()).min() > -1e-12


@pytest.mark.parametrize("name", GRAPHS)
def test_small_noise_in_float32_is_finite_and_that_of_float64(name: str) -> None:
    graph = make_graph(name, 50)
    generator = torch.Generator().manual_seed(0)
    t = torch.full((64,), 1e-6 / 0.999, dtype=torch.float64)  # sigma = 1e-6
    clean = torch.randint(50, (64, 3), generator=generator)
    tokens = clean.clone()
    tokens[:, 0] = graph.mask_token if name == "absorbing" else (clean[:, 0] + 1) % 50
    log_mu = (3 * torch.randn(64, 3, 50, generator=generator)).log_softmax(-1)
    values = []
    for dtype in (torch.float32, torch.float64):
        x = log_mu.to(dtype).log_softmax(-1).requires_grad_()
        loss = score_entropy(graph, NOISE, graph.log_score(x, tokens, NOISE.sigma(t)), tokens, clean, t)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()
        values.append((loss.detach().double(), gradient.double()))
    (low, low_gradient), (high, high_gradient) = values
    torch.testing.assert_close(low, high, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(low_gradient, high_gradient, rtol=1e-4, atol=1e-5)


def test_terms_of_the_uniform_graph_do_not_cancel_where_scores_are_nearly_right() -> None:
    d = torch.tensor([1e-6, 1e-4, 1e-3, 0.0299, 0.0301, 1.0, 9.0])
    d = torch.cat([d, -d])
    want = torch.expm1(d.double()) - d.double()
    torch.testing.assert_close(_exp_minus_line(d).double(), want, rtol=1e-5, atol=0)


def integrated(joint: Joint, graph: Graph, noise: Noise, n_nodes: int = 40) -> float:
    """The score entropy of the exact model, integrated over t and summed over all cells and all noised cells."""
    model = ExactModel(joint, uniform=isinstance(graph, UniformGraph))
    noised = torch.cartesian_prod(*[torch.arange(graph.vocabulary)] * joint.n_vars)
    cells = joint.states
    pairs = torch.cartesian_prod(torch.arange(len(cells)), torch.arange(len(noised)))
    clean, tokens = cells[pairs[:, 0]], noised[pairs[:, 1]]
    if isinstance(graph, UniformGraph):
        reached = (tokens != graph.mask_token).all(1)
    else:
        reached = ((tokens == clean) | (tokens == graph.mask_token)).all(1)
    clean, tokens, weight = clean[reached], tokens[reached], joint.p.flatten()[pairs[reached, 0]]
    nodes, node_weights = np.polynomial.legendre.leggauss(n_nodes)
    total = 0.0
    # In powers of t, where the integrand is smooth down to t = 0.
    for u, w in zip((nodes + 1) / 2, node_weights / 2, strict=True):
        t = torch.full((len(clean),), u**4, dtype=torch.float64)
        sigma = noise.sigma(t)
        p = graph.transition(clean, sigma[:, None]).gather(-1, tokens[..., None]).prod(1).squeeze(-1)
        log_score = graph.log_score(model(tokens, sigma, everywhere=True), tokens, sigma)
        loss = score_entropy(graph, noise, log_score, tokens, clean, t).sum(1)
        total += w * 4 * u**3 * float((weight * p * loss).sum())
    return total


def entropy_given_the_end(joint: Joint, eps: float) -> float:
    """H(X0 | X1) when each gene is still visible at t = 1 with probability eps."""
    total = 0.0
    for visible in joint.masks:
        n = int(visible.sum())
        total += eps**n * (1 - eps) ** (joint.n_vars - n) * joint.entropy_given(visible)
    return total


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.2])
def test_integral_over_time_is_the_entropy_given_the_end(eps: float) -> None:
    joint = Joint.random(3, 4)
    got = integrated(joint, AbsorbingGraph(4), LogLinearNoise(eps))
    assert got == pytest.approx(entropy_given_the_end(joint, eps), abs=1e-9)
    if eps == 0:
        assert got == pytest.approx(joint.entropy(), abs=1e-9)


def test_integral_over_time_does_not_depend_on_the_schedule_between_its_ends() -> None:
    joint = Joint.random(2, 3)
    low, high = 1e-9, 30.0
    assert integrated(joint, AbsorbingGraph(3), GeometricNoise(low, high), 120) == pytest.approx(
        joint.entropy(), abs=1e-6
    )


def test_uniform_graph_integrates_to_the_entropy_less_what_the_end_still_tells() -> None:
    joint, noise = Joint.random(2, 3), LogLinearNoise(1e-3)
    graph = UniformGraph(3)
    # H(X0) = integral + E[KL(p(X1 | X0) || uniform)] - KL(p(X1) || uniform), as both ends are reached exactly.
    p = joint.p
    step = graph.transition(torch.arange(3), noise.sigma(torch.tensor(1.0, dtype=torch.float64)))[:, :3]
    end = torch.einsum("ab,ai,bj->ij", p, step, step)
    marginal_divergence = float((end * (9 * end).log()).sum())
    bound = integrated(joint, graph, noise, 80) + 2 * float(graph.limit_divergence(noise.sigma(1.0)))
    assert bound - marginal_divergence == pytest.approx(joint.entropy(), abs=1e-6)
    assert bound >= joint.entropy()


def test_loss_of_a_batch_is_the_score_entropy_of_the_network() -> None:
    joint, graph = Joint.random(3, 4), AbsorbingGraph(4)
    model, tokens = ExactModel(joint), joint.sample(64)
    t = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.99 + 0.01
    masked = torch.rand(64, 3, generator=torch.Generator().manual_seed(1)) < t[:, None]
    loss, per_cell = diffusion_loss(model, graph, NOISE, tokens.to(torch.uint8), masked, t.float())
    shown = hide(tokens, masked, 4)
    want = score_entropy(graph, NOISE, model(shown, NOISE.sigma(t)), shown, tokens, t).sum(1)
    torch.testing.assert_close(per_cell.double(), want, rtol=1e-5, atol=1e-6)
    assert float(loss) == pytest.approx(float(want.mean()) / 3, rel=1e-5)


def test_mask_token_of_256_bins_survives_tokens_of_one_byte() -> None:
    tokens = torch.tensor([[255, 0]], dtype=torch.uint8)
    assert hide(tokens, torch.tensor([[False, True]]), 256).tolist() == [[255, 256]]


def test_masked_objective_is_the_cross_entropy_of_the_hidden_genes() -> None:
    joint, graph = Joint.random(3, 4), AbsorbingGraph(4)
    model, tokens = ExactModel(joint), joint.sample(50)
    masked = torch.tensor([True, False, True]).expand(50, 3)
    loss, per_cell = diffusion_loss(model, graph, NOISE, tokens, masked, torch.ones(50), objective="masked")
    log_mu = model(hide(tokens, masked, 4), NOISE.sigma_at(torch.full((50,), 2 / 3)), targets=tokens)
    assert float(loss) == pytest.approx(float(-log_mu[masked].mean()), rel=1e-6)
    assert float(per_cell.mean()) == pytest.approx(3 * float(loss), rel=1e-6)


def test_loss_without_missing_genes_is_that_of_the_others() -> None:
    """Its mean over cells, times and masks is the entropy of what is known: of two genes here, of three there."""
    joint, graph, n = Joint.random(3, 4), AbsorbingGraph(4), 40_000
    tokens, generator = joint.sample(n), torch.Generator().manual_seed(0)
    missing = torch.zeros(n, 3, dtype=torch.bool)
    missing[::2, 2] = True
    t = stratified_times(n)
    masked = torch.rand(n, 3, generator=generator) < NOISE.mask_probability(t)[:, None]
    _, per_cell = diffusion_loss(ExactModel(joint), graph, NOISE, tokens, masked, t, missing=missing)
    two = Joint(joint.p.sum(2))
    for part, entropy in ((per_cell[::2], two.entropy()), (per_cell[1::2], joint.entropy())):
        assert abs(float(part.mean()) - entropy) < 4 * float(part.std()) / len(part) ** 0.5 + 0.01
    other = tokens.masked_fill(missing, 3)
    assert torch.equal(diffusion_loss(ExactModel(joint), graph, NOISE, other, masked, t, missing=missing)[1], per_cell)
    # Of a share of hidden genes the cost is that of the known ones, given all that is known and not hidden.
    masked = torch.tensor([True, False, True]).expand(n, 3)
    _, per_cell = diffusion_loss(ExactModel(joint), graph, NOISE, tokens, masked, t, objective="masked", missing=missing)
    found = float(per_cell[::2].mean()) / 2, float(per_cell[1::2].mean()) / 3
    first, last = two.entropy_given(torch.tensor([False, True])), Joint(joint.p.sum(0)).entropy_given(torch.tensor([True, False]))
    wanted = first, (first + last) / 2
    assert found == pytest.approx(wanted, abs=0.02)
    with pytest.raises(UserError, match="the uniform graph hides none"):
        diffusion_loss(ExactModel(joint, uniform=True), UniformGraph(4), NOISE, tokens, None, t, missing=missing)


def test_corruption_by_the_uniform_graph_repeats_with_its_generator() -> None:
    joint, graph = Joint.random(3, 4), UniformGraph(4)
    model, tokens, t = ExactModel(joint, uniform=True), joint.sample(32), torch.linspace(0.1, 1, 32)
    losses = [
        diffusion_loss(model, graph, NOISE, tokens, None, t, generator=torch.Generator().manual_seed(s))[1]
        for s in (0, 0, 1)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def trained(graph: Graph, noise: Noise, joint: Joint, steps: int) -> FreeModel:
    model = FreeModel(joint.n_vars, joint.n_bins)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    cells = joint.sample(steps * 256, seed=1).split(256)
    for step, tokens in enumerate(cells):
        t = (torch.randperm(256, generator=generator) + torch.rand(256, generator=generator)).clamp(min=1e-3) / 256
        masked = torch.rand(256, joint.n_vars, generator=generator) < noise.mask_probability(t)[:, None]
        loss, _ = diffusion_loss(model, graph, noise, tokens, masked, t, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        optimizer.step()
    return model


@pytest.mark.parametrize("name", GRAPHS)
def test_training_reaches_the_entropy_of_the_data(name: str) -> None:
    joint, graph = Joint.random(2, 3, sharpness=1.5), make_graph(name, 3)
    # The geometric schedule spends its time at all orders of noise alike, so that 1 / sigma does not blow up its variance.
    noise = GeometricNoise(1e-3, 10)
    test = joint.sample(4_000, seed=9)
    untrained = nelbo(FreeModel(2, 3), graph, noise, [test], form="time_integral").mean
    exact = nelbo(ExactModel(joint, uniform=name == "uniform"), graph, noise, [test], form="time_integral").mean
    reached = nelbo(trained(graph, noise, joint, 160), graph, noise, [test], form="time_integral").mean
    assert untrained > joint.entropy() + 0.4
    assert reached == pytest.approx(exact, abs=0.05)
    assert exact == pytest.approx(joint.entropy(), abs=0.1)


@pytest.mark.parametrize("attention", ["latent", "full"])
def test_the_network_learns_under_the_uniform_graph(attention: str) -> None:
    joint, graph, noise = Joint.random(2, 3, sharpness=2.0), UniformGraph(3), GeometricNoise(1e-2, 10)
    torch.manual_seed(0)
    model = SEDDTransformer(2, 3, hidden_dim=16, num_layers=1, num_heads=2, dropout=0.0, attention=attention)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    test = joint.sample(1_000, seed=9)
    before = nelbo(model, graph, noise, [test], n_masks=4).mean
    for tokens in joint.sample(40 * 128, seed=1).split(128):
        loss, _ = diffusion_loss(model, graph, noise, tokens, None, stratified_times(128))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert before == pytest.approx(2 * np.log(3), abs=0.2)
    assert nelbo(model, graph, noise, [test], n_masks=4).mean < before - 0.2


def test_bad_objectives_are_errors() -> None:
    joint = Joint.random(2, 3)
    tokens, t = joint.sample(4), torch.ones(4)
    with pytest.raises(UserError, match="unknown objective 'mse'; expected one of score_entropy, masked"):
        diffusion_loss(ExactModel(joint), AbsorbingGraph(3), NOISE, tokens, tokens > 0, t, objective="mse")
    with pytest.raises(UserError, match="needs the absorbing graph"):
        diffusion_loss(ExactModel(joint), UniformGraph(3), NOISE, tokens, None, t, objective="masked")
    with pytest.raises(UserError, match="found masked=None"):
        diffusion_loss(ExactModel(joint), AbsorbingGraph(3), NOISE, tokens, None, t)


def test_labels_count_more_in_the_gradient_and_as_they_are_in_what_is_reported() -> None:
    torch.manual_seed(0)
    model = SEDDTransformer(3, 4, hidden_dim=8, num_layers=1, num_heads=1, condition_sizes=(2, 3), answer_labels=True).eval()
    tokens, t = torch.randint(4, (6, 3)), torch.full((6,), 0.5)
    masked, labels = torch.rand(6, 3) < 0.5, torch.tensor([[1, 3], [2, 0]]).repeat(3, 1)
    shown, weight = labels * torch.tensor([0, 1]), torch.full((6, 2), 2.0)
    given = (model, AbsorbingGraph(4), NOISE, tokens, masked, t)
    loss, per_cell = diffusion_loss(*given, condition=shown, labels=labels, label_weight=weight)
    alone, genes = diffusion_loss(*given, condition=shown)
    torch.testing.assert_close(per_cell, genes + 2 * np.log(2))  # of an untrained model both labels of the first column are as probable
    torch.testing.assert_close(loss, alone + LABEL_EMPHASIS * 2 * np.log(2) / 3)
    plain = diffusion_loss(*given, condition=shown, labels=labels)[1]
    torch.testing.assert_close(plain, genes + np.log(2))


def test_the_network_is_told_all_that_is_hidden() -> None:
    """At each time the noise says how large a share is hidden on average, with what is missing."""

    class Told(ExactModel):
        def forward(self, tokens: Tensor, sigma: Tensor, **given: object) -> Tensor:
            self.share = -torch.expm1(-sigma.double())
            self.hidden = (tokens == 4).double().mean(1)
            return super().forward(tokens, sigma, **given)

    joint, n = Joint.random(3, 4), 20_000
    model, generator = Told(joint), torch.Generator().manual_seed(0)
    missing = torch.tensor([[False, False, True], [False, False, False]]).repeat(n // 2, 1)
    for at in (0.2, 0.7):
        t = torch.full((n,), at)
        masked = torch.rand(n, 3, generator=generator) < NOISE.mask_probability(t)[:, None]
        for objective in ("score_entropy", "masked"):
            diffusion_loss(model, AbsorbingGraph(4), NOISE, joint.sample(n), masked, t, missing=missing, objective=objective)
            for kind in (0, 1):
                assert float(model.share[kind::2].mean()) == pytest.approx(float(model.hidden[kind::2].mean()), abs=0.01)
