"""The bounds on the likelihood against the entropy of enumerated joints."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from toy import ExactModel, Joint

from sedd.errors import UserError
from sedd.graph import AbsorbingGraph, UniformGraph, make_graph
from sedd.likelihood import CellBatch, LibraryPrior, Likelihood, confidence_interval, nelbo
from sedd.loss import hide
from sedd.noise import GeometricNoise, LogLinearNoise

NOISE = LogLinearNoise()
GRAPH = AbsorbingGraph(4)


def surplus(joint: Joint, cells: torch.Tensor, found: Likelihood, exact: float) -> float:
    """How many standard errors the bound is off its exact value; the cells' own likelihoods are taken out first."""
    own = -joint.p.log().flatten()[(cells * joint.n_bins ** torch.arange(joint.n_vars - 1, -1, -1)).sum(1)].numpy()
    off = found.per_cell - own
    return (float(off.mean()) - (exact - joint.entropy())) / (float(off.std(ddof=1)) / math.sqrt(len(off)))


def test_time_free_form_over_all_masks_is_the_entropy() -> None:
    joint = Joint.random(3, 4)
    model, cells, p = ExactModel(joint), joint.states, joint.p.flatten()
    total = 0.0
    for masked in joint.masks[1:]:
        k = int(masked.sum())
        hidden = masked.expand(len(cells), -1)
        log_mu = model(hide(cells, hidden, 4), NOISE.sigma_at(torch.full((len(cells),), k / 3)), targets=cells)
        # L, times 1 / L for the size and 1 / (L choose k) for the subset, times 1 / k.
        total -= float((p * log_mu.sum(1)).sum()) / math.comb(3, k) / k
    assert total == pytest.approx(joint.entropy(), abs=1e-12)


def test_time_free_estimate_is_unbiased() -> None:
    joint = Joint.random(3, 4)
    cells = joint.sample(20_000, seed=3)
    found = nelbo(ExactModel(joint), GRAPH, NOISE, cells.split(6_000))
    assert abs(surplus(joint, cells, found, joint.entropy())) < 4
    assert found.mean == pytest.approx(joint.entropy(), abs=0.06)
    assert found.per_gene == found.mean / 3


@pytest.mark.parametrize("eps", [1e-6, 0.2])
def test_time_integral_estimate_is_the_entropy_given_the_end(eps: float) -> None:
    joint = Joint.random(3, 4)
    cells = joint.sample(20_000, seed=3)
    exact = sum(eps ** int(v.sum()) * (1 - eps) ** (3 - int(v.sum())) * joint.entropy_given(v) for v in joint.masks)
    found = nelbo(ExactModel(joint), GRAPH, LogLinearNoise(eps), [cells], form="time_integral", n_masks=16)
    assert abs(surplus(joint, cells, found, exact)) < 4
    assert found.mean == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_time_integral_of_a_geometric_schedule_is_the_entropy(name: str) -> None:
    joint = Joint.random(3, 4)
    cells = joint.sample(10_000, seed=3)
    model = ExactModel(joint, uniform=name == "uniform")
    found = nelbo(model, make_graph(name, 4), GeometricNoise(1e-3, 20), [cells], form="time_integral", n_masks=16)
    assert abs(surplus(joint, cells, found, joint.entropy())) < 4
    assert found.mean == pytest.approx(joint.entropy(), abs=0.1)


def test_what_a_schedule_destroys_before_it_starts_is_counted() -> None:
    joint, noise = Joint.random(3, 4), GeometricNoise(0.5, 20)
    cells, model, gone = joint.sample(10_000, seed=3), ExactModel(joint), float(noise.mask_probability(0.0))
    exact = joint.entropy()
    for masked in joint.masks:
        k = int(masked.sum())
        # Genes masked at the start are taken as independent given the others, which costs their total correlation.
        each = [
            joint.entropy_given(~masked) - joint.entropy_given(~masked | one) for one in torch.eye(3).bool()[masked]
        ]
        exact += gone**k * (1 - gone) ** (3 - k) * (sum(each) - joint.entropy_given(~masked))
    assert exact > joint.entropy() + 0.1
    found = nelbo(model, GRAPH, noise, [cells], form="time_integral", n_masks=8)
    assert abs(surplus(joint, cells, found, exact)) < 4


