"""Cells under other labels than their own: what a batch adds is taken out, from embeddings and from denoised counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from conftest import TINY_FLAGS, dense, make_counts, true_rates

from sedd.cli import main
from sedd.errors import UserError
from sedd.inference.posterior import MAX_LABELS, labels_as_if
from sedd.inference.pretrained import Pretrained
from sedd.tasks import denoise, embed

BATCHES = ("b1", "b2", "b3")


def in_batches(seed: int = 0) -> tuple[ad.AnnData, np.ndarray]:
    """Cells of three types in three batches, each of which changes the genes' rates in its own way, and the changes."""
    rng = np.random.default_rng([seed, 11])  # not the draws of the types
    adata = make_counts(300)
    adata.obs["batch"] = rng.choice(BATCHES, 300)
    effect = np.random.default_rng(7).lognormal(0, 0.7, (3, 60))
    rates = true_rates(300) * effect[[BATCHES.index(b) for b in adata.obs["batch"]]] * 4
    adata.X = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    return adata, effect


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A model that is given cell types and batches."""
    folder = tmp_path_factory.mktemp("batched")
    in_batches()[0].write_h5ad(folder / "a.h5ad")
    flags = ["--condition", "cell_type", "batch", "--num_epochs", "20"]
    assert main(["train", "--data_path", str(folder / "a.h5ad"), "--checkpoint_dir", str(folder / "run"), *TINY_FLAGS, *flags]) == 0
    return Pretrained.load(folder / "run")


def with_batch(adata: ad.AnnData, label: str) -> ad.AnnData:
    other = adata.copy()
    other.obs["batch"] = label
    return other


def test_as_if_is_what_a_cell_of_that_label_gets_by_its_other_genes(batched: Pretrained) -> None:
    adata = in_batches()[0][:40].copy()
    found = denoise(batched, adata, as_if={"batch": "b2"}, log1p=True, progress=False)
    plain = denoise(batched, with_batch(adata, "b2"), own_counts="none", log1p=True, progress=False)
    for layer in (None, "sedd_std", "sedd_log1p"):
        one, other = (dense(result.X if layer is None else result.layers[layer]) for result in (found, plain))
        assert np.array_equal(one, other)
    assert found.obs["batch"].equals(adata.obs["batch"])
    assert found.uns["sedd"]["as_if"] == {"batch": "b2"} and found.uns["sedd"]["own_counts"] == "none"
    nowhere = denoise(batched, with_batch(adata, "a batch of today"), as_if={"batch": "b2"}, progress=False)
    assert np.array_equal(dense(nowhere.X), dense(found.X))  # its own label is not looked at
    drawn = denoise(batched, adata, as_if={"batch": "b2"}, num_samples=2, num_steps=4, progress=False)
    again = denoise(batched, with_batch(adata, "b2"), own_counts="none", num_samples=2, num_steps=4, progress=False)
    assert np.array_equal(dense(drawn.layers["sedd_mean"]), dense(again.layers["sedd_mean"]))


def test_the_average_is_that_of_all_labels(batched: Pretrained) -> None:
    adata = in_batches()[0][:40].copy()
    each = [denoise(batched, adata, as_if={"batch": label}, log1p=True, progress=False) for label in BATCHES]
    found = denoise(batched, adata, as_if={"batch": "average"}, log1p=True, progress=False)
    means = np.stack([dense(result.X) for result in each]).astype(np.float64)
    np.testing.assert_allclose(dense(found.X), means.mean(0), rtol=1e-5)
    squares = np.stack([dense(result.layers["sedd_std"]) for result in each]).astype(np.float64) ** 2 + means**2
    np.testing.assert_allclose(dense(found.layers["sedd_std"]), np.sqrt(squares.mean(0) - means.mean(0) ** 2), rtol=1e-3)
    logs = np.mean([dense(result.layers["sedd_log1p"]) for result in each], 0)
    np.testing.assert_allclose(dense(found.layers["sedd_log1p"]), logs, rtol=1e-5)
    embedded = [embed(batched, with_batch(adata, label), progress=False).obsm["X_sedd"] for label in BATCHES]
    one = embed(batched, with_batch(adata, "unheard of"), without=["batch"], progress=False)
    np.testing.assert_allclose(one.obsm["X_sedd"], np.mean(embedded, 0), rtol=1e-4, atol=1e-5)
    assert list(one.uns["sedd"]["without"]) == ["batch"]


def profiles(counts: np.ndarray, batch: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Mean log share of each gene in cells of each batch and type, (batches, types, genes)."""
    share = counts / counts.sum(1, keepdims=True)
    return np.log(np.array([[share[(batch == b) & (kind == k)].mean(0) for k in np.unique(kind)] for b in BATCHES]) + 1e-4)


