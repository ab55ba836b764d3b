"""Where the curves of a run go, and when it stops by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
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
    """After every step both files are whole: what history.json has, metrics.jsonl has, and more."""
    monkeypatch.setattr("sedd.training.logs._EVERY_S", 0.0)
    real, seen = trainer.SEDDTrainer._save_if_due, []

    def look(self: trainer.SEDDTrainer) -> None:
        folder = self.directory.path
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        path = folder / "history.json"
        seen.append((self.step, lines, json.loads(path.read_text()) if path.exists() else []))
        real(self)

    monkeypatch.setattr(trainer.SEDDTrainer, "_save_if_due", look)
    assert train(tiny_h5ad, tmp_path / "run") == 0
    assert [step for step, _, _ in seen] == list(range(1, 29))
    for step, lines, history in seen:
        steps = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, step + 1))
        assert {"time", "learning_rate", "cells_per_s", "wait_share"} < steps[-1].keys()
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
