"""Where the curves of a run go, and when it stops by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY_FLAGS
from test_trainer import train

from sedd import trainer

RECORDER = """
import json, os
class Run:
    def __init__(self, **settings):
        self.path = os.path.join(settings["dir"], "calls.jsonl")
        self.log(settings)
    def log(self, values, step=None):
        with open(self.path, "a") as file:
            file.write(json.dumps([step, values]) + "\\n")
    def finish(self):
        self.log("finished")
def init(**settings):
    return Run(**settings)
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of that name which notes how it is called."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    sys.modules.pop("wandb", None)  # else it passes for installed in the tests that follow


def interrupted_and_resumed(data: Path, run: Path, *flags: str) -> None:
    """Train for 28 steps, all in the curves; then resume from step 20 as if it had been killed, and train to step 42."""
    assert train(data, run, "--checkpoint_every", "10", *flags) == 0
    for name in ("final.pt", "best.pt"):
        (run / name).unlink()
    assert train(data, run, "--checkpoint_every", "10", "--num_epochs", "3", *flags, "--resume", "auto") == 0


@pytest.fixture
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sedd.training.logs._EVERY_S", 0.0)


@pytest.mark.usefixtures("_every_step")
def test_after_a_resume_from_an_earlier_step_tensorboard_has_one_value_for_each(tiny_h5ad: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curve(name: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "run" / "logs"), size_guidance={"scalars": 0})
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    interrupted_and_resumed(tiny_h5ad, tmp_path / "run", "--log_with", "tensorboard")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name, steps in (("loss", list(range(1, 43))), ("val_nelbo", [14, 28, 42])):
        assert [step for step, _ in curve(name)] == steps
        expected = [line[name] for line in lines if name in line]
        assert [value for _, value in curve(name)] == pytest.approx(expected)
    assert train(tiny_h5ad, tmp_path / "run", "--log_with", "tensorboard", "--overwrite", "--num_epochs", "1") == 0
    assert [step for step, _ in curve("loss")] == list(range(1, 15))


@pytest.mark.usefixtures("wandb", "_every_step")
def test_a_resumed_run_stays_one_run_of_wandb_and_one_made_anew_is_another(tiny_h5ad: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted_and_resumed(tiny_h5ad, run, "--log_with", "wandb")
    assert train(tiny_h5ad, run, "--log_with", "wandb", "--overwrite", "--num_epochs", "1") == 0
    assert train(tiny_h5ad, tmp_path / "fork", "--log_with", "wandb", "--resume", str(run / "final.pt")) == 0
    calls = [json.loads(line)[1] for path in (run, tmp_path / "fork") for line in (path / "calls.jsonl").read_text().splitlines()]
    starts = [call for call in calls if "mode" in call]
    assert [call["resume"] for call in starts] == ["allow"] * 4
    first, resumed, anew, fork = (call["id"] for call in starts)
    assert first == resumed
    assert len({first, anew, fork}) == 3
    assert (run / "wandb_id").read_text() == anew


@pytest.mark.usefixtures("_every_step")
def test_the_real_wandb_writes_both_parts_of_a_resumed_run_under_one_id(tiny_h5ad: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    flags = [f"--data_path={tiny_h5ad}", f"--checkpoint_dir={run}", *TINY_FLAGS, "--log_with", "wandb"]
    for epochs, more in (("1", []), ("2", ["--resume", "auto"])):  # as users do, in a process of its own each
        words = [sys.executable, "-m", "sedd", "train", *flags, "--num_epochs", epochs, *more]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "WANDB_MODE": "offline"})
        assert done.returncode == 0, done.stderr[-3000:]
    written = sorted((run / "wandb").glob("offline-run-*"))
    assert len(written) == 2
    identity = (run / "wandb_id").read_text()
    for folder in written:
        assert folder.name.endswith(f"-{identity}")
        assert (folder / f"run-{identity}.wandb").stat().st_size > 0


@pytest.mark.usefixtures("wandb")
@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb_gets_the_settings_and_the_curves_and_is_offline_unless_asked(
    mode: str | None, tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    assert train(tiny_h5ad, tmp_path / "run", "--log_with", "wandb") == 0
    (_, first), *calls, (_, last) = [json.loads(line) for line in (tmp_path / "run" / "calls.jsonl").read_text().splitlines()]
    assert first["mode"] == (mode or "offline")
    assert first["config"]["hidden_dim"] == 16
    assert last == "finished"
    epochs = [(step, values) for step, values in calls if "val_nelbo" in values]
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [(step, values["val_nelbo"]) for step, values in epochs] == [(e["step"], e["val_nelbo"]) for e in history]
    assert [step for step, _ in calls] == sorted(step for step, _ in calls)


def test_the_curves_can_be_read_while_the_run_is_at_work(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every step both files are whole, of all steps before it: what history.json has, metrics.jsonl has, and more."""
    monkeypatch.setattr("sedd.training.logs._EVERY_S", 0.0)
    real, seen = trainer.SEDDTrainer._save_or_stop, []

    def look(self: trainer.SEDDTrainer) -> None:
        folder = self.directory.path
        curves, path = folder / "metrics.jsonl", folder / "history.json"
        lines = [json.loads(line) for line in curves.read_text().splitlines()] if self.step > 1 else []
        seen.append((self.step, lines, json.loads(path.read_text()) if path.exists() else []))
        real(self)

    monkeypatch.setattr(trainer.SEDDTrainer, "_save_or_stop", look)
    assert train(tiny_h5ad, tmp_path / "run") == 0
    assert [step for step, _, _ in seen] == list(range(1, 29))
    for step, lines, history in seen:
        steps = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, step))
        assert all({"time", "learning_rate", "cells_per_s", "wait_share"} < line.keys() for line in steps)
        assert len(history) == (step - 1) // 14
        assert [line["val_nelbo"] for line in lines if "val_nelbo" in line] == [entry["val_nelbo"] for entry in history]


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_early_stopping_waits_for_so_many_epochs_without_a_better_bound(
    patience: int, tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = iter([9.0, 7.0, 8.0, 6.0, 6.5, 6.0, 6.1, 5.0, 5.5, 5.6])
    real = trainer.Validator.summary

    def scripted(self: Any, *args: Any) -> dict[str, float]:
        return {**real(self, *args), "val_nelbo": next(bounds)}

    monkeypatch.setattr(trainer.Validator, "summary", scripted)
    flags = ["--num_epochs", "10", *(["--early_stopping", str(patience)] if patience else [])]
    assert train(tiny_h5ad, tmp_path / "run", *flags) == 0
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == {0: 10, 1: 3, 3: 7}[patience]


def test_a_run_stopped_early_and_continued_stops_at_once(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--num_epochs", "30", "--early_stopping", "1", "--learning_rate", "0.3"]
    assert train(tiny_h5ad, tmp_path / "run", *flags) == 0
    before = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(before) < 30
    assert train(tiny_h5ad, tmp_path / "run", *flags, "--resume", "auto") == 0
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == before