def test_under_one_batch_cells_of_all_batches_have_the_rates_that_it_would_have_given_them(batched: Pretrained) -> None:
    adata, effect = in_batches()
    keep = adata.obs["cell_type"].notna().to_numpy()
    batch, kind = (adata.obs[column].astype(str).to_numpy()[keep] for column in ("batch", "cell_type"))
    raw = profiles(dense(adata.X)[keep], batch, kind)
    found = profiles(dense(denoise(batched, adata, as_if={"batch": "b2"}, progress=False).X)[keep], batch, kind)
    # All batches had the same cells, so what differs between them is theirs alone.
    assert found.std(0).mean() < 0.4 * raw.std(0).mean()
    true = profiles(true_rates(300)[keep] * effect[1], batch, kind)
    assert np.abs(found - true).mean() < 0.7 * np.abs(raw - true).mean()


def test_an_embedding_without_batches_mixes_them_and_keeps_types_apart(batched: Pretrained) -> None:
    adata = in_batches()[0]
    del adata.obs["cell_type"]  # so it is not given
    kind, batch = np.array([str(label) for label in make_counts(300).obs["cell_type"]]), adata.obs["batch"].to_numpy()

    def distinct(z: np.ndarray, labels: np.ndarray) -> float:
        between = np.stack([z[labels == label].mean(0) for label in labels])
        return float(((between - z.mean(0)) ** 2).sum() / ((z - z.mean(0)) ** 2).sum())

    own = embed(batched, adata, progress=False).obsm["X_sedd"]
    without = embed(batched, adata, without=["batch"], progress=False).obsm["X_sedd"]
    assert distinct(without, batch) < 0.95 * distinct(own, batch)
    assert distinct(without, kind) > distinct(own, kind)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_the_commands_do_the_same_into_files(batched: Pretrained, suffix: str, tmp_path: Path) -> None:
    adata = in_batches()[0][:30].copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    run, data = str(batched.path), str(tmp_path / "a.h5ad")
    read = ad.read_zarr if suffix == ".zarr" else ad.read_h5ad
    for name, words in (("d", ["denoise", "--as_if", "batch=average"]), ("e", ["embed", "--without", "batch"])):
        assert main([words[0], run, data, "-o", str(tmp_path / f"{name}{suffix}"), *words[1:]]) == 0
    made = denoise(batched, adata, as_if={"batch": "average"}, progress=False)
    np.testing.assert_array_equal(dense(read(tmp_path / f"d{suffix}").X), dense(made.X))
    assert read(tmp_path / f"d{suffix}").uns["sedd"]["as_if"] == {"batch": "average"}
    np.testing.assert_array_equal(
        read(tmp_path / f"e{suffix}").obsm["X_sedd"], embed(batched, adata, without=["batch"], progress=False).obsm["X_sedd"]
    )


def test_labels_in_turn_are_all_or_evenly_spaced_and_a_label_called_average_is_one(batched: Pretrained) -> None:
    def turns(labels: Sequence[str], more: Sequence[str] = (), **as_if: str) -> list[dict[int, int]]:
        categories = {"batch": list(labels), "donor": list(more)}
        model = Pretrained(**{**{name: getattr(batched, name) for name in Pretrained.__dataclass_fields__}, "categories": categories})
        return labels_as_if(model, as_if)

    assert turns("abc", batch="b") == [{0: 2}]
    assert turns("abc", batch="average") == [{0: 1}, {0: 2}, {0: 3}]
    assert turns(["a", "average"], batch="average") == [{0: 2}]
    many = [turn[0] for turn in turns([str(k) for k in range(500)], batch="average")]
    assert len(many) == MAX_LABELS and (many[0], many[-1]) == (1, 500)
    both = turns("abcdefgh", "vwxyz", batch="average", donor="average")
    assert 16 <= len(both) <= MAX_LABELS
    assert turns("ab", "xy", batch="a", donor="average") == [{0: 1, 1: 1}, {0: 1, 1: 2}]


def test_what_is_not_known_is_an_error(batched: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata, out = in_batches()[0][:10].copy(), {"output": tmp_path / "x.h5ad", "progress": False}
    with pytest.raises(UserError, match="the model is not conditioned on 'donor'; its condition columns are: cell_type, batch"):
        denoise(batched, adata, as_if={"donor": "d1"}, **out)
    with pytest.raises(UserError, match="not conditioned on 'donor'"):
        embed(batched, adata, without=["donor"], **out)
    with pytest.raises(UserError, match="batch='b9' was not there in training; known: 'b1'"):
        denoise(batched, adata, as_if={"batch": "b9"}, **out)
    with pytest.raises(UserError, match="--num_samples draws cells under one label"):
        denoise(batched, adata, as_if={"batch": "average"}, num_samples=1, **out)
    assert main(["denoise", str(batched.path), "x.h5ad", "-o", str(tmp_path / "x.h5ad"), "--as_if", "b2"]) == 2
    assert "--as_if 'b2': expected COLUMN=LABEL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
