"""The samplers against enumerated joints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare
from torch import Tensor
from toy import ExactModel, ExactNetwork, Joint, TableHead

from sedd.errors import UserError
from sedd.graph import AbsorbingGraph, UniformGraph, make_graph
from sedd.kernels.random_bits import uniforms
from sedd.model import SEDDTransformer
from sedd.nn.heads import draw
from sedd.noise import GeometricNoise, LogLinearNoise, make_noise
from sedd.sampling import AnalyticSampler, EulerSampler, Sampler, make_sampler

NOISE = LogLinearNoise()
NAMES = ["analytic", "euler"]


def masks(n: int, joint: Joint) -> Tensor:
    return torch.full((n, joint.n_vars), joint.n_bins)


def sampler_of(name: str, joint: Joint, num_steps: int, **settings: Any) -> Sampler:
    settings = {"batch_size": 50_000, **settings}
    return make_sampler(name, ExactModel(joint), AbsorbingGraph(joint.n_bins), NOISE, num_steps=num_steps, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_distance_to_a_joint_of_two_genes_is_that_of_independence_where_one_step_draws_both(name: str) -> None:
    joint, n = Joint.random(2, 4, seed=4), 100_000
    p, q = joint.p, joint.independent()
    independent = 0.5 * float((p - q).abs().sum())
    assert independent > 0.3
    for steps in (1, 2, 5, 20, 100):
        cells = sampler_of(name, joint, steps).sample(masks(n, joint))
        # Both genes may fall into the same step, and are then drawn independently.
        ends = (np.arange(steps + 1) / steps) ** 3
        same = float((np.diff(ends) ** 2).sum())
        want = p + (q - p) * same
        assert joint.total_variation(cells) == pytest.approx(independent * same, abs=0.01)
        assert chisquare(joint.histogram(cells).numpy(), n * want.flatten().numpy()).pvalue > 1e-3


class Listening(ExactModel):
    """Counts the genes it is asked for, call by call."""

    def readout_at(self, summary: Tensor, sigma: Tensor, cells: Tensor, genes: Tensor, **given: Tensor | None) -> Tensor:
        self.asked = [*getattr(self, "asked", []), len(genes)]
        return super().readout_at(summary, sigma, cells, genes, **given)


class Independent(torch.nn.Module):
    """Genes that know nothing of each other: p(x_i) = softmax(log_p)."""

    def __init__(self, log_p: Tensor) -> None:
        super().__init__()
        self.log_p = log_p
        self.head = TableHead(1, len(log_p))
        self.asked: list[int] = []

    def summary(self, tokens: Tensor) -> Tensor:
        return tokens

    def unmask(self, *what: Tensor) -> None:
        pass

    def readout_at(self, summary: Tensor, sigma: Tensor, cells: Tensor, genes: Tensor, **given: Tensor | None) -> Tensor:
        self.asked.append(len(genes))
        return self.log_p.softmax(-1).expand(len(genes), -1)


@pytest.mark.parametrize("name", NAMES)
def test_each_step_unmasks_its_share(name: str) -> None:
    n_vars, n = 100_000, 10
    model = Independent(torch.zeros(3))
    tokens = torch.full((1, n_vars), 3)
    make_sampler(name, model, AbsorbingGraph(3), NOISE, num_steps=n).sample(tokens)
    assert len(model.asked) == n
    assert sum(model.asked) == n_vars
    assert binomtest(model.asked[0], n_vars, 1 / n**3).pvalue > 1e-3
    assert chisquare(model.asked, n_vars * np.diff((np.arange(n + 1) / n) ** 3)).pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 3, 64, 1000])
def test_euler_is_analytic_for_log_linear_noise(n: int) -> None:
    joint = Joint.random(3, 4)
    for eps in (0.0, 1e-3):
        curves = [
            kind(ExactModel(joint), AbsorbingGraph(4), LogLinearNoise(eps), num_steps=n).survival()
            for kind in (EulerSampler, AnalyticSampler)
        ]
        torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(curves[1], 1 - (torch.arange(1, n + 1, dtype=torch.float64) / n) ** 3, rtol=0, atol=1e-12)
    cells = [sampler_of(name, joint, n).sample(masks(2_000, joint), seed=5) for name in NAMES]
    assert torch.equal(*cells)


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_the_absorbing_graph_are_those_of_its_rate(name: str) -> None:
    joint, graph = Joint.random(3, 4), AbsorbingGraph(4)
    sampler = make_sampler(name, ExactModel(joint), graph, GeometricNoise(), num_steps=60)
    tokens = torch.tensor([[4, 4, 2]])
    curve = torch.cat([torch.ones(1, dtype=torch.float64), sampler.survival()])
    for k in range(60):
        t, s = 1 - (k / 60) ** 3, 1 - ((k + 1) / 60) ** 3
        log_mu = ExactModel(joint)(tokens, torch.ones(1), everywhere=True)
        p = sampler.step_probabilities(log_mu, tokens, t, s)
        # The schedule that is drawn from beforehand is the product of what the steps leave masked.
        torch.testing.assert_close(p[0, :2, 4], (curve[k + 1] / curve[k]).expand(2), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(p[0, :2, :4], (1 - p[0, :2, 4:]) * log_mu[0, :2].exp(), rtol=1e-9, atol=1e-12)
        assert torch.equal(p[0, 2], torch.eye(5, dtype=torch.float64)[2])


@pytest.mark.parametrize("graph", ["absorbing", "uniform"])
@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
@pytest.mark.parametrize("name", NAMES)
def test_no_mask_survives_and_what_was_observed_is_kept(graph: str, noise: str, name: str) -> None:
    joint = Joint.random(3, 4)
    start = joint.sample(200).masked_fill(torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) < 0.5, 4)
    known = start != 4
    model = ExactModel(joint, uniform=graph == "uniform")
    for order in ("random", "confidence") if graph == "absorbing" else ("random",):
        for n in (1, 2, 17):
            sampler = make_sampler(name, model, make_graph(graph, 4), make_noise(noise), num_steps=n, order=order)
            before = start.clone()
            cells = sampler.sample(start)
            assert cells.min() >= 0
            assert cells.max() < 4
            assert torch.equal(cells[known], start[known])
            assert torch.equal(start, before)


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
@pytest.mark.parametrize("name", NAMES)
def test_many_steps_draw_the_joint_and_its_top_bin(noise: str, name: str) -> None:
    joint, n = Joint.random(3, 4), 40_000
    model = ExactModel(joint)
    steps = 256 if noise == "loglinear" else 1024
    sampler = make_sampler(name, model, AbsorbingGraph(4), make_noise(noise), num_steps=steps, batch_size=n)
    cells = sampler.sample(masks(n, joint), seed=11)
    assert joint.total_variation(cells) < 0.02
    for gene in range(3):
        top = float(joint.p.movedim(gene, 0)[3].sum())
        counts = np.bincount(cells[:, gene].numpy() == 3, minlength=2)
        assert chisquare(counts, [n * (1 - top), n * top]).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_uniform_graph_draws_the_joint_as_steps_grow(name: str) -> None:
    joint, n = Joint.random(2, 3), 10_000
    model, graph = ExactModel(joint, uniform=True), UniformGraph(3)
    distance = []
    for steps in (2, 8, 32):
        sampler = make_sampler(name, model, graph, NOISE, num_steps=steps, batch_size=n)
        distance.append(joint.total_variation(sampler.sample(masks(n, joint), seed=2)))
    assert distance[0] > 2 * distance[1] > 3 * distance[2]
    assert distance[2] < 0.03


def float32_gumbel_rate(log_p: float) -> float:
    """Rate at which Gumbel-max in float32 draws a value of log-probability `log_p` beside one of about 1.

    torch's float32 uniform numbers are multiples of 2^-24: both draws are enumerated, not sampled.
    """
    u = (np.arange(1, 1 << 24, dtype=np.float64) / (1 << 24)).astype(np.float32)
    gumbel = np.sort(-np.log(-np.log(u)))
    top = gumbel[-4096:]  # below these the rare value cannot win: the other one's least Gumbel number is -2.8
    assert gumbel[-4097] + np.float32(log_p) < gumbel[0]
    beaten = np.searchsorted(gumbel, top + np.float32(log_p), side="left")
    return float(beaten.mean() * len(top) / len(gumbel) / len(gumbel))


def test_a_value_of_probability_1e_8_is_drawn_at_that_rate() -> None:
    # 20,000 values of probability 1e-8 each, beside one that has the rest: 2 million draws should find 400.
    n_rare, n = 20_000, 2_000_000
    p = torch.full((n_rare + 1,), 1e-8, dtype=torch.float64)
    p[0] = 1 - 1e-8 * n_rare
    drawn = draw(p.log().float(), uniforms(0, 11, torch.arange(n // 1000), 1000).flatten())
    found = int((drawn > 0).sum())
    assert binomtest(found, n, 1e-8 * n_rare).pvalue > 1e-3
    assert len(torch.unique(drawn[drawn > 0])) > 0.9 * found
    float32 = float32_gumbel_rate(np.log(1e-8))
    assert binomtest(round(n * n_rare * float32), n, 1e-8 * n_rare).pvalue < 1e-6


def test_draws_follow_the_row_and_never_take_what_is_impossible() -> None:
    log_p = torch.tensor([[0.1, 0.0, 0.6, 0.3, 0.0], [0.0, 0.5, 0.0, 0.0, 0.5]]).log()
    u = uniforms(0, 0, torch.arange(1), 50_000).flatten()
    for row in log_p:
        for counts in (
            torch.bincount(draw(row, u), minlength=5),
            torch.bincount(draw(row.expand(len(u), 5) + 7.5, u), minlength=5),
        ):
            p = row.exp().double()
            assert counts[p == 0].sum() == 0
            assert chisquare(counts[p > 0].numpy(), (p[p > 0] * len(u)).numpy(), sum_check=False).pvalue > 1e-3
    assert draw(torch.tensor([[0.0, float("nan")], [0.0, -torch.inf]]), u[:2]).tolist() == [-1, 0]
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(log_p[0], ends).tolist() == [0, 3]
    assert draw(log_p[1], ends).tolist() == [1, 4]  # the first number that is drawn is 0, which is not below p = 0


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_a_model_that_has_diverged_is_an_error(order: str) -> None:
    sampler = make_sampler("analytic", Independent(torch.tensor([0.5, torch.nan]).log()), AbsorbingGraph(2), NOISE, num_steps=3, order=order)
    with pytest.raises(UserError, match="not a number: its training has diverged"):
        sampler.sample(torch.full((4, 5), 2))


@pytest.mark.parametrize("name", NAMES)
def test_imputation_draws_the_conditional_joint_and_not_the_marginals(name: str) -> None:
    joint, n = Joint.random(3, 4, seed=3, sharpness=2.5), 40_000
    start = masks(n, joint)
    start[:, 1] = 2
    given = joint.p[:, 2] / joint.p[:, 2].sum()
    conditional = Joint(given)
    assert 0.5 * float((given - conditional.independent()).abs().sum()) > 0.15
    cells = sampler_of(name, joint, 200).sample(start, seed=1)
    assert torch.equal(cells[:, 1], start[:, 1])
    assert conditional.total_variation(cells[:, [0, 2]]) < 0.02


def test_posterior_mean_is_the_enumerated_one_and_the_mean_of_the_draws() -> None:
    joint, n = Joint.random(3, 4), 40_000
    start = masks(n, joint)
    start[:, 0] = 1
    values = torch.tensor([0.0, 1.0, 2.5, 7.0], dtype=torch.float64)
    given = joint.p[1] / joint.p[1].sum()
    want = [float(given.sum(1) @ values), float(given.sum(0) @ values)]
    mean, var = ExactNetwork(joint, values.float()).expectation(start[:1], torch.ones(1))
    assert mean[0].tolist() == pytest.approx([1.0, *want], abs=1e-5)
    assert float(var[0, 0]) == 0
    drawn = values[sampler_of("analytic", joint, 64).sample(start)].mean(0)
    assert drawn[1:].tolist() == pytest.approx(want, abs=5 * 3.5 / n**0.5)


def test_draws_of_a_cell_do_not_depend_on_batches_or_on_other_cells() -> None:
    joint = Joint.random(3, 4)
    start = joint.sample(101).masked_fill(torch.rand(101, 3, generator=torch.Generator().manual_seed(0)) < 0.8, 4)
    for graph, uniform in ((AbsorbingGraph(4), False), (UniformGraph(4), True)):
        model = ExactModel(joint, uniform=uniform)
        whole = make_sampler("euler", model, graph, NOISE, num_steps=9, batch_size=1000).sample(start, seed=7)
        small = make_sampler("euler", model, graph, NOISE, num_steps=9, batch_size=8)
        assert torch.equal(small.sample(start, seed=7), whole)
        some = np.array([50, 3, 99])
        assert torch.equal(small.sample(start[some], seed=7, cells=some), whole[some])
        assert not torch.equal(small.sample(start, seed=8), whole)


def test_a_cell_costs_no_more_than_its_masked_genes_however_many_steps() -> None:
    joint = Joint.random(3, 4)
    start = masks(50, joint)
    start[10:] = joint.sample(40)
    start[9, 0] = 1
    model = Listening(joint)
    make_sampler("analytic", model, AbsorbingGraph(4), NOISE, num_steps=10_000).sample(start)
    assert model.calls == 3
    assert model.cells_seen == 9 * 3 + 2
    assert sum(model.asked) == 9 * 3 + 2


def test_the_confident_order_asks_the_network_once_for_each_step_that_unmasks() -> None:
    joint = Joint.random(3, 4)
    start = masks(50, joint)
    start[10:] = joint.sample(40)
    start[9, 0] = 1
    for num_steps, passes in ((10_000, 9 * 3 + 2), (1, 10), (2, 2 * 10)):
        model = Listening(joint)
        make_sampler("analytic", model, AbsorbingGraph(4), NOISE, num_steps=num_steps, order="confidence").sample(start)
        assert model.cells_seen == passes


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_free_one() -> None:
    joints = [Joint.random(3, 4, seed=s) for s in (0, 1)]
    model, graph, start = ExactModel(*joints), AbsorbingGraph(4), masks(500, joints[0])
    condition = torch.full((500, 1), 2)

    def sample(guidance: float, condition: Tensor | None) -> Tensor:
        return AnalyticSampler(model, graph, NOISE, num_steps=8, guidance=guidance).sample(start, condition=condition)

    alone = AnalyticSampler(ExactModel(joints[1]), graph, NOISE, num_steps=8).sample(start)
    model.calls = 0
    assert torch.equal(sample(1.0, condition), alone)
    calls = model.calls
    assert torch.equal(sample(0.0, condition), sample(1.0, None))
    assert model.calls == calls + 2 * calls + calls  # twice the work where it guides, none where it does not


def test_guidance_and_temperature_shape_the_distribution_as_they_say() -> None:
    joints, n = [Joint.random(1, 5, seed=s) for s in (0, 1)], 40_000
    model, graph = ExactModel(*joints), AbsorbingGraph(5)
    condition = torch.full((n, 1), 1)
    null = (joints[0].p + joints[1].p) / 2
    cases: list[tuple[dict[str, float], Callable[[Tensor], Tensor]]] = [
        ({"guidance": 1.5}, lambda p: p**1.5 * null**-0.5),
        ({"temperature": 0.5}, lambda p: p**2),
        ({"temperature": 2.0, "guidance": 2.0}, lambda p: p / null**0.5),
    ]
    for settings, shape in cases:
        sampler = make_sampler("analytic", model, graph, NOISE, num_steps=2, batch_size=n, **settings)
        cells = sampler.sample(masks(n, joints[0]), condition=condition)
        want = shape(joints[0].p) / shape(joints[0].p).sum()
        assert chisquare(torch.bincount(cells[:, 0], minlength=5).numpy(), (n * want).numpy()).pvalue > 1e-3


def test_confident_order_takes_the_surest_genes_first_and_is_biased() -> None:
    # Gene 0 is sure; gene 1 is a coin.
    joint = Joint(torch.tensor([[0.49, 0.49], [0.01, 0.01]]))
    model = Listening(joint)
    sampler = make_sampler("analytic", model, AbsorbingGraph(2), NOISE, num_steps=2, order="confidence")
    seen: list[Tensor] = []
    original = model.readout

    def listen(tokens: Tensor, *args: Any, **given: Any) -> Tensor:
        seen.append(tokens.clone())
        return original(tokens, *args, **given)

    model.readout = listen  # type: ignore[method-assign]
    sampler.sample(masks(64, joint))
    assert torch.equal(seen[-1][:, 1], torch.full((64,), 2))
    assert (seen[-1][:, 0] < 2).all()
    # Two coins that always agree beside two sure genes: the sure ones go first and the coins together, as if independent.
    coins = torch.zeros(2, 2, 2, 2)
    coins[0, 0, 0, 0] = coins[1, 1, 0, 0] = 0.46
    coins += 0.005
    agreeing = Joint(coins)
    distance = {}
    for order in ("random", "confidence"):
        cells = sampler_of("analytic", agreeing, 3, order=order).sample(masks(20_000, agreeing))
        distance[order] = agreeing.total_variation(cells)
    assert distance["confidence"] > distance["random"] + 0.1


def test_progress_is_told_from_nothing_to_all() -> None:
    joint = Joint.random(2, 3)
    told: list[tuple[int, int]] = []
    sampler = sampler_of("analytic", joint, 5, batch_size=3)
    sampler.sample(masks(10, joint), progress=lambda done, total: told.append((done, total)))
    shares = [done / total for done, total in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_nothing_to_draw_is_nothing_done() -> None:
    joint = Joint.random(2, 3)
    for order in ("random", "confidence"):
        sampler = sampler_of("analytic", joint, 5, order=order)
        assert torch.equal(sampler.sample(joint.sample(10)), joint.sample(10))
        assert sampler.sample(masks(0, joint)).shape == (0, 2)
        assert sampler.model.calls == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"temperature": 0.0}, r"temperature is 0\.0; expected more than 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"order": "sorted"}, "unknown order 'sorted'; expected one of random, confidence"),
        ({"guidance": -1.0}, r"guidance is -1\.0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_out_of_range_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_sampler("euler", ExactModel(Joint.random(2, 3)), AbsorbingGraph(3), NOISE, **settings)


def test_unknown_sampler_and_aimless_guidance_are_errors() -> None:
    model = ExactModel(Joint.random(2, 3))
    with pytest.raises(UserError, match="unknown sampler 'ddim'; expected one of analytic, euler"):
        make_sampler("ddim", model, AbsorbingGraph(3), NOISE)
    with pytest.raises(UserError, match="nothing to be guided by"):
        make_sampler("euler", model, AbsorbingGraph(3), NOISE, guidance=1.5).sample(torch.full((2, 2), 3))
    with pytest.raises(UserError, match="a token is 4; expected 0 to 3"):
        make_sampler("euler", model, AbsorbingGraph(3), NOISE).sample(torch.full((2, 2), 4))
    with pytest.raises(UserError, match="the model has 3 states and the graph 4"):
        make_sampler("euler", model, AbsorbingGraph(4), NOISE)
    with pytest.raises(UserError, match="needs the absorbing graph"):
        make_sampler("euler", model, UniformGraph(3), NOISE, order="confidence")


def network(**settings: Any) -> SEDDTransformer:
    torch.manual_seed(0)
    model = SEDDTransformer(12, 5, hidden_dim=16, num_layers=1, num_heads=2, **settings)
    with torch.no_grad():
        for p in model.parameters():  # outputs start at the marginals, which no input moves
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("attention", ["latent", "full"])
@pytest.mark.parametrize("graph", ["absorbing", "uniform"])
def test_the_network_draws_the_same_cells_in_batches_of_any_size(attention: str, graph: str) -> None:
    model = network(attention=attention)
    start = torch.full((40, 12), 5)
    start[:, :3] = 1
    sizes = (5, 64)
    cells = [
        make_sampler("analytic", model, make_graph(graph, 5), NOISE, num_steps=6, batch_size=b).sample(start)
        for b in sizes
    ]
    assert cells[0].max() < 5
    assert torch.equal(cells[0][:, :3], start[:, :3])
    # Matrix products of other shapes round differently, which moves a draw once in millions.
    assert all(torch.equal(cells[0], other) for other in cells[1:])
    assert len(torch.unique(cells[0], dim=0)) > 5


def test_guidance_of_the_network_is_the_conditional_model_at_one_and_the_free_one_at_zero() -> None:
    model = network(condition_sizes=(3,), condition_library=True)
    start, condition, library = torch.full((300, 12), 5), torch.full((300, 1), 2), torch.full((300,), 6.0)
    unguided = make_sampler("analytic", model, AbsorbingGraph(5), NOISE, num_steps=4)
    guided = make_sampler("analytic", model, AbsorbingGraph(5), NOISE, num_steps=4, guidance=1.0)
    given = {"condition": condition, "library": library}
    assert torch.equal(guided.sample(start, **given), unguided.sample(start, **given))
    null = {"condition": torch.zeros_like(condition), "library": torch.full_like(library, float("nan"))}
    free = make_sampler("analytic", model, AbsorbingGraph(5), NOISE, num_steps=4, guidance=0.0)
    assert torch.equal(free.sample(start, **given), unguided.sample(start, **null))
    assert not torch.equal(free.sample(start, **given), guided.sample(start, **given))
