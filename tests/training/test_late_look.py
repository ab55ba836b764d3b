"""A step is looked at one step late, so that a GPU runs ahead; nothing is saved before it was looked at."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from test_trainer import train

from sedd.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from sedd.io.loader import CellLoader
from sedd.training import learner
from sedd.training.learner import Learner
from sedd.training.parallel import make_accelerator
from sedd.training.run_data import prepare_panel


@pytest.fixture
def small(tiny_h5ad: Path) -> tuple[Learner, list[Any], Any]:
    """A network that learns, some batches, and its accelerator."""
    config = TrainConfig(
        data=DataConfig(data_path=str(tiny_h5ad), genes="all"),
        model=ModelConfig(hidden_dim=16, num_layers=1, num_heads=2, num_latents=1),
        # Without decay, as a CPU's clipping makes gradients 0 whose norm is infinite, where a GPU's scaler leaves the step out.
        optim=OptimConfig(batch_size=8, ema_decay=0.9, weight_decay=0.0),
        run=RunConfig(log_with="none", num_threads=1),
    )
    accelerator = make_accelerator("no")
    panel = prepare_panel(config, None)
    one = Learner(config, panel, accelerator)
    with CellLoader(
        panel.store, batch_size=8, split=panel.train_cells, genes=panel.genes, binning=panel.binning, mask=config.model.objective,
        noise=one.noise.mask_probability,
    ) as loader:  # fmt: skip
        return one, list(loader)[:4], accelerator


def test_a_step_looks_at_no_number_before_it_is_read(small: tuple[Learner, list[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one, batches, _ = small
    one.step(batches[:1], step=0, epoch=0).read()  # makes the moments
    for name in ("tolist", "item", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)

        def refuse(tensor: torch.Tensor, *given: Any, _real: Any = real, _name: str = name) -> Any:
            assert not tensor.is_floating_point(), f"{_name} of a number of the step"
            return _real(tensor, *given)

        monkeypatch.setattr(torch.Tensor, name, refuse)
    outcome = one.step(batches[1:3], step=1, epoch=0)
    monkeypatch.undo()
    loss, n_cells = outcome.read()
    assert loss > 0 and n_cells == 16


def test_batches_are_held_until_their_step_is_read(small: tuple[Learner, list[Any], Any]) -> None:
    """Page-locked memory that nobody holds is filled again, and may still be on its way to the GPU."""
    one, batches, _ = small
    group = batches[:3]
    held = [weakref.ref(batch.tokens) for batch in group]
    outcome = one.step(group, step=0, epoch=0)
    one.step(batches[3:4], step=1, epoch=0)
    del group
    batches.clear()
    assert all(tokens() is not None for tokens in held)
    outcome.read()
    assert all(tokens() is None for tokens in held)


def test_a_loss_that_is_not_finite_is_noticed_at_the_next_step(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = learner.diffusion_loss, []

    def poisoned(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, per_cell = real(*args, **kwargs)
        calls.append(1)
        return (loss, per_cell * float("nan")) if len(calls) == 3 else (loss, per_cell)

    monkeypatch.setattr(learner, "diffusion_loss", poisoned)
    assert train(tiny_h5ad, tmp_path / "run") == 1
    assert re.search("the loss is nan at step 2 of epoch 1", capsys.readouterr().err)
    assert len(calls) == 4
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_step_whose_gradients_overflow_in_fp16_is_not_counted(small: tuple[Learner, list[Any], Any]) -> None:
    one, batches, accelerator = small
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    accelerator.scaler = scaler
    one._optimizer = AcceleratedOptimizer(one._optimizer.optimizer, device_placement=False, scaler=scaler)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    average = {name: value.clone() for name, value in one.ema.average.items()}
    rate, updates = one.learning_rate, one.ema.updates
    one.step(batches[:1], step=0, epoch=0)
    assert one.learning_rate == rate
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in one.ema.average.items())
    assert one.ema.updates == updates
    scaler.update(2.0**8)
    one.step(batches[1:2], step=1, epoch=0)
    assert one.learning_rate != rate
    assert any(not torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
