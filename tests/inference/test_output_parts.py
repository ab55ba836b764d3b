"""An interrupted task is resumed, several processes share one: the result is that of a single undisturbed run."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from conftest import ROOT, make_counts
from launching import CONFIGS, environment, wait_until

from sedd import tasks
from sedd.cli import main
from sedd.errors import UserError
from sedd.inference import output_parts
from sedd.inference.output_parts import PartsInFolder, made_from
from sedd.inference.pretrained import Pretrained
from sedd.processes import Processes
from sedd.tasks import denoise, embed, generate, impute


def write(adata: ad.AnnData, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anndata, about the version of the format
        adata.write_zarr(path) if path.suffix == ".zarr" else adata.write_h5ad(path)


def same(first: Path, second: Path) -> None:
    """Two results, matrix by matrix, bit for bit."""
    a, b = (ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path) for path in (first, second))
    assert a.obs.equals(b.obs)
    assert a.var.equals(b.var)
    matrices = [(a.X, b.X), *((a.layers[name], b.layers[name]) for name in a.layers)]
    matrices += [(a.obsm[name], b.obsm[name]) for name in a.obsm]
    assert set(a.layers) == set(b.layers) and set(a.obsm) == set(b.obsm)
    for one, other in matrices:
        assert np.array_equal(*(x.toarray() if sp.issparse(x) else np.asarray(x) for x in (one, other)))


TASKS: dict[str, Callable[..., ad.AnnData]] = {
    "impute": lambda model, data, **rest: impute(model, data, hide=0.2, num_samples=2, num_steps=2, **rest),
    "denoise": lambda model, data, **rest: denoise(model, data, rounds=1, folds=2, **rest),
    "generate": lambda model, data, **rest: generate(model, 90, num_steps=2, **rest),
    "embed": embed,
}


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_task_is_resumed_to_the_result_of_an_undisturbed_run(
    task: str, suffix: str, model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, whole, stopped = (tmp_path / f"{name}{suffix}" for name in ("data", "whole", "stopped"))
    adata = make_counts(90)
    adata.obsm["X_pca"] = np.random.default_rng(0).normal(size=(90, 3))
    write(adata, data)
    settings: dict[str, Any] = {"batch_size": 8, "progress": False}
    TASKS[task](model, data, output=whole, **settings)
    save, saved = output_parts.save_arrays, []

    def save_three(path: str, **arrays: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(path, **arrays)
        saved.append(path)

    monkeypatch.setattr(output_parts, "save_arrays", save_three)
    with pytest.raises(KeyboardInterrupt, match="pass --resume to complete it, or delete .*stopped"):
        TASKS[task](model, data, output=stopped, **settings)
    assert not stopped.exists()
    kept = {path: os.stat(path).st_mtime_ns for path in saved}
    again: list[str] = []

    def save_and_note(path: str, **arrays: Any) -> None:
        save(path, **arrays)
        again.append(path)

    monkeypatch.setattr(output_parts, "save_arrays", save_and_note)
    if task != "embed":
        with pytest.raises(UserError, match="made with other --seed. Repeat"):
            TASKS[task](model, data, output=stopped, resume=True, seed=1, **settings)
    assert kept == {path: os.stat(path).st_mtime_ns for path in saved}
    TASKS[task](model, data, output=stopped, resume=True, **settings)
    assert len(again) == 12 - 3 and not set(again) & set(saved)  # of 90 cells in parts of 8
    same(whole, stopped)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}{suffix}" for n in ("data", "stopped", "whole")]


def test_embedding_keeps_all_that_the_file_holds_without_reading_it(
    model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = make_counts(50)
    adata.layers["twice"] = adata.X * 2
    adata.obsm["X_pca"] = np.ones((50, 3))
    adata.uns["mine"] = {"kept": 1}
    for suffix in (".h5ad", ".zarr"):
        path = tmp_path / f"in{suffix}"
        write(adata, path)
    for suffix in (".h5ad", ".zarr"):
        for data_suffix in (".h5ad", ".zarr"):
            output = tmp_path / f"out{suffix}"
            with monkeypatch.context() as patch:
                if suffix == data_suffix:
                    patch.setattr("sedd.inference.output_file.read_anndata", None)  # copied, not read
                embed(model, tmp_path / f"in{data_suffix}", output=output, progress=False)
            found = ad.read_zarr(output) if suffix == ".zarr" else ad.read_h5ad(output)
            assert np.array_equal(found.obsm["X_sedd"], embed(model, adata, progress=False).obsm["X_sedd"])
            assert np.array_equal(found.layers["twice"].toarray(), adata.layers["twice"].toarray())
            assert found.uns["mine"]["kept"] == 1 and found.uns["sedd"]["task"] == "embed"
            assert found.obs.equals(adata.obs) and (found.obsm["X_pca"] == 1).all()


def test_the_command_asks_before_it_drops_an_unfinished_output(
    tiny_run: Path, tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "denoise",
        str(tiny_run),
        str(tiny_h5ad),
        "-o",
        str(tmp_path / "out.h5ad"),
        "--rounds",
        "1",
        "--batch_size",
        "16",
    ]
    real, calls = output_parts.save_arrays, []

    def full_disk(path: str, **arrays: Any) -> None:
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(path, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(output_parts, "save_arrays", full_disk)
        assert main(command) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "make room and pass --resume to complete it" in said
    assert main(command) == 2
    assert "pass --resume to complete it or --overwrite to start again" in capsys.readouterr().err
    other = tmp_path / "other.h5ad"
    make_counts(240, seed=3).write_h5ad(other)
    assert main([*command[:2], str(other), *command[3:], "--resume"]) == 2
    assert "made with other data" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir() if path != other] == ["out.h5ad"]
    assert main([*command, "--resume"]) == 2  # it is complete
    with pytest.raises(UserError, match="give a path"):
        denoise(tiny_run, make_counts(), output=tmp_path / "again.h5ad", resume=True, progress=False)
    with pytest.raises(UserError, match="give its name as output"):
        denoise(tiny_run, tiny_h5ad, resume=True, progress=False)


@pytest.mark.parametrize("task", TASKS)
def test_every_setting_of_a_task_is_compared_before_it_is_resumed(
    task: str, model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def stop(task: str, model: Pretrained, arguments: dict[str, Any], n_obs: int) -> None:
        seen.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "open_parts", stop)
    output = tmp_path / "out.h5ad"
    with pytest.raises(KeyboardInterrupt):
        TASKS[task](model, make_counts(20), output=output)
    (arguments,) = seen
    before = made_from(task, model, arguments)
    for name in inspect.signature(getattr(tasks, task)).parameters.keys() - {"model", "data"}:
        after = made_from(task, model, arguments | {name: "another value"})
        changed = [key for key in before if before[key] != after[key]]
        assert changed == ([] if name in ("output", "resume", "progress") else [f"--{name}"])


def test_two_writers_of_an_output_are_an_error(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n_obs": 10, "n_vars": 2, "batch_size": 4, "resume": False}
    first, second = (PartsInFolder(tmp_path / "out.h5ad", {"task": "a"}, **settings) for _ in range(2))
    with first, pytest.raises(UserError, match="another process"):
        second.__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_obs", [1, 7, 64, 2700, 200_000])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_processes_share_whole_batches_and_each_cell_is_made_once(n_obs: int, count: int, tmp_path: Path) -> None:
    spans: list[tuple[int, int]] = []
    for index in range(count):
        one = PartsInFolder(tmp_path / "o.zarr", {}, n_obs=n_obs, n_vars=2000, batch_size=64, resume=False)
        one._processes = Processes(index, count)
        spans += [one._all[i] for i in one._processes.share(len(one._all))]
    assert spans[0][0] == 0 and spans[-1][1] == n_obs
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert all(lo % 64 == 0 and (hi - lo) * 2000 <= 1 << 22 for lo, hi in spans)


def command(task: str, run: Path, data: Path, output: Path) -> list[str]:
    given = (
        ["generate", str(run), "-n", "700"] if task == "generate" else [task, str(run), str(data), "--num_samples", "2"]
    )
    return [*given, "-o", str(output), "--batch_size", "8", "--num_steps", "8"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", ["denoise", "generate"])
def test_two_processes_of_a_launcher_make_the_result_of_one(
    task: str, tiny_run: Path, tiny_h5ad: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.h5ad", tmp_path / "two.h5ad"
    assert main(command(task, tiny_run, tiny_h5ad, one)) == 0
    launcher = [
        "accelerate",
        "launch",
        "--config_file",
        str(CONFIGS / "cpu.yaml"),
        "--num_processes",
        "2",
        "-m",
        "sedd",
    ]
    words = [*launcher, *command(task, tiny_run, tiny_h5ad, two)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    same(one, two)
    assert done.stdout.count("two.h5ad: ") == 1  # one speaks for both
    n, share = (700, 352) if task == "generate" else (240, 120)  # whole parts of 8 cells
    assert f"/{share} " in done.stderr and f"/{n} " not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path not in (one, two)] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_task_killed_half_way_is_resumed_to_the_result_of_an_undisturbed_one(
    tiny_run: Path, tiny_h5ad: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    slow = ["--num_steps", "60"]  # so that it is met at work
    words = [sys.executable, "-m", "sedd", *command("generate", tiny_run, tiny_h5ad, killed), *slow]
    process = subprocess.Popen(words, cwd=ROOT, env=environment())
    wait_until(lambda: len(list(tmp_path.glob("killed.zarr.partial/*.npz"))) >= 3)
    process.kill()
    process.wait()
    assert not killed.exists()
    n_made = len(list(tmp_path.glob("killed.zarr.partial/*.npz")))
    done = subprocess.run([*words, "--resume"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f" {8 * n_made}/700" in done.stderr  # where the bar starts; parts of 8 cells
    assert main([*command("generate", tiny_run, tiny_h5ad, whole), *slow]) == 0
    same(whole, killed)
    assert sorted(tmp_path.iterdir()) == [killed, whole]
