"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sedd import checkpoint
from sedd.config import RunConfig
from sedd.training import saving
from sedd.training.saving import CheckpointWriter, Saver, snapshot


def test_the_writer_reports_a_failed_write_at_the_next_call(tmp_path: Path) -> None:
    writer = CheckpointWriter()
    writer.submit([tmp_path / "missing" / "a.pt"], {"w": torch.ones(2)})
    with pytest.raises(OSError, match="missing"):
        writer.wait()
    writer.submit([tmp_path / "a.pt", tmp_path / "b.pt"], {"w": torch.ones(2)}, drop=lambda: [tmp_path / "b.pt"])
    writer.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[str, int]], threading.Event]:
    """What was written, and what lets a disk write that takes its time."""
    written: list[tuple[str, int]] = []
    free = threading.Event()

    def save(path: Path, state: dict[str, int]) -> None:
        assert free.wait(30)
        written.append((path.name, state["n"]))

    monkeypatch.setattr(checkpoint, "save", save)
    return written, free


def saver(directory: Path, **given: Any) -> Saver:
    ranks: Any = SimpleNamespace(first=True)
    return Saver(RunConfig(checkpoint_dir=str(directory), **given), ranks, divided=False, state=lambda: {"n": next(numbers)}, step=0)


numbers = itertools.count()


def test_no_epoch_waits_for_a_slow_disk_and_the_newest_of_best_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, free = slow_disk(monkeypatch)
    one = saver(tmp_path)
    first = next(numbers) + 1
    one.save("best.pt")
    while one._writer._job.waits:  # for its thread
        time.sleep(0.001)
    for _ in range(3):  # would wait for ever
        one.save("best.pt")
    one.save("best.pt", "epoch_10.pt")
    free.set()
    one.wait()
    assert written == [("best.pt", first), ("best.pt", first + 4), ("epoch_10.pt", first + 4)]


def test_a_checkpoint_of_every_so_many_minutes_is_not_due_while_a_slow_disk_writes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, free = slow_disk(monkeypatch)
    one = saver(tmp_path, checkpoint_every="0.00001min")
    one.save("best.pt")
    time.sleep(0.002)
    assert not one.due(1)
    free.set()
    one.wait()
    assert one.due(1)
    one.save_step(1)
    one.wait()
    assert [name for name, _ in written] == ["best.pt", "step_1.pt"]


def test_checkpoints_of_every_so_many_steps_are_all_written_and_the_error_of_one_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, free = slow_disk(monkeypatch)
    one = saver(tmp_path, checkpoint_every="1")
    one.save_step(1)
    one.save_step(2)
    assert one.due(3)
    threading.Timer(0.1, free.set).start()
    monkeypatch.setattr(saving, "_NOTED", 0.05)
    with pytest.warns(UserWarning, match="waited 0 s at step 3 for earlier checkpoints.*every 1 steps"):
        one.save_step(3)  # waits: one is written and one has its turn before it
    one.wait()
    assert [name for name, _ in written] == ["step_1.pt", "step_2.pt", "step_3.pt"]
    free.clear()

    def fail(path: Path, state: object) -> None:
        assert free.wait(30)
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save", fail)
    one.save("best.pt")
    one.save_step(4)
    free.set()
    with pytest.raises(OSError, match="disk full"):
        one.wait()
    one.wait()


def test_a_snapshot_shares_no_memory() -> None:
    tensor = torch.ones(3)
    copy = snapshot({"a": [tensor, 1], "b": (tensor,)})
    tensor += 1
    assert torch.equal(copy["a"][0], torch.ones(3))
    assert torch.equal(copy["b"][0], torch.ones(3))
