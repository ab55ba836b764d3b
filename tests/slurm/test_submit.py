"""What bash/train_submit.sh asks of sbatch, and that the job scripts are sound, without a cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("bash", "slurm", "tests/slurm")
    for path in (ROOT / folder).iterdir()
    if path.suffix in (".sh", ".sbatch")
)
JOB_SCRIPTS = [name for name in SCRIPTS if name.endswith(".sbatch")]

RECORDER = r"""#!/usr/bin/env bash
printf '%s\0' "$@" >>"$RECORD"
printf '\n' >>"$RECORD"
case " $* " in
  *" --test-only "*) exit "${REFUSE:-0}" ;;
  *) echo "4711;cluster" ;;
esac
"""


class Submission:
    """A checkout with a recording `sbatch`: `calls` are the words of its calls."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.record = folder / "a checkout", folder / "record"
        (self.checkout / "bash").mkdir(parents=True)
        shutil.copy(ROOT / "bash" / "train_submit.sh", self.checkout / "bash")
        shutil.copytree(ROOT / "slurm", self.checkout / "slurm")
        self.programs = folder / "bin"
        self.programs.mkdir()
        self._program(self.programs / "sbatch", RECORDER)
        self._program(self.programs / "scontrol", "#!/bin/sh\nexit 1\n")
        self._program(self.checkout / "bash" / "setup.sh", "#!/bin/sh\n")
        (self.checkout / "cells.h5ad").touch()

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def __call__(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.programs}:/usr/bin:/bin", "RECORD": str(self.record), "HOME": os.environ["HOME"]}
        return subprocess.run(
            ["bash/train_submit.sh", *words],
            cwd=self.checkout,
            env={**environment, "DATA_PATH": "cells.h5ad", **variables},
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[list[str]]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [line.split("\0")[:-1] for line in lines]


@pytest.fixture
def submit(tmp_path: Path) -> Submission:
    return Submission(tmp_path)


def directives(script: str) -> dict[str, str]:
    lines = (ROOT / script).read_text().splitlines()
    words = [line.split()[1] for line in lines if line.startswith("#SBATCH ")]
    return dict(word.lstrip("-").partition("=")[::2] for word in words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_the_training_job_has_the_promised_defaults() -> None:
    assert directives("slurm/sb-ism.sbatch").items() >= {
        "job-name": "SEDD-RNAseq",
        "gres": "gpu:rtx_6000:1",
        "mem-per-gpu": "80G",
        "time": "24:00:00",
        "qos": "embers",
        "output": "slurm_out/sedd_rnaseq-%j.out",
        "signal": "B:USR1@120",
    }.items()


@pytest.mark.parametrize("script", JOB_SCRIPTS)
def test_a_restarted_job_keeps_its_log_and_may_be_requeued(script: str) -> None:
    found = directives(script)
    assert "requeue" in found
    assert found["open-mode"] == "append"


@pytest.mark.parametrize("script", JOB_SCRIPTS)
def test_a_job_started_outside_the_checkout_says_so(script: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", ROOT / script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "not the checkout of sedd" in done.stderr


def test_without_settings_the_script_decides(submit: Submission) -> None:
    done = submit()
    assert done.returncode == 0, done.stderr
    script = str(submit.checkout / "slurm" / "sb-ism.sbatch")
    assert submit.calls == [["--test-only", script], ["--parsable", script]]
    assert (submit.checkout / "slurm_out").is_dir()
    for line in ("squeue --job 4711", "slurm_out/sedd_rnaseq-4711.out", "scontrol requeue 4711", "scancel 4711"):
        assert line in done.stdout


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({"JOB_NAME": "mine"}, ["--job-name=mine"]),
        ({"GPUS": "4"}, ["--gres=gpu:rtx_6000:4", "--cpus-per-task=24"]),
        ({"GPUS": "2", "CPUS_PER_TASK": "4"}, ["--gres=gpu:rtx_6000:2", "--cpus-per-task=4"]),
        ({"GPU_TYPE": "h100"}, ["--gres=gpu:h100:1"]),
        ({"GPU_TYPE": ""}, ["--gres=gpu:1"]),
        ({"GPUS": "0", "MEM_PER_GPU": "16G"}, ["--gres=none", "--mem-per-gpu=0"]),
        ({"MEM_PER_GPU": "40G"}, ["--mem-per-gpu=40G"]),
        ({"TIME_LIMIT": "2:00:00"}, ["--time=2:00:00"]),
        ({"QOS": "inferno"}, ["--qos=inferno"]),
        ({"QOS": ""}, ["--qos="]),
        ({"PARTITION": "gpu", "ACCOUNT": "lab"}, ["--partition=gpu", "--account=lab"]),
        ({"PARTITION": ""}, []),
        ({"JOB_OUTPUT": "logs/%j.txt"}, ["--output=logs/%j.txt"]),
    ],
)
def test_variables_become_options(submit: Submission, variables: dict[str, str], options: list[str]) -> None:
    done = submit(**variables)
    assert done.returncode == 0, done.stderr
    script = str(submit.checkout / "slurm" / "sb-ism.sbatch")
    assert submit.calls == [["--test-only", *options, script], ["--parsable", *options, script]]


def test_words_go_to_sbatch_and_after_two_dashes_to_training(submit: Submission) -> None:
    assert submit("--nice=10", "--", "--num_epochs", "7", "--genes", "my genes.txt", TIME_LIMIT="1:00:00").returncode == 0
    script = str(submit.checkout / "slurm" / "sb-ism.sbatch")
    words = ["--time=1:00:00", "--nice=10", script, "--num_epochs", "7", "--genes", "my genes.txt"]
    assert submit.calls == [["--test-only", *words], ["--parsable", *words]]


def test_several_nodes_take_the_other_script(submit: Submission) -> None:
    assert submit(NODES="3").returncode == 0
    assert submit.calls[1] == ["--parsable", "--nodes=3", str(submit.checkout / "slurm" / "sb-multinode.sbatch")]


def test_a_job_the_cluster_refuses_is_not_queued(submit: Submission) -> None:
    done = submit(REFUSE="1", QOS="nope")
    assert done.returncode == 1
    assert "nothing was submitted" in done.stderr
    assert "--qos=nope" in done.stderr
    assert [call[0] for call in submit.calls] == ["--test-only"]


@pytest.mark.parametrize("data", ["", "missing.h5ad"])
def test_a_job_without_data_is_refused_at_once(submit: Submission, data: str) -> None:
    done = submit(DATA_PATH=data)
    assert done.returncode == 2
    assert "DATA_PATH" in done.stderr
    assert done.stderr.count("\n") == 1
    assert submit.calls == []
