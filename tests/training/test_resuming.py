"""A run is resumed from one checkpoint, with the settings that determine its result, in a directory that is its own."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_FLAGS
from launching import CONFIGS, environment
from test_trainer import assert_same_weights, train

from sedd import checkpoint
from sedd.config import SECTIONS, TrainConfig
from sedd.errors import SeddWarning, UserError
from sedd.io.outputs import only_writer_in
from sedd.training.learner import Learner
from sedd.training.resuming import CONTENT, FREE, ON_RESUME, REPORTED, SAME, check_same_settings

OTHER: dict[str, Any] = {
    "layer": "counts", "raw": True, "modality": "rna", "gene_names": "symbol", "strip_version": True, "round": True, "keys": ("a",),
    "drop": ("uns",), "join": "outer", "binning": "log", "num_bins": 65, "val_fraction": 0.2, "val_cells": 9, "limit_cells": 100, "hidden_dim": 32, "num_layers": 2,
    "num_heads": 4, "dropout": 0.2, "attention": "full", "num_latents": 2, "graph": "uniform", "noise": "geometric",
    "objective": "masked", "mask_ratio": 0.3, "condition": ("donor",), "condition_library_size": False, "condition_dropout": 0.2,
    "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 6, "weight_decay": 0.1, "grad_clip": 0.5, "ema_decay": 0.99, "gradient_accumulation_steps": 2,
    "mixed_precision": "bf16", "compile": True, "seed": 1,
    "data_path": "elsewhere.zarr", "cache_dir": "elsewhere", "genes": "genes.txt", "memory_budget": "1GiB", "loader_threads": 1, "masks_on": "device",
    "model": "medium", "gene_embeddings": "vectors.npz", "num_epochs": 3, "min_steps": 5, "checkpoint_dir": "elsewhere", "resume": "auto", "overwrite": True,
    "num_threads": 2, "checkpoint_every": "7", "keep_checkpoints": 2, "early_stopping": 5, "log_with": "tensorboard", "progress": False, "dry_run": True,
}  # fmt: skip
"""Of every setting a value that `tiny_run` was not made with."""

FIELDS = {field.name: field for section in SECTIONS.values() for field in dataclasses.fields(section)}


def test_every_setting_has_its_place_in_the_table() -> None:
    assert ON_RESUME.keys() == FIELDS.keys()
    assert set(ON_RESUME.values()) == {SAME, REPORTED, CONTENT, FREE}
    assert OTHER.keys() == FIELDS.keys()


def changed(state: dict[str, Any], **settings: Any) -> TrainConfig:
    """The settings of a checkpoint, with some of them changed."""
    return TrainConfig.from_flat({**state["args"], **settings})


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_that_differs_is_an_error_or_reported_or_does_not_matter(name: str, tiny_run: Path) -> None:
    state = checkpoint.load(tiny_run / "final.pt")
    check_same_settings(state, changed(state))
    config = changed(state, **{name: OTHER[name]})
    assert config.to_flat()[name] != state["args"][name]
    flag = f"--(no_)?{name}"
    if ON_RESUME[name] == SAME or name == "gene_embeddings":
        pattern = f"--resume: the checkpoint was made with (no )?{flag}.*; the settings now say (no )?{flag}.*pass (no )?{flag}.*or start anew"
        with pytest.raises(UserError, match=pattern):
            check_same_settings(state, config)
    elif ON_RESUME[name] == REPORTED:
        with pytest.warns(SeddWarning, match=f"from here on {flag}.*where the checkpoint was made with {flag}"):
            check_same_settings(state, config)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_same_settings(state, config)


def test_all_settings_that_differ_are_named_with_both_values(tiny_run: Path) -> None:
    state = checkpoint.load(tiny_run / "final.pt")
    config = changed(state, weight_decay=0.5, condition=(), layer="counts", condition_library_size=False)
    was = "no --layer, --condition cell_type, --condition_library_size, --weight_decay 0.01"
    now = "--layer counts, no --condition, --no_condition_library_size, --weight_decay 0.5"
    with pytest.raises(
        UserError, match=f"was made with {was}; the settings now say {now}\\..*: pass {was}, or start anew"
    ):
        check_same_settings(state, config)


def test_a_checkpoint_of_before_a_setting_was_made_had_its_default(tiny_run: Path) -> None:
    state = checkpoint.load(tiny_run / "final.pt")
    del state["args"]["weight_decay"]
    check_same_settings(state, TrainConfig.from_flat({**state["args"], "weight_decay": 0.01}))
    with pytest.raises(UserError, match=r"was made with --weight_decay 0.01; the settings now say --weight_decay 0.02"):
        check_same_settings(state, TrainConfig.from_flat({**state["args"], "weight_decay": 0.02}))


CONDITIONED = ["--condition", "cell_type", "--condition_library_size"]


@pytest.mark.parametrize(
    "flags",
    [["--condition", "donor"], ["--noise", "geometric"], ["--objective", "masked"], ["--weight_decay", "0.2"]],
    ids=lambda flags: flags[0],
)
def test_a_run_that_may_not_be_resumed_is_left_as_it_is(
    flags: list[str], tiny_h5ad: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert train(tiny_h5ad, run, "--num_epochs", "3", *CONDITIONED, *flags, "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert f"the settings now say {' '.join(flags)}" in said
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_what_does_not_change_the_steps_may_change(tiny_h5ad: Path, tiny_run: Path, tmp_path: Path) -> None:
    """All of these at once, and other names of the same data, genes and sizes, give the weights of a run with the settings of before."""
    runs = [Path(shutil.copytree(tiny_run, tmp_path / name)) for name in ("one", "two")]
    (tmp_path / "genes.txt").write_text("".join(f"gene{i}\n" for i in range(60)))
    moved = shutil.copy(tiny_h5ad, tmp_path / "moved.h5ad")
    assert train(tiny_h5ad, runs[0], *CONDITIONED, "--num_epochs", "3", "--resume", "auto") == 0
    given = {
        name: OTHER[name]
        for name, kind in ON_RESUME.items()
        if kind == FREE and name not in ("dry_run", "overwrite", "num_threads", "progress")
    }
    given |= {
        "genes": tmp_path / "genes.txt",
        "model": "medium",
        "cache_dir": tmp_path / "cache",
        "checkpoint_dir": runs[1],
        "learning_rate": "2e-3",
    }
    flags = ["--no_progress", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
    assert train(Path(moved), runs[1], *CONDITIONED, *flags) == 0
    assert_same_weights(runs[0] / "final.pt", runs[1] / "final.pt")


def test_gene_vectors_are_compared_by_what_they_are(
    tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(60, 7)).astype(np.float32) for _ in range(2)] + [
        rng.normal(size=(60, 5)).astype(np.float32)
    ]
    for name, table in zip(("a", "b", "c", "d"), [tables[0], *tables], strict=True):
        np.savez(tmp_path / f"{name}.npz", genes=np.array([f"gene{i}" for i in range(60)]), vectors=table)
    vectors = [["--gene_embeddings", str(tmp_path / f"{name}.npz")] for name in "abcd"]
    assert train(tiny_h5ad, tmp_path / "run", *vectors[0]) == 0
    for number, status in ((1, 0), (2, 2), (3, 2)):
        assert train(tiny_h5ad, tmp_path / "run", *vectors[number], "--num_epochs", "3", "--resume", "auto") == status
        assert ("other vectors than those the checkpoint" in capsys.readouterr().err) == (status == 2)
    assert train(tiny_h5ad, tmp_path / "run", "--num_epochs", "3", "--resume", "auto") == 2
    assert "the settings now say no --gene_embeddings" in capsys.readouterr().err


def test_the_newest_is_found_by_headers_and_a_damaged_one_is_passed_over(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = checkpoint.load(tiny_run / "final.pt")
    for step in (10, 20, 30):
        checkpoint.save(tmp_path / f"step_{step}.pt", {**state, "step": step})
    whole = (tmp_path / "step_30.pt").read_bytes()
    place = whole.index(next(iter(state["model"].values())).numpy().tobytes()[:32])
    (tmp_path / "step_30.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert checkpoint.load(tmp_path / "step_30.pt", header=True)["step"] == 30
    verified: list[str] = []
    real = checkpoint._verify

    def verify(path: Path) -> None:
        verified.append(path.name)
        real(path)

    monkeypatch.setattr(checkpoint, "_verify", verify)
    with pytest.warns(SeddWarning, match=r"passed over .*step_30.pt: the checkpoint is damaged \(checksum"):
        found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found[0].name == "step_20.pt" and found[1]["step"] == 20
    assert verified == ["step_30.pt", "step_20.pt"]  # the tensors of the third were not read


def test_of_many_checkpoints_the_tensors_of_one_are_read(tiny_run: Path, tmp_path: Path) -> None:
    """Once to verify the checksums and once to load: of the others no more than what tells their progress."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("bytes that a process reads are told by /proc")
    state, size = checkpoint.load(tiny_run / "final.pt"), 8 << 20
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path / f"step_{step}.pt", {**state, "step": step, "more": torch.zeros(size, dtype=torch.uint8)})

    def read() -> int:
        return int(counters.read_text().split()[1])

    before = read()
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[1]["step"] == 40
    assert 2 * size < read() - before < 2.5 * size


