"""The job scripts on a real controller with two nodes: what is requeued ends as if it had not been.

`tests/slurm/start.sh` starts the controller in a temporary directory. It needs root and Debian's packages slurmctld,
slurmd, slurm-client and munge.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from anndata import read_zarr
from conftest import ROOT, TINY_FLAGS
from test_trainer import assert_same_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
CPU_JOB = ["--gres=none", "--mem-per-gpu=0", "--cpus-per-task=1"]
EPOCHS = 300  # the controller takes seconds to preempt a job; 100 epochs are over in seven where cores are fast


class Cluster:
    """A running controller, and a checkout to submit from.

    Parameters
    ----------
    state
        The directory that was given to start.sh.
    checkout
        A directory with the project's scripts, elsewhere than the project.
    """

    def __init__(self, state: Path, checkout: Path) -> None:
        self.state, self.checkout = state, checkout
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(state / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *words: str, **variables: str) -> str:
        done = subprocess.run(
            words, cwd=self.checkout, env={**self.environment, **variables}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def sbatch(self, script: str, *words: str, options: list[str] | None = None, **variables: str) -> str:
        """Submit a script without a GPU; the job's id."""
        chosen = CPU_JOB if options is None else options
        return self.run("sbatch", "--parsable", *chosen, f"slurm/{script}", *words, **variables).strip()

    def facts(self, job: str) -> dict[str, str]:
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, what: str, job: str, done: Callable[[], bool], seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"{what} did not happen in {seconds} s\n{self.log(job)}"
            time.sleep(0.2)

    def wait_for_end(self, job: str) -> str:
        """Wait until the job is in a final state, which is returned."""
        finals = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(f"the end of job {job}", job, lambda: self.facts(job)["JobState"] in finals)
        return self.facts(job)["JobState"]

    def wait_for_step(self, job: str, directory: Path, step: int) -> None:
        self.wait(f"step {step} of job {job}", job, lambda: last_step(directory) >= step)

    def preempt(self) -> None:
        """Take node n1 from the jobs on it, as a job of higher priority does."""
        self.run("sbatch", "--partition=urgent", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=true")

    def log(self, job: str) -> str:
        return "".join(p.read_text(errors="replace") for p in self.checkout.glob(f"slurm_out/*-{job}.out"))


def last_step(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [p for p in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(p) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("a controller and its nodes can only be started as root")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("sedd", "slurm", "configs", "train.py"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "bash").mkdir()
    shutil.copy(ROOT / "bash" / "train_submit.sh", checkout / "bash")
    setup = checkout / "bash" / "setup.sh"
    setup.write_text("#!/bin/sh\n")  # the environment of these tests is the jobs' environment
    setup.chmod(0o755)
    (checkout / "slurm_out").mkdir()
    state = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([HERE / "start.sh", state], check=True)
        yield Cluster(state, checkout)
    finally:
        subprocess.run([HERE / "stop.sh", state], check=True)


def train_flags(data: Path, directory: Path) -> list[str]:
    return ["--data_path", str(data), "--checkpoint_dir", str(directory), *TINY_FLAGS, "--num_epochs", str(EPOCHS)]


@pytest.fixture(scope="module")
def store(cluster: Cluster, tiny_h5ad: Path) -> Path:
    """The tiny cells as a store, made by a conversion job with two Dask workers."""
    job = cluster.sbatch(
        "sb-convert.sbatch",
        options=["--ntasks=2", "--cpus-per-task=1", "--mem-per-cpu=1G"],
        INPUTS=str(tiny_h5ad),
        OUTPUT="tiny.zarr",
    )
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.log(job)
    assert not list(cluster.checkout.glob(".sedd-dask-*"))
    return cluster.checkout / "tiny.zarr"


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, store: Path) -> Path:
    """The final checkpoint of a job that nothing happened to."""
    directory = cluster.checkout / "undisturbed"
    job = cluster.sbatch("sb-ism.sbatch", *train_flags(store, directory))
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.log(job)
    return directory / "final.pt"


def test_a_conversion_has_slurm_start_its_workers(cluster: Cluster, tiny_h5ad: Path, store: Path) -> None:
    output = cluster.checkout / "by_jobs.zarr"
    words = [*("-m", "sedd", "convert", str(tiny_h5ad), str(output)), *("--slurm_workers", "2")]
    seen: set[str] = set()
    with subprocess.Popen(
        [sys.executable, *words], cwd=cluster.checkout, env=cluster.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            seen |= set(cluster.run("squeue", "--noheader", "--format=%i %j").splitlines())
            time.sleep(0.1)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert "asked SLURM for 2 workers" in said
    workers = {line.split()[0] for line in seen if line.endswith("dask-worker")}
    assert len(workers) == 2
    assert all(cluster.facts(job)["JobState"] in ("CANCELLED", "COMPLETED", "COMPLETING") for job in workers)
    made, expected = (read_zarr(path) for path in (output, store))
    np.testing.assert_array_equal(made.X.toarray(), expected.X.toarray())
    assert made.obs.equals(expected.obs)


def test_workers_that_slurm_would_not_take_end_the_conversion_before_it_begins(cluster: Cluster, tiny_h5ad: Path) -> None:
    output = cluster.checkout / "refused.zarr"
    done = subprocess.run(
        [sys.executable, "-m", "sedd", "convert", str(tiny_h5ad), str(output), "--slurm_workers", "2"],
        env={**cluster.environment, "DASK_JOBQUEUE__SLURM__QUEUE": "nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "SLURM would not take a worker" in done.stderr
    assert "invalid partition specified: nowhere" in done.stderr  # in the words of SLURM
    assert not list(cluster.checkout.glob("refused*"))


@pytest.mark.parametrize("how", ["requeued", "preempted"])
def test_a_job_stopped_half_way_ends_with_the_weights_of_one_that_was_not(
    how: str, cluster: Cluster, store: Path, undisturbed: Path
) -> None:
    directory = cluster.checkout / how
    options = [*CPU_JOB, "--nodelist=n1"]
    job = cluster.sbatch("sb-ism.sbatch", *train_flags(store, directory), options=options)
    cluster.wait_for_step(job, directory, 100)
    if how == "requeued":
        cluster.run("scontrol", "requeue", job)
    else:
        cluster.preempt()
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.log(job)
    assert cluster.facts(job)["Restarts"] == "1"
    assert f"job {job}, start 2" in cluster.log(job)
    assert list(directory.glob("step_*.pt"))  # saved when it was stopped
    assert_same_weights(directory / "final.pt", undisturbed)


def test_a_job_whose_time_is_nearly_up_puts_itself_back_and_a_cancelled_one_does_not(
    cluster: Cluster, store: Path, undisturbed: Path
) -> None:
    directory = cluster.checkout / "warned"
    # --overwrite deletes the run that was there at the first start, and must not at the second.
    job = cluster.sbatch("sb-ism.sbatch", *train_flags(store, directory), "--overwrite")
    cluster.wait_for_step(job, directory, 60)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # as --signal=B:USR1@120 does
    cluster.wait("the second start", job, lambda: f"job {job}, start 2" in cluster.log(job))
    saved = max(int(p.stem.split("_")[1]) for p in directory.glob("step_*.pt"))
    cluster.wait_for_step(job, directory, saved + 30)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    cluster.wait("a checkpoint", job, lambda: any(int(p.stem.split("_")[1]) > saved for p in directory.glob("step_*.pt")))
    time.sleep(8)  # a requeued job would be waiting or running again by now
    assert cluster.facts(job)["JobState"] == "CANCELLED"

    script = cluster.run("bash/train_submit.sh", *CPU_JOB, "--", *train_flags(store, directory), RESUME="auto")
    again = script.split("Submitted job ")[1].split(".")[0]
    assert f"slurm_out/sedd_rnaseq-{again}.out" in script
    assert cluster.wait_for_end(again) == "COMPLETED", cluster.log(again)
    assert_same_weights(directory / "final.pt", undisturbed)


def test_two_nodes_train_together_and_survive_a_warning_and_a_preemption(cluster: Cluster, store: Path) -> None:
    reference = cluster.checkout / "two-processes"
    config = ROOT / "configs" / "accelerate" / "cpu.yaml"
    launch = ["accelerate", "launch", "--config_file", str(config), "--num_processes", "2", "train.py"]
    cluster.run(*launch, *train_flags(store, reference))

    directory = cluster.checkout / "two-nodes"
    options = [*CPU_JOB, "--partition=patient"]
    job = cluster.sbatch("sb-multinode.sbatch", *train_flags(store, directory), options=options)
    cluster.wait_for_step(job, directory, 30)
    assert cluster.facts(job)["NodeList"] == "n[1-2]"
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.wait("the second start", job, lambda: f"job {job}, start 2" in cluster.log(job))
    saved = max(int(p.stem.split("_")[1]) for p in directory.glob("step_*.pt"))
    cluster.wait_for_step(job, directory, saved + 10)
    cluster.preempt()
    cluster.wait("its return to the queue", job, lambda: cluster.facts(job)["Restarts"] == "2", seconds=80)  # in the grace
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.log(job)
    assert_same_weights(directory / "final.pt", reference / "final.pt")


def test_a_job_that_fails_is_not_requeued_and_keeps_the_status(cluster: Cluster, store: Path) -> None:
    job = cluster.sbatch("sb-ism.sbatch", *train_flags(store, cluster.checkout / "bad"), "--hidden_dim", "15")
    assert cluster.wait_for_end(job) == "FAILED"
    assert cluster.facts(job)["ExitCode"] == "2:0"
    assert cluster.facts(job)["Restarts"] == "0"
    assert "--hidden_dim 15 is not divisible" in cluster.log(job)


def test_inference_jobs_impute_and_generate(cluster: Cluster, store: Path, undisturbed: Path) -> None:
    common = {"CHECKPOINT": str(undisturbed), "DATA_PATH": str(store)}
    jobs = {
        "imputed.h5ad": cluster.sbatch("sb-infer.sbatch", "--hide", "0.2", TASK="impute", OUTPUT="imputed.h5ad", **common),
        "new.h5ad": cluster.sbatch("sb-infer.sbatch", "-n", "20", TASK="generate", OUTPUT="new.h5ad", **common),
    }
    for output, job in jobs.items():
        assert cluster.wait_for_end(job) == "COMPLETED", cluster.log(job)
        assert (cluster.checkout / output).exists()


def test_the_defaults_are_accepted_and_impossible_requests_refused_before_the_queue(cluster: Cluster, store: Path) -> None:
    for script in ("sb-ism.sbatch", "sb-multinode.sbatch", "sb-convert.sbatch", "sb-infer.sbatch"):
        cluster.run("sbatch", "--test-only", f"slurm/{script}")
    refused = subprocess.run(
        ["bash/train_submit.sh"],
        cwd=cluster.checkout,
        env={**cluster.environment, "DATA_PATH": str(store), "GPU_TYPE": "h100"},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "nothing was submitted" in refused.stderr
    assert cluster.run("squeue", "--noheader") == ""
