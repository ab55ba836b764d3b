"""The tasks with a network that knows a joint exactly, against what NumPy sums from the table of that joint."""

from __future__ import annotations

import anndata as ad
import naive
import numpy as np
import pytest
import torch
from conftest import dense
from scipy.stats import binomtest, chisquare, poisson
from toy import Joint, exact

from sedd.tasks import denoise, generate, impute

JOINT = Joint.random(4, 3, seed=2, sharpness=1.5)
STATES = JOINT.states.numpy()
TABLE = JOINT.p.numpy()


def cells_of(counts: np.ndarray) -> ad.AnnData:
    adata = ad.AnnData(np.asarray(counts, np.float32))
    adata.var_names = [f"gene{i}" for i in range(counts.shape[1])]
    return adata


def law(cell: np.ndarray, gene: int, hidden: set[int], table: np.ndarray = TABLE) -> np.ndarray:
    """p(gene | the genes of a cell that are not hidden), by summing the table over the others."""
    seen = table[tuple(slice(None) if j in {*hidden, gene} else int(cell[j]) for j in range(table.ndim))]
    axes = sorted({*hidden, gene})
    p = seen.sum(tuple(k for k, j in enumerate(axes) if j != gene))
    return p / p.sum()


def moments(p: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a law of counts."""
    mean = p @ np.arange(p.size)
    return mean, np.sqrt(p @ np.arange(p.size) ** 2 - mean**2)


def test_a_zero_gets_its_mean_given_all_other_genes_where_it_is_hidden_alone() -> None:
    out = impute(exact(JOINT), cells_of(STATES), folds=4, progress=False)
    want = np.array([[moments(law(cell, gene, set())) for gene in range(4)] for cell in STATES])
    zero = STATES == 0
    assert np.array_equal(dense(out.layers["sedd_hidden"]).astype(bool), zero)
    np.testing.assert_allclose(dense(out.X), np.where(zero, want[..., 0], STATES), atol=1e-6)
    np.testing.assert_allclose(dense(out.layers["sedd_std"]), np.where(zero, want[..., 1], 0), atol=1e-6)


def test_a_zero_that_is_hidden_with_another_gene_gets_the_mean_given_the_rest_and_any_other_gene_may_be_that() -> None:
    # A partition is of all cells of a call, so that their sums are made once; seeds differ in it.
    one, cell = exact(JOINT), cells_of(STATES[:1])
    out = np.concatenate([dense(impute(one, cell, folds=2, seed=seed, progress=False).X) for seed in range(200)])
    assert (STATES[0] == 0).all()
    for gene in range(4):
        means = np.array([moments(law(STATES[0], gene, {other}))[0] for other in range(4) if other != gene])
        off = np.abs(out[:, gene, None] - means)
        assert off.min(1).max() < 1e-6
        assert np.diff(np.sort(means)).min() > 1e-3  # so that it is clear with which gene it was hidden
        assert chisquare(np.bincount(off.argmin(1), minlength=3)).pvalue > 1e-4


def test_hidden_genes_get_their_means_given_the_visible_ones() -> None:
    out = impute(exact(JOINT), cells_of(STATES), hide=0.5, progress=False)
    hidden = dense(out.layers["sedd_hidden"]).astype(bool)
    np.testing.assert_array_equal(hidden, naive.exact_mask(0, 0, np.arange(len(STATES)), 4, 2))  # of (seed, cell) alone
    want = np.array([[moments(law(c, g, set(np.flatnonzero(h))))[0] for g in range(4)] for c, h in zip(STATES, hidden, strict=True)])
    np.testing.assert_allclose(dense(out.X), np.where(hidden, want, STATES), atol=1e-6)


RATES = np.array([[0.1, 1.2, 0.1, 1.5], [1.5, 0.1, 1.2, 0.1]])  # of two kinds of cells
KINDS = np.array([0.35, 0.65])
N_BINS = 8  # 2e-4 of the gene of the largest rate lies beyond


def two_kinds() -> Joint:
    """Cells of two kinds, whose genes are Poisson and independent given the kind."""
    table = 0.0
    for share, rates in zip(KINDS, RATES, strict=True):
        product = np.ones(())
        for rate in rates:
            product = product[..., None] * poisson.pmf(np.arange(N_BINS), rate)
        table = table + share * product
    return Joint(torch.from_numpy(table))


def test_denoising_by_the_other_genes_gives_the_enumerated_means_and_deviations() -> None:
    joint = two_kinds()
    rng = np.random.default_rng(0)
    kind = rng.choice(2, 800, p=KINDS)
    counts = np.minimum(rng.poisson(RATES[kind]), N_BINS - 1)
    model, adata = exact(joint), cells_of(counts)
    settings = {"folds": 4, "rounds": 1, "batch_size": 200, "progress": False}
    others = denoise(model, adata, own_counts="none", **settings)
    want = np.array([[moments(law(cell, gene, set(), joint.p.numpy())) for gene in range(4)] for cell in counts])
    np.testing.assert_allclose(dense(others.X), want[..., 0], rtol=1e-5)
    np.testing.assert_allclose(dense(others.layers["sedd_std"]), want[..., 1], rtol=1e-4)


@pytest.mark.parametrize("values", [[0, 1, 2], [0, 1, 6]])
def test_totals_of_generated_cells_have_the_law_of_the_joint(values: list[int]) -> None:
    n = 20_000
    made = dense(generate(exact(JOINT, np.array(values)), n, num_steps=400, batch_size=n, progress=False).X)
    totals = np.array(values)[STATES].sum(1)

    def of_totals(table: np.ndarray) -> np.ndarray:
        return np.bincount(totals, table.ravel())

    want, independent = of_totals(TABLE), of_totals(JOINT.independent().numpy())
    found = np.bincount(made.sum(1).astype(int), minlength=want.size)
    possible = want > 0
    assert found[~possible].sum() == 0
    assert chisquare(found[possible], n * want[possible]).pvalue > 1e-4
    assert chisquare(found[possible], n * independent[possible]).pvalue < 1e-12  # which genes that do not agree would have
    assert binomtest(int(found[0]), n, want[0]).pvalue > 1e-4


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_no_cell_depends_on_its_batch(batch_size: int) -> None:
    model, adata = exact(JOINT), cells_of(STATES[::2])  # 41, the last batch is a part of one
    tasks = [
        lambda size: impute(model, adata, folds=2, num_samples=2, num_steps=5, batch_size=size, progress=False),
        lambda size: impute(model, adata, hide=0.5, num_samples=2, num_steps=5, batch_size=size, progress=False),
        lambda size: denoise(model, adata, folds=2, num_samples=2, num_steps=5, batch_size=size, progress=False),
        lambda size: generate(model, 41, num_steps=5, batch_size=size, progress=False),
    ]
    for task in tasks:
        one, whole = task(batch_size), task(41)
        np.testing.assert_allclose(dense(one.X), dense(whole.X), rtol=1e-6)
        for name in whole.layers:
            np.testing.assert_allclose(dense(one.layers[name]), dense(whole.layers[name]), rtol=1e-5, atol=1e-6)
