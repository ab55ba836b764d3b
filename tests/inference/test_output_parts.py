"""An interrupted task is resumed, several processes share one: the result is that of a single undisturbed run."""

from __future__ import annotations

import errno
import inspect
import itertools
import os
import re
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

import sedd
from sedd import tasks
from sedd.cli import main
from sedd.errors import SeddWarning, UserError
from sedd.inference import applying, output_parts
from sedd.inference.annotation import annotate
from sedd.inference.output_parts import PartsInFolder, made_from
from sedd.inference.pretrained import Pretrained
from sedd.inference.scoring import score
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
    "annotate": annotate,
    "score": lambda model, data, **rest: score(model, data, reference=make_counts(40, seed=1), n_masks=2, **rest),
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
    if task not in ("embed", "annotate"):
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
                    patch.setattr("sedd.inference.sources.FileSource.whole", None)  # copied, not read
                embed(model, tmp_path / f"in{data_suffix}", output=output, overwrite=data_suffix == ".zarr", progress=False)
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
    no_settings, of_the_model = ("reference", "output", "resume", "overwrite", "progress"), ("new_genes", "gene_embeddings")
    seen: list[dict[str, Any]] = []

    def stop(task: str, model: Pretrained, arguments: dict[str, Any], n_obs: int) -> None:
        seen.append(arguments)
        raise KeyboardInterrupt

    for module in (tasks, applying):
        monkeypatch.setattr(module, "open_parts", stop)
    output = tmp_path / "out.h5ad"
    with pytest.raises(KeyboardInterrupt):
        TASKS[task](model, make_counts(20), output=output)
    (arguments,) = seen
    before = made_from(task, model, arguments)
    for name in inspect.signature(getattr(sedd, task)).parameters.keys() - {"model", "data"}:
        after = made_from(task, model, arguments | {name: "another value"})
        changed = [key for key in before if before[key] != after[key]]
        assert changed == ([] if name in {*no_settings, *of_the_model} else [f"--{name}"])


