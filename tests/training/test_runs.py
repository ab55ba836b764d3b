"""`sedd runs` shows runs side by side, whatever state they are in."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from sedd.cli import main
from sedd.inference.pretrained import Pretrained


def cells(text: str, run: str) -> list[str]:
    """The columns of a run's line."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{run} ")]
    return [word.strip() for word in line.split("  ") if word]


def test_runs_are_listed_with_state_progress_and_settings(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run, tmp_path / "done")
    history = json.loads((tiny_run / "history.json").read_text())
    for name, seconds in (("at-work", 5), ("group/stopped", 3600)):
        folder = shutil.copytree(tiny_run, tmp_path / name)
        (folder / "history.json").write_text(json.dumps(history[:1]))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 21, "loss": 1.0, "cells_per_s": 77.2}\n{"step": 2')  # cut off in the writing
        os.utime(folder / "final.pt", (0, 0))
        os.utime(folder / "metrics.jsonl", (time.time() - seconds,) * 2)
    for name in ("first-epoch", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "first-epoch" / "args.json").write_text((tiny_run / "args.json").read_text())
    (tmp_path / "damaged" / "args.json").write_text("{")
    assert main(["runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 6
    best = min(history, key=lambda entry: entry["val_nelbo"])
    settings = ["small", "latent", "60", "16", "0.002", "0"]
    done = cells(said, "done")
    assert done[1:7] == ["done", "2/2", "28", f"{best['val_nelbo']:.1f}", "cell_type, total", str(best["epoch"])]
    assert done[8:] == settings
    bound = f"{history[0]['val_nelbo']:.1f}"
    assert cells(said, "at-work") == ["at-work", "at work", "1/2", "21", bound, "cell_type, total", "1", "77", *settings]
    assert cells(said, "group/stopped")[1:3] == ["stopped", "1/2"]
    assert cells(said, "first-epoch")[1:4] == ["at work", "0/2", "-"]
    assert cells(said, "first-epoch")[9:11] == ["latent", "all"]
    assert cells(said, "damaged")[2] == "0/?"


def test_a_run_itself_can_be_named(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tiny_run)]) == 0
    assert ". " in capsys.readouterr().out


def test_a_directory_without_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_bound_that_is_given_labels_or_totals_is_never_shown_as_one_that_is_given_nothing(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((tiny_run / "args.json").read_text())
    wanted = {"nothing": ([], False), "total": ([], True), "donor": (["donor"], False), "cell_type, total": (["cell_type"], True)}
    for given, (columns, total) in wanted.items():
        run = shutil.copytree(tiny_run, tmp_path / "runs" / given)
        (run / "args.json").write_text(json.dumps({**settings, "condition": columns, "condition_library_size": total}))
    assert main(["runs", str(tmp_path / "runs")]) == 0
    table = capsys.readouterr().out
    assert {given: cells(table, given)[5] for given in wanted} == {given: given for given in wanted}
    assert main(["info", str(tiny_run)]) == 0
    assert "nats per cell, given cell_type, total, after epoch 2" in capsys.readouterr().out
    Pretrained.load(tiny_run).save_pretrained(tmp_path / "exported")
    assert "the bound is given cell\\_type, total:" in (tmp_path / "exported" / "README.md").read_text()
