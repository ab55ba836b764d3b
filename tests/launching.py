"""Start programs as `accelerate launch` does, wait for them, and leave none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT, TINY_FLAGS

CONFIGS = ROOT / "configs" / "accelerate"


PYTHON_DIR = Path(sys.executable).parent


def environment(**more: str) -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return {**found, "PATH": f"{PYTHON_DIR}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **more}


def launch_words(config: str, processes: int, data: Path, directory: Path, *flags: str) -> list[str]:
    launcher = ["accelerate", "launch", "--config_file", str(CONFIGS / config), "--num_processes", str(processes)]
    training = ["train.py", "--data_path", str(data), "--checkpoint_dir", str(directory), *TINY_FLAGS, *flags]
    return [*launcher, *training]


def launched(config: str, processes: int, data: Path, directory: Path, *flags: str) -> str:
    """Train to the end; what was printed."""
    words = launch_words(config, processes, data, directory, *flags)
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@contextmanager
def started(words: list[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(words, cwd=ROOT, env=environment(**variables), start_new_session=True)
    try:
        yield process
    finally:
        for pid in [*trainers(words[-1]), process.pid]:
            if process.poll() is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        process.wait()


def trainers(mark: str) -> list[int]:
    """Pids of the processes, launchers apart, that run train.py with the word `mark`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if mark in words and "launch" not in words and any(Path(word).name == "train.py" for word in words[:3]):
                found.append(int(folder.name))
    return found


def read_variable(pid: int, name: str) -> str | None:
    """The value of an environment variable of a process."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.partition("=")[::2] for word in words).get(name)


def wait_until(done: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not in {seconds} s"
        time.sleep(0.05)
