"""What a sampler asks of single genes, and when genes become visible, against NumPy and against draws on tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.kernels.features import count_surprises
from sedd.kernels.random_bits import uniforms
from sedd.kernels.single_genes import add_surprises, products, sum_surprises
from sedd.kernels.turns import turns
from sedd.nn.backbones import Features, GeneEmbedding, LatentBackbone
from sedd.nn.blocks import Conditioner


@settings(deadline=None, max_examples=50)
@given(
    n_cells=st.integers(0, 5), n_vars=st.integers(1, 40), n_steps=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 2**40)
)
def test_turns_are_those_of_the_draws(n_cells: int, n_vars: int, n_steps: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hidden = rng.random((n_cells, n_vars)) < share
    names = rng.integers(0, 2**50, n_cells)
    curve = np.sort(rng.random(n_steps))[::-1].copy()
    curve[-1] = 0
    found = turns(hidden, names, curve, seed, 10, 11)
    when, value = (uniforms(seed, stream, torch.from_numpy(names), n_vars).numpy() for stream in (10, 11))
    step = (curve[None, None] > when[..., None]).sum(2)  # the first step after which fewer than the draw are left
    wanted = []
    for b in range(n_cells):
        own = np.unique(step[b][hidden[b]])
        wanted += [(int(np.searchsorted(own, step[b, g])), b, g) for g in np.flatnonzero(hidden[b])]
    wanted.sort()
    assert [(b, g) for _, b, g in wanted] == list(zip(found.cells, found.genes, strict=True))
    sizes = np.bincount([k for k, _, _ in wanted]) if wanted else np.zeros(0, int)
    assert np.diff(found.ends, prepend=0).tolist() == sizes.tolist()
    np.testing.assert_array_equal(found.u, value[found.cells, found.genes])
    # Which cells each turn has, and the share of their genes that is still hidden then.
    left, rows, shares = hidden.sum(1), [], []
    for k in range(len(sizes)):
        own = [b for turn, b, _ in wanted if turn == k]
        rows.append(sorted(set(own)))
        shares += [left[b] / n_vars for b in rows[-1]]
        start = found.ends[k] - sizes[k]
        assert [rows[-1][at] for at in found.here[start : found.ends[k]]] == own
        left -= np.bincount(own, minlength=n_cells)
    assert found.rows.tolist() == [b for own in rows for b in own]
    assert np.diff(found.row_ends, prepend=0).tolist() == [len(own) for own in rows]
    np.testing.assert_array_equal(found.share, shares)


@settings(deadline=None, max_examples=30)
@given(n_vars=st.integers(1, 30), dim=st.integers(1, 40), rank=st.integers(1, 5), n=st.integers(0, 60), seed=st.integers(0, 99))
def test_products_and_sums_of_single_genes_are_numpys(n_vars: int, dim: int, rank: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n_vars, dim)).astype(np.float32)
    factors = rng.normal(size=(3, rank, dim)).astype(np.float32)
    genes, cells = rng.integers(0, n_vars, n), rng.integers(0, 3, n)
    want = np.einsum("nrd,nd->nr", factors[cells].astype(np.float64), vectors[genes])
    np.testing.assert_allclose(products(vectors, factors, genes, cells), want, atol=1e-4)

    usual, counts = rng.random((n_vars, 2)).astype(np.float32), rng.choice([0, 1, 7, 5000], n)
    sums = np.zeros((3, 2, dim), np.float32)
    add_surprises(sums, vectors, usual, genes, cells, counts)
    want = np.zeros((3, 2, dim))
    for g, b, k in zip(genes, cells, counts, strict=True):
        want[b] += np.outer([(k > 0) - usual[g, 0], np.log1p(k) - usual[g, 1]], vectors[g])
    np.testing.assert_allclose(sums, want, atol=1e-3)


@settings(deadline=None, max_examples=60)
@given(
    n_vars=st.integers(1, 60),
    dim=st.integers(1, 9),
    hidden=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
    zeros=st.sampled_from([0.0, 0.8, 0.99]),
    dtype=st.sampled_from([np.int64, np.int32, np.uint16]),
    seed=st.integers(0, 99),
)
def test_sums_over_genes_that_are_not_zero_are_those_over_all_visible_ones(
    n_vars: int, dim: int, hidden: float, zeros: float, dtype: type, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = np.where(rng.random((5, n_vars)) < zeros, 0, rng.integers(1, 2000, (5, n_vars)))
    seen = rng.random((5, n_vars)) >= hidden
    tokens, usual = np.where(seen, counts, 60_000).astype(dtype), rng.random((n_vars, 2)).astype(np.float32)
    vectors = rng.normal(size=(n_vars, dim)).astype(np.float32)
    surprises = np.stack([counts > 0, np.log1p(counts)], 1) - usual.T.astype(np.float64)
    want = (surprises * seen[:, None]) @ vectors
    sums, left = sum_surprises(tokens, 60_000, usual, vectors)
    gone_through = np.where(seen.sum(1) < (~seen).sum(1), seen.sum(1), ((counts > 0) | ~seen).sum(1))
    np.testing.assert_array_equal(left, gone_through > n_vars // 4)
    np.testing.assert_allclose(sums[~left], want[~left], atol=1e-3)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.98])
def test_a_network_sums_sparse_and_dense_cells_alike(zeros: float) -> None:
    rng = np.random.default_rng(1)
    genes = GeneEmbedding(80, 16, None)
    backbone = LatentBackbone(genes, 16, 1, 2, 0.0, Features(999, None), 4, torch.rand(80, 2), 1)
    counts = np.where(rng.random((12, 80)) < rng.uniform(zeros, 1, (12, 1)), 0, rng.integers(1, 9, (12, 80)))
    tokens = torch.from_numpy(np.where(rng.random((12, 80)) < rng.choice([0, 0.1, 0.9], (12, 1)), 999, counts))
    with torch.no_grad():
        got = backbone.summary(tokens)
        part = torch.arange(3, 70, 2)
        got_part = backbone.summary(tokens[:, part], part)
    torch.testing.assert_close(got, backbone.summary(tokens).detach(), atol=1e-4, rtol=1e-4)  # with gradients: a product of matrices
    torch.testing.assert_close(got_part, backbone.summary(tokens[:, part], part).detach(), atol=1e-4, rtol=1e-4)


def test_surprises_are_features_less_the_usual() -> None:
    tokens, usual = np.array([[0, 3, 9, 5000]]), np.array([[0.25, 1.0], [0.5, 2.0], [0.1, 0.1], [0, 0]], np.float32)
    got = count_surprises(tokens, 9, usual)
    np.testing.assert_allclose(got, [[[-0.25, 0.5, 0, 1], [-1, np.log(4) - 2, 0, np.log(5001)]]], rtol=1e-6)


def test_cells_that_are_given_the_same_are_conditioned_once() -> None:
    conditioner = Conditioner(16, [3], True)
    sigma, library = torch.tensor([0.5, 2.0, 0.5, 0.5]), torch.tensor([7.0, 7.0, 7.0, torch.nan])
    condition = torch.tensor([[1], [1], [1], [0]])
    want = conditioner(sigma, condition, library).vectors
    with torch.no_grad():
        few = conditioner(sigma, condition, library)
        assert len(few.vectors) == 3
        torch.testing.assert_close(few.vectors[few.rows], want)
        one = conditioner(sigma[:1].expand(4), None, None)
        assert one.rows is None and len(one.vectors) == 1
