"""Checkpoints: whole or not there, verified when read, and never executed."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sedd import checkpoint
from sedd.errors import SeddWarning, UserError


def state(step: int = 1, epoch: int = 1) -> dict:
    torch.manual_seed(step)
    return {"sedd_format": checkpoint.FORMAT, "model": {"w": torch.randn(50, 50)}, "step": step, "epoch": epoch, "x": [1, None, "a"]}


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    saved = state()
    checkpoint.save(path, saved)
    read = checkpoint.load(path)
    assert torch.equal(read["model"]["w"], saved["model"]["w"])
    assert read["x"] == saved["x"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


def test_a_malicious_checkpoint_does_not_run_its_payload(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    zipped, plain = tmp_path / "zip.pt", tmp_path / "plain.pt"
    torch.save({"sedd_format": 1, "model": Payload(target)}, zipped)
    plain.write_bytes(pickle.dumps({"sedd_format": 1, "model": Payload(target)}))
    for path in (zipped, plain):
        with pytest.raises(UserError):
            checkpoint.load(path)
    assert not target.exists()
    torch.load(zipped, weights_only=False)  # the payload works where it is let
    assert target.exists()


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.file_size == 50 * 50 * 4)
    rng = np.random.default_rng(0)
    inside = info.header_offset + 200 + rng.integers(0, info.file_size - 300, 20)
    for at in inside:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)
    for length in [0, 1, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)


def test_another_file_is_refused_by_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")
    other = tmp_path / "other.pt"
    torch.save({"weights": torch.ones(1)}, other)
    with pytest.raises(UserError, match="not a sedd checkpoint"):
        checkpoint.load(other)


def test_a_failed_write_leaves_the_old_checkpoint_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, state(1))
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, state(2))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_directory_means_its_best_then_final_then_newest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        checkpoint.find(tmp_path / "none")
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)
    for name in ("epoch_10.pt", "epoch_20.pt", "final.pt", "best.pt"):
        checkpoint.save(tmp_path / name, state())
        assert checkpoint.find(tmp_path).name == name
    assert checkpoint.find(tmp_path / "epoch_10.pt").name == "epoch_10.pt"


def test_auto_finds_the_most_advanced_whole_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.find_newest(tmp_path) is None
    for name, step in [("best.pt", 30), ("step_40.pt", 40), ("step_50.pt", 50), ("epoch_10.pt", 20)]:
        checkpoint.save(tmp_path / name, state(step))
    assert checkpoint.find_newest(tmp_path) == tmp_path / "step_50.pt"
    (tmp_path / "step_50.pt").write_bytes(b"cut off")
    with pytest.warns(SeddWarning, match=r"passed over .*step_50.pt"):
        assert checkpoint.find_newest(tmp_path) == tmp_path / "step_40.pt"


def test_a_checkpoint_that_goes_while_they_are_listed_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / f"step_{step}.pt", state(step))
    real = Path.stat

    def gone(self: Path, **kwargs: bool) -> os.stat_result:
        if self.name == "step_2.pt":
            self.unlink(missing_ok=True)
        return real(self, **kwargs)

    monkeypatch.setattr(Path, "stat", gone)
    assert [p.name for p in checkpoint.numbered_checkpoints(tmp_path)] == ["step_1.pt", "step_3.pt"]


def test_a_checkpoint_of_another_version_says_so(tmp_path: Path) -> None:
    torch.save({"sedd_format": checkpoint.FORMAT - 1}, tmp_path / "old.pt")
    with pytest.raises(UserError, match=f"another version of sedd .format {checkpoint.FORMAT - 1}; this one reads {checkpoint.FORMAT}.*Train again"):
        checkpoint.load(tmp_path / "old.pt")