def test_masks_belong_to_cells_and_not_to_batches() -> None:
    joint = Joint.random(3, 4)
    cells, model = joint.sample(100), ExactModel(joint)
    whole = nelbo(model, GRAPH, NOISE, [cells]).per_cell
    assert np.array_equal(nelbo(model, GRAPH, NOISE, cells.split(7)).per_cell, whole)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    named = [CellBatch(cells[part], cell=part) for part in order.split(11)]
    assert np.array_equal(nelbo(model, GRAPH, NOISE, named).per_cell, whole[order.numpy()])
    assert not np.array_equal(nelbo(model, GRAPH, NOISE, [cells], seed=1).per_cell, whole)


def labelled(n: int) -> tuple[ExactModel, torch.Tensor, torch.Tensor, np.ndarray, float]:
    """A model of genes and a label with three values, cells, their labels, each cell's own -log p(genes, label), and the entropy."""
    joints = [Joint.random(3, 4, seed=s) for s in range(3)]
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (n,), generator=generator)
    cells = torch.stack([joint.sample(n, seed=7 + k) for k, joint in enumerate(joints)])[labels, torch.arange(n)]
    state = (cells * 4 ** torch.arange(2, -1, -1)).sum(1)
    table = torch.stack([joint.p.flatten() for joint in joints]) / 3
    entropy = -float((table * table.log()).sum())
    return ExactModel(*joints), cells, labels[:, None] + 1, -table.log()[labels, state].numpy(), entropy


def test_the_bound_over_all_masks_of_genes_and_label_is_their_joint_entropy() -> None:
    model = labelled(1)[0]
    joint, total = model.tables[1:].flatten(1) / 3, 0.0
    states = model.joint.states
    for hidden in itertools.product([False, True], repeat=4):
        k = sum(hidden)
        if not k:
            continue
        for label, p in enumerate(joint):
            tokens = hide(states, torch.tensor(hidden[:3]).expand(len(states), -1), 4)
            true = torch.full((len(states), 1), label + 1)
            given = {"targets": states, "labels": true, "condition": true * (not hidden[3])}
            log_mu, log_nu = model(tokens, NOISE.sigma_at(torch.full((len(states),), sum(hidden[:3]) / 3)), **given)
            total -= float((p * (log_mu.sum(1) + log_nu.sum(1))).sum()) / math.comb(4, k) / k
    assert total == pytest.approx(labelled(1)[-1], abs=1e-12)


@pytest.mark.parametrize("form", ["time_free", "time_integral"])
def test_the_bound_of_genes_and_labels_is_unbiased_and_without_a_label_that_of_the_genes(form: str) -> None:
    model, cells, labels, own, entropy = labelled(20_000)
    noise = LogLinearNoise(1e-6)
    found = nelbo(model, GRAPH, noise, [CellBatch(cells, labels=labels)], form=form, n_masks=8).per_cell - own
    error = float(found.std(ddof=1)) / math.sqrt(len(found))
    assert abs(float(found.mean())) < 4 * error < 0.08
    assert own.mean() == pytest.approx(entropy, abs=0.05)
    unknown = nelbo(model, GRAPH, noise, [CellBatch(cells, labels=torch.zeros_like(labels))], form=form, n_masks=8).per_cell
    state = (cells * 4 ** torch.arange(2, -1, -1)).sum(1)
    off = unknown + model.tables[0].flatten().log()[state].numpy()
    assert abs(float(off.mean())) < 4 * float(off.std(ddof=1)) / math.sqrt(len(off)) < 0.08


def test_cells_that_lack_different_genes_are_bounded_as_each_kind_alone() -> None:
    joint = Joint.random(3, 4)
    cells, names = joint.sample(12), torch.arange(100, 112)
    missing = torch.tensor([[False, True, False], [False, False, False], [True, False, True]]).repeat(4, 1)
    for form in ("time_free", "time_integral"):
        found = nelbo(ExactModel(joint), GRAPH, NOISE, [CellBatch(cells, cell=names, missing=missing)], form=form)
        assert found.n_vars == 2
        for kind in range(3):
            alone = CellBatch(cells[kind::3], cell=names[kind::3], missing=missing[kind])
            assert np.array_equal(nelbo(ExactModel(joint), GRAPH, NOISE, [alone], form=form).per_cell, found.per_cell[kind::3])