def save_and_note(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are written from now on."""
    real, saved = output_parts.save_arrays, list[str]()

    def save(path: str, **arrays: Any) -> None:
        real(path, **arrays)
        saved.append(path)

    monkeypatch.setattr(output_parts, "save_arrays", save)
    return saved


@pytest.mark.parametrize("task", ["impute", "denoise", "embed"])
@pytest.mark.parametrize("trouble", ["value", "label"])
def test_one_bad_cell_costs_no_finished_part_and_after_it_was_mended_the_rest_is_made(
    task: str, trouble: str, model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output, whole = (tmp_path / name for name in ("data.h5ad", "out.h5ad", "whole.h5ad"))
    good = make_counts(90)
    bad = good.copy()
    if trouble == "value":
        bad.X = bad.X.toarray()
        bad.X[75, 3] = 0.5
    else:
        bad.obs["cell_type"] = bad.obs["cell_type"].cat.add_categories(["martian"])
        bad.obs.iloc[75, 0] = "martian"
    write(bad, data)
    settings: dict[str, Any] = {"batch_size": 8, "progress": False, "output": output}
    said = {"value": "not a whole number.*cell 75", "label": "martian"}[trouble]
    kept = r"The parts that are done are kept in .*out\.h5ad\.partial: mend that and pass --resume to complete .*out\.h5ad, or delete them\."
    for again in ({}, {"resume": True}):  # it may be tried again before it was mended
        with pytest.raises(UserError, match=f"{said}.*{kept}"):
            TASKS[task](model, data, **settings, **again)
    parts = {path.name.split("-")[1] for path in Path(f"{output}.partial").glob("*.npz")}
    assert parts == {f"{lo:012d}" for lo in range(0, 72, 8)}

    mended = good.copy()
    mended.X[8:16] *= 2  # and one of those that were done is another now
    write(mended, data)
    saved = save_and_note(monkeypatch)
    with pytest.warns(SeddWarning, match="the data changed since: of 9 parts 8 are of cells that are as before, and are used"):
        TASKS[task](model, data, **settings, resume=True)
    assert [Path(path).name.split("-")[1] for path in saved] == [f"{lo:012d}" for lo in (8, 72, 80, 88)]
    TASKS[task](model, data, **{**settings, "output": whole})
    same(whole, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.h5ad", "out.h5ad", "whole.h5ad"]


def test_a_folder_of_files_is_known_by_all_of_them(tmp_path: Path) -> None:
    names = ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz")
    for name in names:
        (tmp_path / name).write_text("a")
    seen = {output_parts._data(tmp_path)}
    for name in names:
        (tmp_path / name).write_text("b")
        seen.add(output_parts._data(tmp_path))
    assert len(seen) == 4
    assert None not in seen


def test_a_file_that_cells_are_read_from_is_not_replaced_by_their_result(model: Pretrained, tmp_path: Path) -> None:
    write(make_counts(20), tmp_path / "data.h5ad")
    backed = ad.read_h5ad(tmp_path / "data.h5ad", backed="r")
    with pytest.raises(UserError, match="is the data itself"):
        embed(model, backed, output=tmp_path / "data.h5ad", overwrite=True, progress=False)
    backed.file.close()


def test_cells_in_memory_leave_no_parts(model: Pretrained, tmp_path: Path) -> None:
    bad = make_counts(90)
    bad.X = bad.X.toarray()
    bad.X[75, 3] = 0.5
    with pytest.raises(UserError, match=r"no other matrix in it; .* --round rounds them\.$"):
        denoise(model, bad, rounds=1, batch_size=8, output=tmp_path / "out.h5ad", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_process_of_an_abandoned_task_makes_nothing_of_the_next(model: Pretrained, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n_obs": 16, "n_vars": 2, "batch_size": 8}
    straggler = PartsInFolder(tmp_path / "o.h5ad", {"data": "a", "--seed": 1}, resume=False, **settings)
    straggler._processes = Processes(1, 2)
    straggler.writes = False
    straggler._set_share([(0, 8), (8, 16)])
    for other, resume in (({"data": "a", "--seed": 2}, False), ({"data": "a", "--seed": 2}, True)):
        with PartsInFolder(tmp_path / "o.h5ad", other, resume=resume, **settings) as parts:
            for lo in (0, 8):
                straggler.add(lo, lambda: b"x", X=np.full((8, 2), 7.0))
            parts.compare(lambda lo, hi: b"x")
            assert parts.spans == [(0, 8), (8, 16)]
            for lo in (0, 8):
                parts.add(lo, lambda: b"x", X=np.full((8, 2), float(lo)))
                straggler.add(lo, lambda: b"x", X=np.full((8, 2), 7.0))
            assert [block["X"][0, 0] for block in parts.all()] == [0, 8]


def test_half_written_parts_of_a_killed_task_are_removed_by_the_next(model: Pretrained, tiny_h5ad: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.h5ad"
    folder = Path(f"{output}.partial")
    folder.mkdir()
    for name in ("lock", ".000000000000.npz.node7-12-0123abcd.part"):
        (folder / name).touch()
    with PartsInFolder(output, {}, n_obs=16, n_vars=2, batch_size=8, resume=False):
        assert sorted(path.name for path in folder.iterdir()) == ["lock", "task.json"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_result_that_was_moved_aside_when_its_task_was_killed_is_put_back(
    suffix: str, model: Pretrained, tiny_h5ad: Path, tmp_path: Path
) -> None:
    """Where names cannot be exchanged a store is replaced in two renames, between which the task is killed; a file in one."""
    output = tmp_path / f"o{suffix}"
    generate(model, 16, num_steps=2, output=output, progress=False)
    script = f"""
import os, signal, sys
from sedd.io import outputs
from sedd.tasks import generate
outputs.exchange = lambda *_: False
def watch(event, given):
    if event == "os.rename" and str(given[1]) == {str(output)!r}:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
generate({str(model.path)!r}, 16, num_steps=2, seed=1, output={str(output)!r}, overwrite=True, progress=False)
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), check=False)
        assert done.returncode == -9
        assert output.exists() == (suffix == ".h5ad")
        with pytest.raises(UserError, match="exists already" if output.exists() else "unfinished output; pass --resume"):
            generate(model, 16, num_steps=2, output=output, progress=False)
    with output_parts.only_writer(output, wait=False):
        assert output.exists()  # as it was
    generate(model, 16, num_steps=2, output=tmp_path / f"new{suffix}", progress=False)
    same(output, tmp_path / f"new{suffix}")
    generate(model, 16, num_steps=2, seed=1, output=output, overwrite=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"new{suffix}", f"o{suffix}"]


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
    bars = [line for line in re.split(r"[\r\n]+", done.stderr) if "cell/s" in line]
    made = [line for line in bars if line.startswith(f"{task}, the share of one of 2 processes: ")]
    assert made and all(f"/{share} " in line for line in made)
    # What is learned of the cells first, each process learns of all of them.
    assert all(line.startswith("denoise: how much own counts and similar cells say: ") and f"/{n} " in line for line in bars if line not in made)
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


def test_a_disk_without_room_for_the_first_part_is_said_with_the_output(model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output_parts, "save_arrays", full)
    with pytest.raises(OSError, match=r"out\.h5ad: cannot be written \(No space left on device\)\. Make room there, or name another output"):
        embed(model, make_counts(8), output=tmp_path / "out.h5ad", progress=False)
    assert not list(tmp_path.iterdir())


def test_an_error_that_nobody_foresaw_says_which_parts_are_kept(model: Pretrained, tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saved = output_parts.save_arrays, []

    def save_one(path: str, **arrays: Any) -> None:
        if saved:
            raise MemoryError
        save(path, **arrays)
        saved.append(path)

    monkeypatch.setattr(output_parts, "save_arrays", save_one)
    with pytest.raises(MemoryError) as held:
        embed(model, tiny_h5ad, output=tmp_path / "out.h5ad", batch_size=8, progress=False)
    assert held.value.__notes__ == [f"What is done so far is in {tmp_path}/out.h5ad.partial: pass --resume to complete {tmp_path}/out.h5ad, or delete it."]
    monkeypatch.undo()
    assert embed(model, tiny_h5ad, output=tmp_path / "out.h5ad", batch_size=8, resume=True, progress=False).n_obs == 240
