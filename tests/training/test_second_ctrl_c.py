"""A second Ctrl-C ends a training run wherever it comes; with `concurrent.futures` in the loader it would not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_FLAGS
from launching import environment

SCRIPT = """
import os, signal, sys, threading, time, warnings
from concurrent.futures import Future, ThreadPoolExecutor
from sedd import cli
from sedd.io.loading import pipeline
from sedd.io.loading.threads import Task, Threads
from sedd.training.learner import Learner
warnings.simplefilter("ignore")

class Executor(ThreadPoolExecutor):
    def __init__(self, number, name):
        super().__init__(number, thread_name_prefix=name)
    def close(self):
        self.shutdown(wait=True, cancel_futures=True)

pool, method, at, *argv = sys.argv[1:]
kind, waits = {"own": (Threads, Task), "concurrent.futures": (Executor, Future)}[pool]
events, steps = [0], [0]

def interrupt(frame, event, argument):
    # Of the library, the points that leave a lock locked: it was taken, and `with` does not know yet.
    if pool == "own" or (event == "c_return" and frame.f_code.co_name == "__enter__"):
        events[0] += 1
        if events[0] == int(at):
            sys.setprofile(None)
            print("a second Ctrl-C", flush=True)
            os.kill(os.getpid(), signal.SIGINT)

def interrupted(real):
    def call(*given):
        if threading.current_thread() is not threading.main_thread() or steps[0] < 3:
            return real(*given)
        steps[0] = -10**9  # once
        os.kill(os.getpid(), signal.SIGINT)
        sys.setprofile(interrupt)
        try:
            return real(*given)
        finally:
            sys.setprofile(None)
    return call

owner = kind if method == "submit" else waits
setattr(owner, method, interrupted(getattr(owner, method)))
pipeline.Threads = kind
step, make = Learner.step, pipeline.Pipeline._make_dense

def counted(self, *given, **more):
    steps[0] += 1
    return step(self, *given, **more)

def slow(self, *given):  # so that threads are at work when it comes
    time.sleep(0.2 * (steps[0] >= 2))
    return make(self, *given)

Learner.step, pipeline.Pipeline._make_dense = counted, slow
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main(argv))
"""


def ends(pool: str, method: str, at: int, data: Path, folder: Path) -> tuple[bool, bool]:
    """Whether a run ends in which the second Ctrl-C comes at the `at`-th point of a call of `method`, and whether it came."""
    argv = [
        "train",
        "--data_path",
        str(data),
        "--checkpoint_dir",
        str(folder / f"{method}{at}"),
        *TINY_FLAGS,
        "--batch_size",
        "2",
    ]
    words = [sys.executable, "-c", SCRIPT, pool, method, str(at), *argv, "--memory_budget", "1MiB"]
    with subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        came = process.stdout.readline() == "a second Ctrl-C\n"  # or the run has ended
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            return False, came
    assert process.returncode == 130, errors[-2000:]
    return True, came


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["submit", "result"])
def test_a_second_ctrl_c_ends_a_run_at_every_point_of_its_threads(method: str, tiny_h5ad: Path, tmp_path: Path) -> None:
    for at in range(1, 100):
        ended, came = ends("own", method, at, tiny_h5ad, tmp_path)
        assert ended, f"point {at}"
        if not came:
            break
    assert at > 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_with_the_library_s_threads_there_are_points_at_which_it_does_not(tiny_h5ad: Path, tmp_path: Path) -> None:
    """Why `sedd.io.loading.threads` is there: once this fails, it can go."""
    assert not all(ends("concurrent.futures", "submit", at, tiny_h5ad, tmp_path)[0] for at in (2, 1, 3))
