"""`accelerate launch train.py` with one and with several processes, and signals that reach the training through it."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, TINY_FLAGS
from launching import CONFIGS, launch_words, launched, read_variable, started, trainers, wait_until
from test_trainer import assert_same_weights

from sedd import checkpoint

EPOCHS = "100"  # long enough that a signal sent after the first steps finds the run at work, on a fast machine too


def last_step(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp", "multi_node", "cpu"])
def test_a_launcher_configuration_loads_and_leaves_precision_to_the_flags(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.mixed_precision == "no"
    assert config.num_machines == (2 if name == "multi_node" else 1)


@pytest.fixture(scope="module")
def two_processes(tiny_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final checkpoint of two undisturbed processes."""
    directory = tmp_path_factory.mktemp("launch") / "two"
    launched("cpu.yaml", 2, tiny_h5ad, directory, "--num_epochs", EPOCHS)
    return directory / "final.pt"


@pytest.fixture(scope="module")
def one_process(tiny_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final checkpoint of one undisturbed process."""
    directory = tmp_path_factory.mktemp("launch") / "one"
    launched("one_gpu.yaml", 1, tiny_h5ad, directory, "--num_epochs", EPOCHS)
    return directory / "final.pt"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_share_the_batches(one_process: Path, two_processes: Path) -> None:
    one, two = checkpoint.load(one_process), checkpoint.load(two_processes)
    assert two["epoch"] == one["epoch"] == int(EPOCHS)
    assert two["step"] * 2 == one["step"]  # 216 cells: 14 batches of 16 for one, 7 pairs for two


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp.yaml"])
def test_each_configuration_starts_here(config: str, tiny_h5ad: Path, tmp_path: Path) -> None:
    launched(config, 2, tiny_h5ad, tmp_path / "run", "--num_epochs", "1")
    assert (tmp_path / "run" / "final.pt").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_launchers_as_on_two_machines_train_together(tiny_h5ad: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = launch_words("multi_node.yaml", 2, tiny_h5ad, tmp_path / "run", "--num_epochs", "2")
    at = words.index("train.py")
    meeting = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    first, second = ([*words[:at], *meeting, "--machine_rank", rank, *words[at:]] for rank in "01")
    with started(first) as one, started(second) as other:
        assert (one.wait(), other.wait()) == (0, 0)
    assert checkpoint.load(tmp_path / "run" / "final.pt")["step"] == 14  # 216 cells, 32 a step


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_to_the_launcher_saves_and_the_run_goes_on_bit_for_bit(
    processes: int,
    number: signal.Signals,
    tiny_h5ad: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    reference: Path = request.getfixturevalue("two_processes" if processes == 2 else "one_process")
    config, directory = ("cpu.yaml" if processes == 2 else "one_gpu.yaml"), tmp_path / "run"
    flags = ["--num_epochs", EPOCHS, "--checkpoint_dir", str(directory)]
    words = launch_words(config, processes, tiny_h5ad, directory, *flags)
    status = tmp_path / "status"
    with started(words, SEDD_STATUS_FILE=str(status)) as launcher:
        wait_until(lambda: last_step(directory) >= 10)
        assert len(trainers(str(directory))) == processes
        launcher.send_signal(number)
        launcher.wait()
        wait_until(lambda: not trainers(str(directory)))
    assert status.read_text() == "75\n"
    saved = checkpoint.find_newest(directory)
    assert saved is not None and saved.name.startswith("step_")
    launched(config, processes, tiny_h5ad, directory, "--num_epochs", EPOCHS, "--resume", "auto")
    assert_same_weights(directory / "final.pt", reference)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_process_ends_the_run_and_its_last_checkpoint_goes_on_bit_for_bit(
    rank: int, tiny_h5ad: Path, tmp_path: Path, two_processes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    flags = ["--num_epochs", EPOCHS, "--checkpoint_every", "5", "--checkpoint_dir", str(directory)]
    with started(launch_words("cpu.yaml", 2, tiny_h5ad, directory, *flags)) as launcher:
        wait_until(lambda: last_step(directory) >= 10)
        ranks = {read_variable(pid, "RANK"): pid for pid in trainers(str(directory))}
        os.kill(ranks[str(rank)], signal.SIGKILL)
        died = time.monotonic()
        assert launcher.wait() == 1
        wait_until(lambda: not trainers(str(directory)))
        assert time.monotonic() - died < 60
    said = capfd.readouterr().err
    assert "another process of this run ended" in said or "Signal 9 (SIGKILL)" in said
    saved = checkpoint.find_newest(directory)
    assert saved is not None and checkpoint.load(saved)["step"] >= 5
    launched("cpu.yaml", 2, tiny_h5ad, directory, "--num_epochs", EPOCHS, "--resume", "auto")
    assert_same_weights(directory / "final.pt", two_processes)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_job_script_passes_its_warning_on_and_reports_status_75(
    processes: int, tiny_h5ad: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """As SLURM warns it before the time limit: only the shell of the script gets the signal."""
    reference: Path = request.getfixturevalue("two_processes" if processes == 2 else "one_process")
    directory = tmp_path / "run"
    flags = ["--data_path", str(tiny_h5ad), *TINY_FLAGS, "--num_epochs", EPOCHS, "--checkpoint_dir", str(directory)]
    words = ["bash", str(ROOT / "slurm" / "sb-ism.sbatch"), *flags]
    variables = {"SEDD_ROOT": str(ROOT), "NUM_PROCESSES": str(processes)}
    with started(words, **variables) as script:
        wait_until(lambda: last_step(directory) >= 10)
        script.send_signal(signal.SIGUSR1)
        assert script.wait() == 75
        assert not trainers(str(directory))
    with started(words, **variables, SLURM_RESTART_COUNT="1") as script:
        assert script.wait() == 0
    assert_same_weights(directory / "final.pt", reference)
