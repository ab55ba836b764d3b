"""What is measured on the validation cells, against `likelihood.nelbo` and a computation in NumPy on the same cells and masks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pytest
import torch
from conftest import make_counts

from sedd.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from sedd.graph import make_graph
from sedd.io.plan import Split
from sedd.likelihood import CellBatch, nelbo
from sedd.model import SEDDTransformer
from sedd.noise import make_noise
from sedd.training.run_data import Panel, prepare_panel
from sedd.training.validation import N_MASKS, Validator

SEED, RATIO = 3, 0.3


def settings(data: Path, **given: Any) -> TrainConfig:
    model = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mask_ratio": RATIO, "condition": ("cell_type",)}
    chosen = {name: given.pop(name) for name in ("graph", "condition_library_size") if name in given}
    return TrainConfig(
        data=DataConfig(data_path=str(data), genes="all", val_fraction=0.3, **{"binning": "identity", "num_bins": 16, **given}),
        model=ModelConfig(**model, **chosen),
        optim=OptimConfig(batch_size=5),  # 72 cells do not divide into its batches
        run=RunConfig(seed=SEED),
    )


def trained(panel: Panel, config: TrainConfig) -> SEDDTransformer:
    """A network whose answers depend on everything it is given."""
    torch.manual_seed(0)
    model = panel.build_model(config.model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


def validate(config: TrainConfig, panel: Panel, model: SEDDTransformer, n_ranks: int) -> dict[str, float]:
    """Measure on so many processes, whose sums are added up."""
    noise, graph = make_noise("loglinear"), make_graph(config.model.graph, panel.binning.n_bins)
    found = []
    for rank in range(n_ranks):
        process: Any = SimpleNamespace(
            device=torch.device("cpu"), process_index=rank, num_processes=n_ranks, autocast=contextlib.nullcontext
        )
        validator = Validator(config, panel, process, noise, graph)
        found.append(validator.run(model, stop=lambda: False))
        last = validator
        validator.close()
    ranks: Any = SimpleNamespace(total=lambda mine: sum(found))
    return last.summary(found[0], ranks)


def test_a_process_without_cells_asks_as_often_as_the_others_and_counts_nobody(tiny_h5ad: Path) -> None:
    """As where weights are divided: each process takes part in what the others ask."""
    config = settings(tiny_h5ad, condition_library_size=True)
    panel = prepare_panel(config, None)
    model, expected = trained(panel, config), None
    process: Any = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1, autocast=contextlib.nullcontext)
    for more in (0, 2):  # batches that another process has left, after the last one of this
        asked: list[int] = []
        said = iter([1] * (5 + more))
        ranks: Any = SimpleNamespace(largest=lambda left, stopped, said=said: [max(left, next(said, 0)), stopped])
        with contextlib.closing(Validator(config, panel, process, make_noise("loglinear"), make_graph("absorbing", panel.binning.n_bins))) as validator:
            hook = model.conditioner.register_forward_hook(lambda *_, asked=asked: asked.append(1))
            sums = validator.run(model, stop=lambda: False, in_step=ranks)
            hook.remove()
        assert len(asked) == (N_MASKS + 2) * (5 + more)
        expected = sums if expected is None else expected
        assert torch.equal(sums, expected)
    stopped = iter([0, 1])
    ranks = SimpleNamespace(largest=lambda left, _: [left, next(stopped)])
    with contextlib.closing(Validator(config, panel, process, make_noise("loglinear"), make_graph("absorbing", panel.binning.n_bins))) as validator:
        assert 0 < validator.run(model, stop=lambda: False, in_step=ranks)[0] < expected[0]
    panel.store.close()


def val_cells(panel: Panel, config: TrainConfig) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The validation cells' numbers, tokens, labels and totals, from the AnnData and not from a loader."""
    adata = make_counts()
    cells = Split(adata.n_obs, 0.3, SEED, "val").cells()
    counts = adata.X.toarray()[cells].astype(np.float64)
    numbers = {name: number for number, name in enumerate(panel.categories["cell_type"], 1)}
    label = torch.tensor([[numbers.get(name, 0)] for name in adata.obs["cell_type"].iloc[cells]])
    tokens = np.minimum(counts, 15) if panel.binning.edges is None else np.digitize(counts, panel.binning.edges)
    return cells, torch.from_numpy(tokens).long(), label, torch.from_numpy(counts.sum(1)).clamp(min=1).log().float()


@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
@pytest.mark.parametrize("n_ranks", [1, 3])
@pytest.mark.parametrize("given", [{}, {"binning": "linear"}, {"condition_library_size": True}, {"graph": "uniform"}])
def test_validation_equals_the_bound_and_plain_numbers_on_the_same_cells_and_masks(
    given: dict[str, Any], n_ranks: int, tiny_h5ad: Path
) -> None:
    config = settings(tiny_h5ad, **given)
    panel = prepare_panel(config, None)
    model = trained(panel, config)
    found = validate(config, panel, model, n_ranks)
    assert model.training

    cells, tokens, label, total = val_cells(panel, config)
    assert len(cells) == panel.val_cells.n_cells
    batch = CellBatch(tokens, label, total if config.model.condition_library_size else None, torch.from_numpy(cells))
    graph, noise = make_graph(config.model.graph, panel.binning.n_bins), make_noise("loglinear")
    nats = nelbo(model, graph, noise, [batch], n_masks=N_MASKS, seed=SEED).per_cell
    assert found["val_nelbo"] == pytest.approx(nats.mean(), rel=1e-5)
    assert found["val_nelbo_se"] == pytest.approx(nats.std(ddof=1) / len(nats) ** 0.5, rel=1e-4)
    assert found["val_nelbo_per_gene"] == pytest.approx(nats.mean() / tokens.shape[1], rel=1e-5)
    if config.model.graph == "uniform":
        assert not {"val_nll", "val_mae", "val_label_nll"} & found.keys()
        return

    hidden = naive.exact_mask(SEED, 0, cells, tokens.shape[1], round(RATIO * tokens.shape[1]))
    sigma = torch.full((len(cells),), -np.log1p(-hidden.mean(1)[0]), dtype=torch.float32)
    shown = tokens.masked_fill(torch.from_numpy(hidden), panel.binning.n_bins)
    with torch.no_grad():
        scores = model.eval()(shown, sigma, condition=label).double().numpy()[hidden][:, :-1]  # totals are not given here
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    truth, values = tokens.numpy()[hidden], np.asarray(panel.binning.values, np.float64)
    assert found["val_nll"] == pytest.approx(-np.log(p[np.arange(len(truth)), truth]).mean(), rel=1e-5)
    assert found["val_mae"] == pytest.approx(np.abs(p @ values - values[truth]).mean(), rel=1e-5)

    laws = model.label_laws(tokens, torch.zeros(len(cells)))[0].double().detach().numpy()
    known = label[:, 0].numpy() != 0
    true = label[known, 0].numpy() - 1
    assert found["val_label_nll"] == pytest.approx(-laws[known, true].mean(), rel=1e-5)
    assert found["val_label_accuracy"] == pytest.approx((laws[known].argmax(1) == true).mean())