def test_labels_go_with_missing_genes_and_not_with_the_uniform_graph() -> None:
    model, cells, labels, _, _ = labelled(20_000)
    missing = torch.tensor([False, True, False])
    found = nelbo(model, GRAPH, NOISE, [CellBatch(cells, labels=labels, missing=missing)]).per_cell
    table = model.tables[1:].sum(2) / 3
    off = found + table.log()[labels[:, 0] - 1, cells[:, 0], cells[:, 2]].numpy()
    assert abs(float(off.mean())) < 4 * float(off.std(ddof=1)) / math.sqrt(len(off)) < 0.08
    with pytest.raises(UserError, match="uniform graph hides no labels"):
        nelbo(model, UniformGraph(4), NOISE, [CellBatch(cells, labels=labels)])


class Listening(ExactModel):
    """Keeps what it was shown."""

    def forward(self, tokens: torch.Tensor, sigma: torch.Tensor, **given: torch.Tensor | None) -> torch.Tensor:
        self.shown = [*getattr(self, "shown", []), (tokens.clone(), sigma.clone())]
        return super().forward(tokens, sigma, **given)


def test_two_models_see_the_same_masks_and_sizes_are_stratified() -> None:
    first, second = (Listening(Joint.random(6, 2, seed=s)) for s in (0, 1))
    cells = first.joint.sample(200)
    graph = AbsorbingGraph(2)
    pair = [nelbo(m, graph, NOISE, [cells], n_masks=6) for m in (first, second)]
    for (a, _), (b, _) in zip(first.shown, second.shown, strict=True):
        assert torch.equal(a == 2, b == 2)
    sizes = torch.stack([(tokens == 2).sum(1) for tokens, _ in first.shown], 1)
    assert torch.equal(sizes, torch.arange(1, 7).expand(200, 6))  # 6 masks of 6 genes: each size once a cell
    for (tokens, sigma), size in zip(first.shown, sizes.T, strict=True):
        assert chisquare((tokens == 2).sum(0).numpy()).pvalue > 1e-3
        torch.testing.assert_close(sigma, NOISE.sigma_at(size / 6).float())
    difference, low, high = pair[0].minus(pair[1])
    assert difference == pytest.approx(pair[0].mean - pair[1].mean)
    assert low < difference < high < 0


def test_training_mode_is_put_back() -> None:
    joint = Joint.random(2, 3)
    model = ExactModel(joint).train()
    nelbo(model, AbsorbingGraph(3), NOISE, [joint.sample(4)])
    assert model.training


def test_confidence_interval_is_students_and_covers_at_its_rate() -> None:
    assert confidence_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(
        (2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), rel=1e-5
    )
    assert confidence_interval(np.array([5.0])) == (-math.inf, math.inf)
    rows = np.random.default_rng(0).normal(size=(2_000, 10))
    covered = np.mean([low < 0 < high for low, high in map(confidence_interval, rows)])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_law_of_totals_sums_to_one_and_fits() -> None:
    totals = np.floor(np.random.default_rng(0).lognormal(7.0, 0.4, size=4_000))
    prior = LibraryPrior.fit(totals)
    assert (prior.location, prior.scale) == pytest.approx((7.0, 0.4), abs=0.02)
    every = np.arange(200_000)
    p = np.exp(-prior.nats(every))
    assert p.sum() == pytest.approx(1, abs=1e-9)
    assert prior.nats(totals).mean() == pytest.approx(np.log(0.4 * np.sqrt(2 * np.pi * np.e)) + 7.0, abs=0.05)
    assert np.isfinite(prior.nats(np.array([0, 1, 10**6]))).all()


def test_bad_requests_are_errors() -> None:
    joint = Joint.random(2, 3)
    model, cells = ExactModel(joint), joint.sample(4)
    with pytest.raises(UserError, match="unknown form of the bound 'exact'"):
        nelbo(model, AbsorbingGraph(3), NOISE, [cells], form="exact")
    with pytest.raises(UserError, match="time-free bound is of the absorbing graph"):
        nelbo(model, UniformGraph(3), NOISE, [cells], form="time_free")
    with pytest.raises(UserError, match="n_masks is 0"):
        nelbo(model, AbsorbingGraph(3), NOISE, [cells], n_masks=0)
    with pytest.raises(UserError, match="no cells to evaluate"):
        nelbo(model, AbsorbingGraph(3), NOISE, [])
    with pytest.raises(UserError, match=r"a token is 3; expected 0 to 2"):
        nelbo(model, AbsorbingGraph(3), NOISE, [torch.tensor([[0, 3]])])
    with pytest.raises(UserError, match="at least 2 training cells; found 1"):
        LibraryPrior.fit(np.array([7]))
    with pytest.raises(UserError, match="cannot pair 4 cells with 3"):
        Likelihood(np.zeros(4), 2).minus(Likelihood(np.zeros(3), 2))
