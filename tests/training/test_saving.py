"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sedd.training.saving import CheckpointWriter, snapshot


def test_the_writer_reports_a_failed_write_at_the_next_call(tmp_path: Path) -> None:
    writer = CheckpointWriter()
    writer.submit([tmp_path / "missing" / "a.pt"], {"w": torch.ones(2)})
    with pytest.raises(OSError, match="missing"):
        writer.wait()
    writer.submit([tmp_path / "a.pt", tmp_path / "b.pt"], {"w": torch.ones(2)}, drop=[tmp_path / "b.pt"])
    writer.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_snapshot_shares_no_memory() -> None:
    tensor = torch.ones(3)
    copy = snapshot({"a": [tensor, 1], "b": (tensor,)})
    tensor += 1
    assert torch.equal(copy["a"][0], torch.ones(3))
    assert torch.equal(copy["b"][0], torch.ones(3))