def test_nothing_of_the_checkpoint_lives_on_while_a_run_goes_on(tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(tiny_h5ad, tmp_path, "--num_epochs", "1") == 0
    real, held, left = checkpoint.load, [], []

    def load(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = real(*args, **kwargs)
        held.extend(weakref.ref(value) for part in (state["model"], state["ema"]["average"]) for value in part.values())
        return state

    step = Learner.step

    def look(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        left.append(sum(one() is not None for one in held))
        return step(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "load", load)
    monkeypatch.setattr(Learner, "step", look)
    assert train(tiny_h5ad, tmp_path, "--num_epochs", "2", "--resume", "auto") == 0
    assert held and set(left) == {0}


# -- the directory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [[], ["--overwrite"], ["--resume", "auto"], ["--resume", "auto", "--overwrite"]], ids=" ".join
)
@pytest.mark.parametrize("there", ["file", "store", "files of another", "read-only", "below a file"])
def test_what_a_user_made_is_never_taken_for_a_run(
    there: str, more: list[str], tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    if there == "file":
        directory.write_text("mine")
    elif there == "below a file":
        directory.write_text("mine")
        directory = directory / "deeper" / "still"
    else:
        directory.mkdir()
    if there == "store":
        (directory / "zarr.json").write_text("{}")
    if there == "files of another":
        torch.save({"mine": 1}, directory / "best.pt")
        (directory / "args.json").write_text('{"lr": 1}')
    if there == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        directory.chmod(0o500)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(tiny_h5ad, directory, *more) == 2
    said = capsys.readouterr().err
    wanted = {"file": "is not a directory", "below a file": "is not a directory", "store": "is a Zarr store", "read-only": "cannot be written",
              "files of another": "another --checkpoint_dir" if "--overwrite" in more or not more else "found no checkpoint that can be read"}  # fmt: skip
    assert wanted[there] in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_runs_do_not_write_into_one_directory(
    tiny_h5ad: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    flags = [*CONDITIONED, "--num_epochs", "3", "--resume", "auto"]
    with only_writer_in(run):
        assert train(tiny_h5ad, run, *flags) == 2
        assert "run: another process is writing it" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    (run / ".best.pt.node7-123-0123abcd.part").write_bytes(b"half")  # of a process that was killed
    (run / ".mine.part").write_bytes(b"mine")
    assert train(tiny_h5ad, run, *flags) == 0
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".mine.part"]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew_by_resume_auto(tiny_h5ad: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny_run / "args.json", run)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1e9}\n{"step": 2, "lo')
    flags = [*CONDITIONED, "--num_epochs", "1", "--resume", "auto"]
    assert train(tiny_h5ad, run, *flags) == 0
    assert (run / "final.pt").exists() and "1e9" not in (run / "metrics.jsonl").read_text()
    for path in (*run.glob("*.pt"), run / "metrics.jsonl"):
        path.unlink()
    assert train(tiny_h5ad, run, *flags) == 2  # history.json is there: an epoch was done, and its checkpoint is elsewhere
    (run / "history.json").unlink()
    (run / "args.json").write_text('{"lr": 1}')  # of another program
    assert train(tiny_h5ad, run, *flags) == 2
    assert (run / "args.json").read_text() == '{"lr": 1}'


# -- several processes -----------------------------------------------------------------------------------------------

EYES = """
import os, sys
from sedd import checkpoint, cli
from sedd.errors import UserError
trouble = sys.argv.pop(1)
if os.environ["RANK"] == "1":
    real = checkpoint.load
    def other_eyes(directory):
        path = directory / "step_10.pt"
        return path, real(path)
    def blind(path, *, header=False):
        raise UserError(f"{path}: no such checkpoint; rank 1 does not see it.")
    checkpoint.load_newest = other_eyes
    if trouble == "blind":
        checkpoint.load = blind
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_resume_from_the_checkpoint_that_the_first_has_chosen(tiny_h5ad: Path, tmp_path: Path) -> None:
    (tmp_path / "eyes.py").write_text(EYES)
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "cpu.yaml"),
        "--num_processes",
        "2",
    ]

    def launched(trouble: str, directory: str, *flags: str) -> subprocess.CompletedProcess[str]:
        argv = [
            "train",
            "--data_path",
            str(tiny_h5ad),
            "--checkpoint_dir",
            str(tmp_path / directory),
            *TINY_FLAGS,
            *flags,
        ]
        words = [*launcher, str(tmp_path / "eyes.py"), trouble, *argv]
        more = {"PYTHONPATH": str(ROOT), "SEDD_STATUS_FILE": str(tmp_path / "status")}
        return subprocess.run(words, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=300)

    flags = ["--checkpoint_every", "5", "--keep_checkpoints", "5"]
    first = launched("none", "whole", *flags, "--num_epochs", "2")
    assert first.returncode == 0, first.stderr[-3000:]
    run = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    assert {"step_10.pt", "final.pt"} <= {path.name for path in run.iterdir()}
    done = launched("blind", "run", *flags, "--num_epochs", "3", "--resume", "auto")
    assert done.returncode == 1
    assert (tmp_path / "status").read_text() == "2\n"  # of the first one, which had read its own
    assert "rank 1 does not see it" in done.stderr
    for directory, trouble in (("whole", "none"), ("run", "other eyes")):
        done = launched(trouble, directory, *flags, "--num_epochs", "3", "--resume", "auto")
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(tmp_path / "whole" / "final.pt", run / "final.pt")
    assert checkpoint.load(run / "final.pt")["epoch"] == 3
