"""kill -9 anywhere, a dead process, a full disk: the last whole checkpoint stays, and the run goes on bit for bit."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import ROOT, TINY_FLAGS, make_counts
from test_trainer import assert_same_weights, train

from sedd import checkpoint
from sedd.io.convert import convert

FLAGS = [*TINY_FLAGS, "--num_epochs", "12", "--checkpoint_every", "3"]
N_KILLS = 20


def execute(plan: list[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What `forked.py` reports, and what the runs said."""
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "tests" / "forked.py"), str(path)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


@pytest.fixture(scope="module")
def layered_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a layer of two files, one of them CSC, that keeps another layer beside it."""
    folder = tmp_path_factory.mktemp("layers")
    for name, layout in (("one", sp.csc_matrix), ("two", sp.csr_matrix)):
        adata = make_counts(120, seed=len(name))
        adata.obs_names = [f"{name}{k}" for k in range(120)]
        adata.layers["spliced"], adata.layers["kept"] = layout(adata.X), layout(adata.X.multiply(3))
        adata.X = layout(adata.X.multiply(2))
        adata.write_h5ad(folder / f"{name}.h5ad")
    convert([folder / "one.h5ad", folder / "two.h5ad"], folder / "both.zarr", layer="spliced", keep_layers=("kept",), progress=False)
    return folder / "both.zarr"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_20_random_steps_a_run_ends_with_the_weights_of_an_undisturbed_one(
    processes: int, layered_store: Path, tmp_path: Path
) -> None:
    def run(directory: str, *flags: str, kill: list[Any] | None = None) -> dict[str, Any]:
        argv = ["train", "--data_path", str(layered_store), "--checkpoint_dir", str(tmp_path / directory), *FLAGS, *flags]
        return {"argv": argv, "processes": processes, "kill": kill}

    rng = np.random.default_rng(processes)
    n_steps = 12 * 14 // processes
    plan = [run("whole")]
    for step in sorted(rng.choice(np.arange(1, n_steps - 6), N_KILLS, replace=False).tolist()):
        # Up to 30 ms later, which can be a few steps, or in the midst of the writing of a checkpoint.
        dying = [[0], [1], [0, 1]][rng.integers(3)] if processes == 2 else [0]
        plan.append(run("killed", "--resume", "auto", kill=[step, float(rng.uniform(0, 0.03)), dying]))
    plan.append(run("killed", "--resume", "auto"))
    results, said = execute(plan, tmp_path)
    assert results[0]["statuses"] == results[-1]["statuses"] == [0] * processes, said[-3000:]
    for one, planned in zip(results[1:-1], plan[1:-1], strict=True):
        for rank, status in enumerate(one["statuses"]):
            assert status == (-9 if rank in planned["kill"][2] else 1), said[-3000:]
        assert one["seconds"] < 20  # the process that is left notices at its next step
        assert one["fell"]  # at work, each of them
    fell = Counter(at for one in results[1:-1] for at in one["fell"])
    print("killed in", dict(fell))
    for work in ("a step", "a checkpoint"):
        assert any(work in at for at in fell)
    assert_same_weights(tmp_path / "whole" / "final.pt", tmp_path / "killed" / "final.pt")
    if processes == 2:
        assert "another process of this run ended during step" in said
        assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [(1, 2), (2, 1), (1, 3)])
def test_on_another_number_of_processes_a_run_goes_on_with_the_same_global_batches_and_losses(
    processes: tuple[int, int], tiny_h5ad: Path, tmp_path: Path
) -> None:
    """Without dropout, whose draws belong to a process; the global batch is 48 cells."""
    first, then = processes
    flags = [*TINY_FLAGS, "--dropout", "0", "--num_epochs", "4", "--checkpoint_every", "7"]

    def run(directory: str, n: int, *more: str, kill: list[Any] | None = None) -> dict[str, Any]:
        folder = tmp_path / f"{directory}-{n}"
        folder.mkdir()
        argv = ["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(tmp_path / directory), *flags]
        size = ["--batch_size", str(48 // n)]
        return {"argv": [*argv, *size, *more], "processes": n, "kill": kill, "record": str(folder)}

    plan = [run("whole", first), run("moved", first, kill=[9, 0.0, list(range(first))]), run("moved", then, "--resume", "auto")]
    results, said = execute(plan, tmp_path)
    assert results[0]["statuses"] == [0] * first and results[2]["statuses"] == [0] * then, said[-3000:]
    whole, moved = (global_steps(tmp_path / name) for name in (f"whole-{first}", f"moved-{then}"))
    # From step 7, in the second of four epochs of five steps; from the end of the first where the kill outran the writer.
    assert min(moved) in (6, 8)
    assert max(moved) == max(whole) == 20
    for step, (cells, loss) in moved.items():
        assert cells == whole[step][0]
        assert loss == pytest.approx(whole[step][1], rel=1e-4)
    mine, theirs = (checkpoint.load(tmp_path / name / "final.pt")["history"] for name in ("moved", "whole"))
    for one, other in zip(mine, theirs, strict=True):
        for name in ("train_loss", "val_nelbo"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def global_steps(folder: Path) -> dict[int, tuple[list[int], float]]:
    """By step the cells of all processes, sorted, and the mean loss over them."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            found.setdefault(json.loads(line)["step"], []).append(json.loads(line))
    return {
        step: (
            sorted(cell for one in parts for cell in one["cells"]),
            sum(one["loss"] * one["n"] for one in parts) / sum(one["n"] for one in parts),
        )
        for step, parts in found.items()
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 20_000])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_what_to_do(
    room: int, tiny_h5ad: Path, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_disk / "run"
    assert train(tiny_h5ad, run, "--num_epochs", "1") == 0
    before = (run / "final.pt").read_bytes()
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(max(free.f_bavail * free.f_frsize - room, 0)))
    capsys.readouterr()
    assert train(tiny_h5ad, run, "--num_epochs", "3", "--checkpoint_every", "4", "--resume", "auto") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no room left" in said and "No space left on device" in said
    assert f"The last whole checkpoint is {run / 'final.pt'}." in said
    assert "--resume auto" in said
    assert (run / "final.pt").read_bytes() == before
    assert not list(run.glob(".*"))
    (small_disk / "filler").unlink()
    assert train(tiny_h5ad, run, "--num_epochs", "3", "--checkpoint_every", "4", "--resume", "auto") == 0
    assert train(tiny_h5ad, tmp_path / "whole", "--num_epochs", "3") == 0
    assert_same_weights(run / "final.pt", tmp_path / "whole" / "final.pt")


def test_a_write_that_stops_half_way_is_reported_as_the_disk_reported_it(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    saved = {"sedd_format": checkpoint.FORMAT, "w": torch.zeros(1000)}
    checkpoint.save(path, saved)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            checkpoint.save(path, {**saved, "w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
