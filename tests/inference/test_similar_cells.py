"""Similar cells have a say in a cell's rates: by how probable they make its counts, and by what they counted."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import dense, make_counts

from sedd.errors import UserError
from sedd.inference.own_share import MIN_CELLS, Sample
from sedd.inference.pretrained import Pretrained
from sedd.inference.similar_cells import SimilarCells
from sedd.tasks import denoise

GENES, CPU = 40, torch.device("cpu")


def three_kinds(seed: int = 0, n: int = 240) -> tuple[Sample, np.ndarray]:
    """Shallow cells of three kinds, whose rates are predicted with an error, and the true rates."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=n)
    rates = rng.gamma(1.0, 1.0, (3, GENES))[kind] * rng.gamma(4.0, 1 / 4, (n, 1))
    counts = rng.poisson(rates).astype(np.float32)
    others = (rates * rng.gamma(4.0, 1 / 4, rates.shape)).astype(np.float32) + np.float32(1e-3)
    place = (kind[:, None] * 100 + rng.normal(size=(n, 2))).astype(np.float32)
    return Sample(np.arange(n) * 3, counts, others, others, place), rates


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def test_rates_are_means_weighed_by_likelihood_and_updated_by_counts() -> None:
    sample, _ = three_kinds(n=60)
    known = np.arange(GENES) % 7 != 0
    counts = sample.counts * known
    sharpness, prior = 0.2, 5.0
    similar = SimilarCells(sample.cells[:50], *tensors(known, sample.others[:50], counts[:50]), sharpness, prior)
    asked = np.arange(45, 60)  # five of them are among those that are compared with
    found = similar.moved(counts[asked], sample.others[asked], sample.cells[asked])
    for row, i in zip(found, asked, strict=True):
        among = [j for j in range(50) if j != i]
        rates = np.concatenate([sample.others[among], sample.others[[i]]]).astype(np.float64)
        shares = rates[:, known] / rates[:, known].sum(1, keepdims=True)
        weight = np.exp(sharpness * (counts[i, known] * np.log(shares)).sum(1))
        weight /= weight.sum()
        n = 1 / (weight**2).sum()
        seen, expected = (n * weight[:-1] @ array[among] for array in (counts, sample.others))
        want = weight @ rates * np.where(known, (seen + prior) / (expected + prior), 1)
        np.testing.assert_allclose(row, want * sample.others[i, known].sum() / want[known].sum(), rtol=2e-4)


def test_similar_cells_bring_rates_nearer_to_the_truth_and_leave_a_cell_like_no_other_alone() -> None:
    sample, rates = three_kinds()
    similar = SimilarCells.learned(sample, np.ones(GENES, bool), CPU)
    moved = similar.moved(sample.counts, sample.others, sample.cells)
    assert ((moved - rates) ** 2).mean() < 0.5 * ((sample.others - rates) ** 2).mean()
    np.testing.assert_allclose(moved.sum(1), sample.others.sum(1), rtol=1e-5)
    alone = np.where(np.arange(GENES) < 3, 300, 1e-3).astype(np.float32)[None]
    np.testing.assert_allclose(similar.moved(np.rint(alone), alone, np.array([10_000])), alone, rtol=0.02)
    empty = similar.moved(np.zeros((1, GENES), np.float32), alone, np.array([10_000]))
    assert np.isfinite(empty).all() and empty.sum() == pytest.approx(alone.sum(), rel=1e-5)


def test_a_cell_is_not_among_those_similar_to_it() -> None:
    sample, _ = three_kinds()
    other = sample.counts.copy()
    other[7] = 50  # its own counts, of which it is given none here
    one, two = (SimilarCells(sample.cells, *tensors(np.ones(GENES, bool), sample.others, counts), 0.1, 10.0) for counts in (sample.counts, other))
    asked = (sample.counts[[7]], sample.others[[7]], sample.cells[[7]])
    assert np.array_equal(one.moved(*asked), two.moved(*asked))
    assert not np.array_equal(one.moved(*asked[:2], np.array([1])), two.moved(*asked[:2], np.array([1])))


def test_similar_cells_have_a_say_where_own_counts_are_learned(model: Pretrained) -> None:
    adata = make_counts(MIN_CELLS + 20)
    found, alone = (denoise(model, adata, similar_cells=how, log1p=True, rounds=1, progress=False) for how in ("learned", "none"))
    facts = found.uns["sedd"]
    assert facts["similar_cells"] == "learned" and facts["similar_cells_sharpness"] > 0 and facts["similar_cells_prior"] > 0
    assert alone.uns["sedd"]["similar_cells"] == "none" and "similar_cells_prior" not in alone.uns["sedd"]
    x, y = dense(found.X), dense(alone.X)
    assert not np.allclose(x, y, rtol=0.01)
    np.testing.assert_allclose(dense(found.layers["sedd_std"]) / x, dense(alone.layers["sedd_std"]) / y, rtol=1e-4)
    assert np.array_equal(dense(found.layers["sedd_log1p"]), dense(alone.layers["sedd_log1p"]))
    assert np.array_equal(facts["own_share"], alone.uns["sedd"]["own_share"])
    for settings in ({"own_counts": "none"}, {"own_counts": "full"}):
        assert denoise(model, adata, rounds=1, progress=False, **settings).uns["sedd"]["similar_cells"] == "none"
    few = adata[: MIN_CELLS - 1].copy()
    assert np.array_equal(*(dense(denoise(model, few, similar_cells=how, rounds=1, progress=False).X) for how in ("learned", "none")))
    assert denoise(model, adata[:1].copy(), rounds=1, progress=False).uns["sedd"]["similar_cells"] == "none"


def test_results_with_similar_cells_do_not_depend_on_batches(model: Pretrained) -> None:
    adata = make_counts(MIN_CELLS + 20)
    one, other = (denoise(model, adata, rounds=1, batch_size=size, progress=False) for size in (9, 256))
    assert one.uns["sedd"]["similar_cells_sharpness"] == other.uns["sedd"]["similar_cells_sharpness"]
    np.testing.assert_allclose(dense(one.X), dense(other.X), rtol=5e-4, atol=1e-5)


def test_a_gene_that_the_data_lack_is_neither_compared_nor_taken_for_zero(model: Pretrained) -> None:
    whole = make_counts(MIN_CELLS + 20)
    missing = np.isin(np.asarray(whole.var_names), np.asarray(model.genes)[:9].astype(str))
    lack = whole[:, ~missing].copy()
    with pytest.warns(UserWarning, match="of the model's"):
        found, alone = (denoise(model, lack, similar_cells=how, rounds=1, progress=False) for how in ("learned", "none"))
    assert found.uns["sedd"]["similar_cells"] == "learned"
    absent = np.isin(np.asarray(found.var_names, str), np.asarray(found.uns["sedd"]["missing_genes"], str))
    x, y = dense(found.X)[:, absent], dense(alone.X)[:, absent]
    assert not np.array_equal(x, y) and x.mean() == pytest.approx(y.mean(), rel=0.3)


def test_another_word_for_similar_cells_is_refused(model: Pretrained) -> None:
    with pytest.raises(UserError, match="expected learned or none"):
        denoise(model, ad.AnnData(np.ones((2, 60), np.float32)), similar_cells="some", progress=False)
