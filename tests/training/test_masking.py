"""What a training step hides, on either side of the copy to the device."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import TINY_FLAGS

from sedd import checkpoint
from sedd.cli import main
from sedd.io import convert
from sedd.io.loader import CellLoader
from sedd.io.loading.batch import Batch
from sedd.io.store import CellStore
from sedd.kernels.mask import thresholds
from sedd.noise import make_noise
from sedd.training.masking import DeviceMasks, drop_conditions, hide_labels


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
@pytest.mark.parametrize("objective", ["score_entropy", "masked"])
def test_masks_drawn_beside_the_network_are_those_of_the_loader(
    tiny_h5ad: Path, tmp_path: Path, objective: str, noise: str
) -> None:
    store = convert(tiny_h5ad, tmp_path / "tiny.zarr", progress=False)
    schedule = make_noise(noise)
    given = {"batch_size": 32, "noise": schedule.mask_probability, "mask_ratio": 0.15, "seed": 5}
    masks = DeviceMasks(objective, 0.15, schedule, seed=5)
    hidden = 0
    with CellLoader(store, mask=objective, **given) as loader, CellLoader(store, mask=None, **given) as bare:
        for epoch in (0, 3):
            loader.set_epoch(epoch)
            bare.set_epoch(epoch)
            for drawn, batch in zip(loader, bare, strict=True):
                assert batch.masked is None
                assert torch.equal(masks.of(batch, epoch, batch.cell), drawn.masked)
                hidden += int(drawn.masked.sum())
    assert hidden > 1000


@pytest.fixture(scope="module")
def large_store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    """100,000 cells of 200 genes."""
    folder = tmp_path_factory.mktemp("large")
    adata = ad.AnnData(sp.random(100_000, 200, 0.05, format="csr", dtype=np.float32, random_state=np.random.default_rng(0)))
    adata.X.data = np.ceil(3 * adata.X.data)
    adata.write_h5ad(folder / "large.h5ad")
    return convert(folder / "large.h5ad", folder / "large.zarr", progress=False)


@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
@pytest.mark.parametrize(("objective", "noise"), [("score_entropy", "loglinear"), ("score_entropy", "geometric"), ("masked", "loglinear")])
def test_of_100_000_cells_both_sides_hide_the_same_genes(objective: str, noise: str, large_store: CellStore) -> None:
    schedule = make_noise(noise)
    given = {"batch_size": 10_000, "noise": schedule.mask_probability, "mask_ratio": 0.15, "seed": 0, "split": "all"}
    masks = DeviceMasks(objective, 0.15, schedule, seed=0)
    n_cells = 0
    with CellLoader(large_store, mask=objective, **given) as loader:
        for batch in loader:
            drawn = masks.of(batch, 0, batch.cell)
            assert torch.equal(drawn, batch.masked), f"{int((drawn != batch.masked).sum())} entries differ"
            n_cells += len(batch)
    assert n_cells == 100_000


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_thresholds_are_those_of_the_times_in_float64(noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr("sedd.training.masking.random_mask_torch", lambda *given: asked.append(given[-1]))
    t = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.zeros(10_000, 3, dtype=torch.uint8), None, t, torch.arange(10_000), {}, torch.zeros(10_000))
    DeviceMasks("score_entropy", 0.15, make_noise(noise), seed=0).of(batch, 0, batch.cell)
    exact = t.numpy().astype(np.float64)
    probability = (1 - 1e-3) * exact if noise == "loglinear" else -np.expm1(-1e-3 * (20.0 / 1e-3) ** exact)
    difference = thresholds(asked[0].numpy()).astype(np.int64) - thresholds(probability).astype(np.int64)
    assert np.abs(difference).max() <= 1  # of 2**32: the last bit of a float64 rounds now and then the other way


def test_a_run_is_the_same_whichever_side_draws_its_masks(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, drawn = {}, {"loader": 0, "device": 0}
    draw = DeviceMasks.of

    def counting(self: DeviceMasks, *given: Any) -> torch.Tensor:
        drawn[side] += 1
        return draw(self, *given)

    monkeypatch.setattr(DeviceMasks, "of", counting)
    for side in ("loader", "device"):
        flags = ["--masks_on", side, "--checkpoint_dir", str(tmp_path / side)]
        assert main(["train", "--data_path", str(tiny_h5ad), *TINY_FLAGS, *flags]) == 0
        weights[side] = checkpoint.load(tmp_path / side / "final.pt")["model"]
    steps = checkpoint.load(tmp_path / "device" / "final.pt")["step"]
    assert drawn == {"loader": 0, "device": steps}
    for name, value in weights["loader"].items():
        assert torch.equal(value, weights["device"][name]), name


def test_conditions_are_hidden_together_and_apart() -> None:
    torch.manual_seed(0)
    labels, total = drop_conditions(torch.ones((40_000, 2), dtype=torch.int64), torch.ones(40_000), 0.5)
    assert labels is not None
    assert total is not None
    told = np.stack([labels[:, 0].numpy() == 1, ~total.isnan().numpy()])
    assert (labels[:, 0] == labels[:, 1]).all()
    both = np.array([[(~told[0] & ~told[1]).mean(), (~told[0] & told[1]).mean()],
                     [(told[0] & ~told[1]).mean(), (told[0] & told[1]).mean()]])  # fmt: skip
    np.testing.assert_allclose(both, [[0.625, 0.125], [0.125, 0.125]], atol=0.01)


@pytest.mark.parametrize("known", ["labels", "total"])
def test_a_single_condition_is_hidden_to_its_share(known: str) -> None:
    torch.manual_seed(0)
    labels, total = drop_conditions(
        torch.ones((40_000, 1), dtype=torch.int64) if known == "labels" else None,
        torch.ones(40_000) if known == "total" else None,
        0.3,
    )
    hidden = (labels == 0).double() if labels is not None else total.isnan().double()
    assert (labels is None) == (known == "total")
    assert float(hidden.mean()) == pytest.approx(0.3, abs=0.01)
    assert drop_conditions(None, None, 0.3) == (None, None)


@pytest.mark.parametrize("probability", [0.02, 0.5, 1.0])
def test_labels_are_asked_for_in_half_of_the_cells_as_much_as_if_each_was_hidden_as_genes_are(probability: float) -> None:
    torch.manual_seed(0)
    condition = torch.tensor([1, 2, 0]).repeat(400_000, 1)
    shown, weight = hide_labels(condition, torch.full((400_000,), probability, dtype=torch.float64))
    hidden = (shown == 0) & (condition != 0)
    assert torch.equal(shown[~hidden], condition[~hidden])
    assert not hidden[:, 2].any()
    assert (weight[~hidden] == 1).all()
    first, second = hidden.T[:2].double()
    assert float(hidden.any(1).double().mean()) == pytest.approx(0.5, abs=0.005)  # of each of these cells something is learned
    # Each label by itself, in the same half of the cells, and weighed by one over the probability: so weigh the cells that hide both, or one.
    np.testing.assert_allclose((first * second * weight[:, 0]).mean(), probability / 2, rtol=0.05)
    for mine, other, column in ((first, second, 0), (second, first, 1)):
        np.testing.assert_allclose((mine * (1 - other) * weight[:, column]).mean(), (1 - probability) / 2, rtol=0.05, atol=1e-5)
    assert float(weight.min()) >= 1 and float(weight.max()) <= 2


def test_a_lone_label_is_always_asked_for_with_the_weight_of_one() -> None:
    torch.manual_seed(0)
    condition = torch.tensor([[2, 0], [0, 3], [0, 0]]).repeat(20_000, 1)
    shown, weight = hide_labels(condition, torch.linspace(1e-3, 1, 60_000, dtype=torch.float64))
    hidden = (shown == 0) & (condition != 0)
    np.testing.assert_allclose(hidden.any(1).view(-1, 3).double().mean(0), [0.5, 0.5, 0], atol=0.02)
    torch.testing.assert_close(weight, torch.ones_like(weight))
