from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import sedd
from sedd.errors import UserError
from sedd.inference import own_share
from sedd.inference.own_share import LEAST, MIN_CELLS, shares
from sedd.inference.pretrained import Pretrained


def groups(rng: np.random.Generator, *, shared: bool) -> tuple[np.ndarray, ...]:
    """Cells in 40 groups of 10 that lie together, whose rates vary between groups or, all alike, between single cells."""
    group = np.repeat(np.arange(40), 10)
    mean, theta = 6.0, 2.0
    factor = rng.gamma(theta, 1 / theta, (40 if shared else 400, 30))
    counts = rng.poisson(mean * (factor[group] if shared else factor)).astype(np.float32)
    others = np.full(counts.shape, mean, np.float32)
    own = (mean * (theta + counts) / (theta + mean)).astype(np.float32)
    return counts, others, own, group[:, None] * 100.0 + rng.normal(size=(400, 1))


def test_what_similar_cells_share_is_kept_and_what_is_a_cells_alone_is_not() -> None:
    rng = np.random.default_rng(0)
    assert shares(*groups(rng, shared=True)).mean() > 0.85
    assert np.array_equal(shares(*groups(rng, shared=False)), np.full(30, LEAST))


@pytest.fixture(scope="module")
def model_and_cells() -> tuple[Pretrained, ad.AnnData]:
    rng = np.random.default_rng(0)
    kind = rng.integers(3, size=MIN_CELLS + 20)
    rates = rng.gamma(1.0, 2.0, (3, 30))
    counts = rng.poisson(rates[kind] * rng.gamma(3.0, 1 / 3, (len(kind), 30))).astype(np.float32)
    adata = ad.AnnData(sparse.csr_matrix(counts))
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "num_latents": 1, "batch_size": 16, "num_epochs": 4, "num_threads": 1}
    model = sedd.train(adata, genes="all", val_fraction=0.1, log_with="none", learning_rate=1e-3, warmup_steps=5, **small)
    assert model is not None
    return model, adata


def test_a_rate_has_the_law_by_the_own_count_with_the_probability_that_was_learned(model_and_cells: tuple[Pretrained, ad.AnnData]) -> None:
    model, adata = model_and_cells
    found, full, none = (sedd.denoise(model, adata, own_counts=how, similar_cells="none", log1p=True, progress=False) for how in ("learned", "full", "none"))
    share = found.uns["sedd"]["own_share"].astype(np.float64)
    assert share.shape == (30,) and share.min() >= np.float32(LEAST) and share.max() <= 1 and (share < 1).any()
    assert found.uns["sedd"]["own_counts"] == "learned" and "own_share" not in full.uns["sedd"]
    m, a, b = (np.asarray(one.X, np.float64) for one in (found, full, none))
    np.testing.assert_allclose(m, share * a + (1 - share) * b, rtol=1e-5)
    v, va, vb = (np.asarray(one.layers["sedd_std"], np.float64) ** 2 for one in (found, full, none))
    second = share * (va + a**2) + (1 - share) * (vb - b + b**2)  # of a count, less that it is Poisson: of its rate
    np.testing.assert_allclose(v, second - m**2, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found.layers["sedd_log1p"], full.layers["sedd_log1p"])


def test_shares_do_not_depend_on_batches_and_are_of_spread_out_cells(
    model_and_cells: tuple[Pretrained, ad.AnnData], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adata = model_and_cells
    one, other = (sedd.denoise(model, adata, batch_size=size, progress=False) for size in (7, 256))
    assert np.array_equal(one.uns["sedd"]["own_share"], other.uns["sedd"]["own_share"])
    assert one.n_obs == adata.n_obs
    monkeypatch.setattr(own_share, "MAX_CELLS", 60)
    fewer = sedd.denoise(model, adata, progress=False)
    assert fewer.n_obs == adata.n_obs and not np.array_equal(fewer.uns["sedd"]["own_share"], one.uns["sedd"]["own_share"])


def test_of_few_cells_a_tenth_is_kept(model_and_cells: tuple[Pretrained, ad.AnnData]) -> None:
    model, adata = model_and_cells
    found = sedd.denoise(model, adata[: MIN_CELLS - 1].copy(), progress=False)
    assert np.array_equal(found.uns["sedd"]["own_share"], np.full(30, LEAST, np.float32))


def test_another_word_is_refused(model_and_cells: tuple[Pretrained, ad.AnnData]) -> None:
    with pytest.raises(UserError, match="expected learned, full or none"):
        sedd.denoise(model_and_cells[0], model_and_cells[1], own_counts="some", progress=False)
