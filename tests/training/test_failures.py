"""A loss that is not finite, no memory: nothing bad is saved, and the message says what to do."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import assert_same_weights, train

from sedd import checkpoint, trainer
from sedd.io.convert import ensure_store
from sedd.io.loader import CellLoader
from sedd.training import learner
from sedd.training.failures import head


def test_gradients_that_are_not_finite_are_in_no_checkpoint(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of that step is finite still, and a checkpoint is due right after it."""
    real, calls = learner.diffusion_loss, []

    def poisoned(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, per_cell = real(*args, **kwargs)
        calls.append(1)
        return (loss * float("inf"), per_cell) if len(calls) == 10 else (loss, per_cell)

    for clip in ("1.0", "0"):
        calls.clear()
        run = tmp_path / clip
        monkeypatch.setattr(learner, "diffusion_loss", poisoned)
        flags = ["--checkpoint_every", "5", "--grad_clip", clip]
        assert train(tiny_h5ad, run, *flags) == 1
        assert "the gradient's norm is" in capsys.readouterr().err
        assert [p.name for p in run.glob("*.pt")] == ["step_5.pt"]
        monkeypatch.setattr(learner, "diffusion_loss", real)
        assert train(tiny_h5ad, run, *flags, "--resume", "auto") == 0
        assert train(tiny_h5ad, tmp_path / f"whole{clip}", *flags) == 0
        assert_same_weights(run / "final.pt", tmp_path / f"whole{clip}" / "final.pt")


def no_room_for(monkeypatch: pytest.MonkeyPatch, cells: int, call: int = 1) -> None:
    """Have the loss of so many cells and more need more memory than there is, from its `call`-th time on."""
    real, calls = learner.diffusion_loss, []

    def hungry(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(args[3]) >= cells and len(calls) >= call:
            torch.empty(2**60)
        return real(*args, **kwargs)

    monkeypatch.setattr(learner, "diffusion_loss", hungry)


@pytest.mark.parametrize(
    ("batch", "accumulation", "room", "advice"),
    [
        (16, 1, 15, "--batch_size 8 --gradient_accumulation_steps 2"),
        (16, 1, 4, "--batch_size 2 --gradient_accumulation_steps 8"),
        (15, 2, 15, "--batch_size 5 --gradient_accumulation_steps 6"),
        (13, 1, 7, "--batch_size 1 --gradient_accumulation_steps 13"),
    ],
)
def test_out_of_memory_says_which_batch_fits_and_makes_the_same_steps(
    batch: int, accumulation: int, room: int, advice: str, tiny_h5ad: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    flags = ["--num_epochs", "1", "--dropout", "0", "--checkpoint_every", "2"]
    size = ["--batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
    assert train(tiny_h5ad, tmp_path / "whole", *flags, *size) == 0
    no_room_for(monkeypatch, room, call=5 * accumulation)
    assert train(tiny_h5ad, run, *flags, *size) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"The last whole checkpoint is {run / 'step_4.pt'}." in said
    assert f"--resume auto {advice}: that fits, and makes the same steps." in said
    assert train(tiny_h5ad, run, *flags, *size, "--resume", "auto", *advice.split()) == 0
    mine, whole = (checkpoint.load(path / "final.pt") for path in (run, tmp_path / "whole"))
    assert mine["step"] == whole["step"]
    for name, value in whole["model"].items():
        torch.testing.assert_close(mine["model"][name], value, atol=5e-5, rtol=5e-4)


def test_out_of_memory_for_a_single_cell_says_what_else_to_try(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_room_for(monkeypatch, 1)
    assert train(tiny_h5ad, tmp_path / "run") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No checkpoint was made yet. Not even fewer cells a step fit: use --mixed_precision bf16" in said
    assert "--batch_size 1 " not in said


def test_a_step_that_failed_leaves_its_memory_to_the_trial_of_a_smaller_one(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    real = learner.diffusion_loss

    def hungry(*args: Any, **kwargs: Any) -> Any:
        alive.extend(reference() is not None for reference in held[:1])
        activations = torch.ones(1000)
        held.append(weakref.ref(activations))
        if len(args[3]) == 16:
            torch.empty(2**60)
        return real(*args, **kwargs)

    monkeypatch.setattr(learner, "diffusion_loss", hungry)
    assert train(tiny_h5ad, tmp_path / "run") == 1
    assert alive == [False]


def test_the_head_of_a_batch_has_its_first_cells(tiny_h5ad: Path, tmp_path: Path) -> None:
    with CellLoader(ensure_store(tiny_h5ad, cache_dir=tmp_path), batch_size=8, labels=["donor"]) as loader:
        batch = next(iter(loader))
    first = head(batch, 3)
    assert len(first) == 3
    assert first.masked is not None and batch.masked is not None
    pairs = [(first.tokens, batch.tokens), (first.masked, batch.masked), (first.t, batch.t), (first.library, batch.library)]
    for mine, all_of_them in [*pairs, (first.labels["donor"], batch.labels["donor"]), (first.cell, batch.cell)]:
        assert torch.equal(mine, all_of_them[:3])


def test_validation_needs_no_more_cells_at_once_than_four_times_those_of_a_step(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    real = trainer.Validator._recovery
    monkeypatch.setattr(
        trainer.Validator, "_recovery", lambda self, model, batch: sizes.append(len(batch.tokens)) or real(self, model, batch)
    )
    assert train(tiny_h5ad, tmp_path / "run", "--num_epochs", "1", "--batch_size", "2") == 0
    assert max(sizes) == 8
