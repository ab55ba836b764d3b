"""A signal wherever it comes: the state is saved, the status says so, and the run goes on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import assert_same_weights, train

from sedd import checkpoint, trainer
from sedd.io.conversion import job
from sedd.training import learner


def before(monkeypatch: pytest.MonkeyPatch, of: Any, name: str, call: int, number: signal.Signals) -> None:
    """Send this process a signal when `of.name` is called for the `call`-th time."""
    real, calls = getattr(of, name), []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(of, name, signalled)


@pytest.fixture(scope="module")
def whole(tiny_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final checkpoint of an undisturbed run of three epochs of 14 steps."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert train(tiny_h5ad, directory, "--num_epochs", "3") == 0
    return directory / "final.pt"


def stop_and_go_on(data: Path, directory: Path, status: int, step: int, *flags: str) -> None:
    """Train until the signal comes, which ends the run after `step` steps with `status`; then to the end."""
    assert train(data, directory, "--num_epochs", "3", *flags) == status
    assert [p.name for p in checkpoint.numbered_checkpoints(directory, "step")] == [f"step_{step}.pt"]
    assert not (directory / "final.pt").exists()
    assert train(data, directory, "--num_epochs", "3", "--resume", "auto", *flags) == 0
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 20])  # the first, in the warm-up of five steps, in the second epoch
def test_a_signal_in_a_step_saves_it_and_the_run_goes_on_bit_for_bit(
    step: int, number: signal.Signals, whole: Path, tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, learner, "diffusion_loss", step, number)
    stop_and_go_on(tiny_h5ad, tmp_path / "run", 130 if number == signal.SIGINT else 75, step)
    assert_same_weights(tmp_path / "run" / "final.pt", whole)


def test_a_signal_in_validation_leaves_it_and_no_step_is_done_again(
    whole: Path, tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, trainer.Validator, "_recovery", 2, signal.SIGTERM)  # the validation cells are one batch
    stop_and_go_on(tiny_h5ad, tmp_path / "run", 75, 28)
    assert [entry["epoch"] for entry in checkpoint.load(tmp_path / "run" / "final.pt")["history"]] == [1, 2, 3]
    assert_same_weights(tmp_path / "run" / "final.pt", whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # of torch's own, while it imports its compiler
def test_a_signal_while_the_network_is_compiled_saves_the_first_step(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tiny_h5ad, tmp_path / "whole", "--num_epochs", "3", "--compile") == 0
    torch.compiler.reset()
    from torch._inductor import compile_fx

    before(monkeypatch, compile_fx, "compile_fx", 1, signal.SIGTERM)
    stop_and_go_on(tiny_h5ad, tmp_path / "run", 75, 1, "--compile")
    assert_same_weights(tmp_path / "run" / "final.pt", tmp_path / "whole" / "final.pt")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_the_data_is_prepared_ends_it_at_once(
    number: signal.Signals, status: int, tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copy(tiny_h5ad, tmp_path / "cells.h5ad")
    before(monkeypatch, job.Job, "_convert", 1, number)
    assert train(data, tmp_path / "run", "--num_epochs", "1") == status
    assert "before the first step" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cells.sedd.zarr").exists()
    assert train(data, tmp_path / "run", "--num_epochs", "1") == 0
