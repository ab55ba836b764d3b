"""Denoising: what the other genes say, and what the count itself adds."""

from __future__ import annotations

import numpy as np
from conftest import dense, make_counts, true_rates

from sedd.inference.pretrained import Pretrained
from sedd.tasks import denoise


def test_denoising_is_nearer_to_the_truth_than_the_counts_the_gene_means_and_the_other_genes(model: Pretrained) -> None:
    adata, rates = make_counts(), true_rates()
    out, full, others = (denoise(model, adata, own_counts=own, progress=False) for own in ("learned", "full", "none"))
    counts = dense(adata.X)
    guesses = {"out": dense(out.X), "full": dense(full.X), "others": dense(others.X), "means": counts.mean(0), "counts": counts}
    error = {name: ((guess - rates) ** 2).mean() for name, guess in guesses.items()}
    assert error["out"] < 0.6 * error["means"] < error["counts"]
    assert error["out"] < error["full"] < error["others"] < error["means"]
    assert out.obs.equals(adata.obs)


def test_denoising_gives_what_was_asked_for(model: Pretrained) -> None:
    adata = make_counts(60)
    both = denoise(model, adata, own_counts="full", log1p=True, progress=False)
    others = denoise(model, adata, own_counts="none", progress=False)
    assert np.corrcoef(dense(both.X).ravel(), dense(adata.X).ravel())[0, 1] > np.corrcoef(
        dense(others.X).ravel(), dense(adata.X).ravel()
    )[0, 1]
    assert "sedd_log1p" not in others.layers
    totals = dense(adata.X).sum(1, keepdims=True)
    without = denoise(model, adata, own_counts="none", log1p=True, progress=False)
    for made in (both, without):
        log = dense(made.layers["sedd_log1p"])
        assert (log > 0).all()
        assert (log <= np.log1p(1e4 * dense(made.X) / totals) + 1e-5).all()  # Jensen: the logarithm is concave
    seen = np.log1p(1e4 * dense(adata.X) / totals)
    error = [((dense(made.layers["sedd_log1p"]) - seen) ** 2).mean() for made in (both, without)]
    assert error[0] < error[1]  # the count itself has a say
