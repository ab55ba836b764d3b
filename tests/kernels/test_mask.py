from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.kernels.mask import exact_mask, exact_mask_torch, random_mask, random_mask_torch, thresholds

CELLS = st.lists(st.integers(0, 2**40), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**31)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, epoch=st.integers(0, 1000), cells=CELLS, n_vars=st.integers(1, 70), p=st.floats(0, 1))
def test_random_mask_equals_the_oracle_and_torch(
    seed: int, epoch: int, cells: list[int], n_vars: int, p: float
) -> None:
    numbers = np.array(cells)
    probability = np.full(len(cells), p)
    masked = random_mask(seed, epoch, numbers, n_vars, probability)
    np.testing.assert_array_equal(masked, naive.random_mask(seed, epoch, numbers, n_vars, probability))
    twin = random_mask_torch(seed, epoch, torch.from_numpy(numbers), n_vars, torch.from_numpy(probability))
    np.testing.assert_array_equal(masked, twin.numpy())


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, cells=CELLS, n_vars=st.integers(1, 70), share=st.floats(0, 1))
def test_exact_mask_equals_the_oracle_and_torch(seed: int, cells: list[int], n_vars: int, share: float) -> None:
    numbers, count = np.array(cells), round(share * n_vars)
    masked = exact_mask(seed, 3, numbers, n_vars, count)
    np.testing.assert_array_equal(masked, naive.exact_mask(seed, 3, numbers, n_vars, count))
    np.testing.assert_array_equal(masked, exact_mask_torch(seed, 3, torch.from_numpy(numbers), n_vars, count).numpy())
    assert (masked.sum(axis=1) == count).all()


def test_exact_mask_of_many_genes_equals_torch() -> None:
    cells = np.arange(5) + 10**9
    for count in (0, 1, 4_321, 19_999, 20_000):
        twin = exact_mask_torch(7, 1, torch.from_numpy(cells), 20_000, count).numpy()
        np.testing.assert_array_equal(exact_mask(7, 1, cells, 20_000, count), twin)


def test_the_ends_of_the_probability_hide_nothing_and_everything() -> None:
    assert not random_mask(0, 0, np.arange(3), 1000, np.zeros(3)).any()
    assert random_mask(0, 0, np.arange(3), 1000, np.ones(3)).all()


@pytest.mark.parametrize("p", [0.01, 0.15, 0.5, 0.9])
def test_masks_have_the_right_rate_and_no_correlations(p: float) -> None:
    n, genes = 8_000, 400
    masked = random_mask(11, 5, np.arange(n), genes, np.full(n, p))
    z = (masked - p) / np.sqrt(p * (1 - p))
    assert abs(z.mean()) * np.sqrt(z.size) < 4.5  # a share of a sample of z.size, in standard errors
    assert 0.9 < (masked.sum(axis=1).var() / (genes * p * (1 - p))) < 1.1
    slack = 0.02 + 0.001 / min(p, 1 - p)  # rare events have heavy tails
    between_genes = (z.T @ z / n)[np.triu_indices(genes, 1)] * np.sqrt(n)
    assert abs(between_genes.var() - 1) < slack  # of 79,800 pairs
    some = z[:400]
    between_cells = (some @ some.T / genes)[np.triu_indices(400, 1)] * np.sqrt(genes)
    assert abs(between_cells.var() - 1) < slack
    for lag in range(1, 8):  # neighbouring cells do not share a mask shifted by a few genes
        assert abs((z[:-1, :-lag] * z[1:, lag:]).mean()) * np.sqrt((n - 1) * (genes - lag)) < 5


def test_epochs_seeds_and_cells_have_masks_of_their_own() -> None:
    half = np.full(1, 0.5)
    masks = [
        random_mask(seed, epoch, np.array([cell]), 4000, half)[0]
        for seed, epoch, cell in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert 0.45 < (one == other).mean() < 0.55


def test_bad_arguments_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="outside"):
        thresholds(np.array([0.5, 1.5]))
    with pytest.raises(ValueError, match="outside"):
        thresholds(np.array([np.nan]))
    with pytest.raises(ValueError, match="cannot hide 5 of 4"):
        exact_mask(0, 0, np.arange(2), 4, 5)
    with pytest.raises(ValueError, match="cannot hide 5 of 4"):
        exact_mask_torch(0, 0, torch.arange(2), 4, 5)
    with pytest.raises(ValueError, match="expected bool"):
        random_mask(0, 0, np.arange(2), 4, np.ones(2), out=np.empty((2, 5), bool))
