"""FSDP: what is trained divided is saved whole, and goes on anywhere."""

from __future__ import annotations

import json
import subprocess
import types
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY_FLAGS
from launching import CONFIGS, environment, launched
from test_trainer import assert_same_weights, train

from sedd import checkpoint
from sedd.errors import UserError
from sedd.inference.pretrained import Pretrained
from sedd.training import parallel
from sedd.training.parallel import make_accelerator

FLAGS = [*TINY_FLAGS, "--num_latents", "2", "--num_layers", "2", "--num_epochs", "2", "--checkpoint_every", "4"]


def divided(data: Path, directory: Path, *flags: str) -> list[dict[str, int]]:
    """Train on two processes that divide the weights; what each of them held."""
    directory.parent.mkdir(exist_ok=True)
    launcher = ["accelerate", "launch", "--config_file", str(CONFIGS / "fsdp.yaml"), "--num_processes", "2"]
    training = [str(ROOT / "tests" / "divided.py"), str(directory.parent), "--data_path", str(data), *FLAGS]
    words = [*launcher, *training, "--checkpoint_dir", str(directory), *flags]
    variables = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((directory.parent / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_divided_weights_are_saved_whole_and_are_those_of_undivided_ones(tiny_h5ad: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "divided" / "run", tmp_path / "whole"
    held = divided(tiny_h5ad, run)
    assert held[0]["held"] + held[1]["held"] == held[0]["all"] == held[1]["all"]
    assert 0.4 < held[0]["held"] / held[0]["all"] < 0.6
    launched("cpu.yaml", 2, tiny_h5ad, whole, *FLAGS)
    state, other = checkpoint.load(run / "final.pt"), checkpoint.load(whole / "final.pt")
    assert state["step"] == other["step"]
    pairs = [(state["model"], other["model"]), (state["ema"]["average"], other["ema"]["average"])]
    pairs += [(state["optimizer"]["state"][i], other["optimizer"]["state"][i]) for i in other["optimizer"]["state"]]
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, atol=1e-4, rtol=1e-3)
    for entry, same in zip(state["history"], other["history"], strict=True):
        assert entry["val_nelbo"] == pytest.approx(same["val_nelbo"], rel=1e-4)
    assert len(Pretrained.load(run / "final.pt", device="cpu").genes) == 60

    # From the middle of an epoch: divided again bit for bit, and on one process that holds everything.
    again = tmp_path / "again" / "run"
    divided(tiny_h5ad, again, "--resume", str(run / "step_12.pt"))
    assert_same_weights(run / "final.pt", again / "final.pt")
    alone = [*FLAGS[len(TINY_FLAGS) :], "--batch_size", "32", "--resume", str(run / "step_12.pt")]
    assert train(tiny_h5ad, tmp_path / "alone", *alone) == 0
    history = checkpoint.load(tmp_path / "alone" / "final.pt")["history"]
    assert history[-1]["val_nelbo"] == pytest.approx(other["history"][-1]["val_nelbo"], rel=0.02)  # other dropout


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("flags", [["--mixed_precision", "bf16"], ["--compile"]])
def test_divided_weights_train_in_low_precision_and_compiled(flags: list[str], tiny_h5ad: Path, tmp_path: Path) -> None:
    plain, run = tmp_path / "plain" / "run", tmp_path / "divided" / "run"
    held = divided(tiny_h5ad, run, "--dropout", "0", *flags)
    assert held[0]["held"] < held[0]["all"]
    divided(tiny_h5ad, plain, "--dropout", "0")
    found, expected = (checkpoint.load(path / "final.pt")["history"][-1] for path in (run, plain))
    assert found["val_nelbo"] == pytest.approx(expected["val_nelbo"], rel=1e-2)


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="fsdp_version: 2"):
        make_accelerator("no")


def test_apples_gpu_is_left_alone_as_it_knows_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, name, lambda: True)
    AcceleratorState._reset_state(True)
    try:
        assert make_accelerator("no").device == torch.device("cpu")
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("device", "mixed_precision", "precision"), [("cuda", "no", "high"), ("cuda", "bf16", "highest"), ("cpu", "no", "highest")])
def test_products_of_float32_are_in_tf32_on_a_gpu_unless_something_is_narrower(
    device: str, mixed_precision: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "Accelerator", lambda **_: types.SimpleNamespace(device=torch.device(device)))
    before = torch.get_float32_matmul_precision()
    try:
        make_accelerator(mixed_precision)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
