"""FSDP: what is trained divided is saved whole, and goes on anywhere."""

from __future__ import annotations

import copy
import json
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY_FLAGS
from launching import CONFIGS, environment, launched
from test_trainer import assert_same_weights, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sedd import checkpoint
from sedd.errors import UserError
from sedd.graph import make_graph
from sedd.inference.pretrained import Pretrained
from sedd.likelihood import nelbo
from sedd.model import SEDDTransformer
from sedd.noise import make_noise
from sedd.training import parallel
from sedd.training.ema import EMA
from sedd.training.parallel import divide_like, ends_gathered, make_accelerator, whole

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
    # Of two blocks the one that is run, and half of the other.
    assert all(own["validated"] <= 0.8 * own["blocks"] for own in held)
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


@pytest.fixture
def one_process() -> Iterator[None]:
    """The only process of a group, which still divides weights as one of several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_divided_weights_validate_with_their_averages_without_a_copy_and_come_back(one_process: None) -> None:
    torch.manual_seed(0)
    model = SEDDTransformer(6, 5, hidden_dim=8, num_layers=2, num_heads=2, num_latents=2, dropout=0).eval()
    tokens, graph, noise = torch.arange(24).view(4, 6) % 5, make_graph("absorbing", 5), make_noise("loglinear")
    average, own = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(average.parameters(), own.parameters(), strict=True):
            p.add_(torch.randn_like(p) / 10)
            q.add_(torch.randn_like(q) / 10)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ema = EMA(model, in_place=True)
    for p, q, mean in zip(model.parameters(), own.parameters(), average.parameters(), strict=True):
        p.data.copy_(divide_like(q.detach(), p))
        ema.average[next(name for name, one in model.named_parameters() if one is p)].copy_(divide_like(mean.detach(), p))
    for _ in range(2):  # before anything was trained on too, as of a run that is resumed after an epoch's last step
        with ema.applied(), ends_gathered(model):
            bound = nelbo(model, graph, noise, [tokens]).per_cell
            mean, _ = model.expectation(tokens, torch.ones(4))
            assert all(isinstance(p, DTensor) for block in model.backbone.blocks for p in block.parameters())
        assert bound.tolist() == nelbo(average, graph, noise, [tokens]).per_cell.tolist()
        assert torch.equal(mean, average.expectation(tokens, torch.ones(4))[0])
        bound = nelbo(model, graph, noise, [tokens]).per_cell
        assert bound.tolist() == nelbo(own, graph, noise, [tokens]).per_cell.tolist()
        for p, q in zip(model.parameters(), own.parameters(), strict=True):
            assert torch.equal(whole(p.detach()), q)


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
