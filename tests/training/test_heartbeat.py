"""A process that stands still is noticed by the others; one that is busy, or done, is not taken for lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from sedd.training.heartbeat import _Heartbeat

PROCESS = """
import sys, time
import torch.distributed as dist
from sedd.training.heartbeat import heartbeat
index, seconds = int(sys.argv[1]), float(sys.argv[2])
dist.init_process_group("gloo")
with heartbeat(index, 2, patience=3.0):
    print("ready", flush=True)
    time.sleep(seconds)
if index == 0:
    time.sleep(float(sys.argv[3]))
"""


def processes(*seconds: float, after: float = 0.0) -> list[subprocess.Popen[str]]:
    """Two processes that are at work for so many seconds; the first, which keeps the store, then stays."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    made = []
    for index, own in enumerate(seconds):
        variables = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(index)}
        words = [sys.executable, "-c", PROCESS, str(index), str(own), str(after)]
        made.append(subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return made


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_stands_still_is_noticed_by_the_other(lost: int) -> None:
    pair = processes(60, 60)
    try:
        for process in pair:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        time.sleep(1)
        pair[lost].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        _, said = pair[1 - lost].communicate(timeout=50)
        assert pair[1 - lost].returncode == 1
        who = "process 1 of 2" if lost else "the first machine of this run"
        assert f"{who} has given no sign for 3 s" in said and "--resume auto" in said
        assert time.monotonic() - began < 20
    finally:
        for process in pair:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_process_that_is_done_is_not_taken_for_lost() -> None:
    pair = processes(12, 1, after=0)
    try:
        for process in pair:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
    finally:
        for process in pair:
            process.kill()
            process.communicate()


def test_nobody_is_called_silent_while_who_keeps_the_signs_does_not_answer() -> None:
    one = object.__new__(_Heartbeat)  # without its connection
    one.number, one.patience, one.heard, one.answered = 2, 3.0, {0: 10.0}, 10.001
    assert one.silent(13.0005) is None
    assert one.silent(13.002) == "the first machine of this run"
    one.answered = 13.0002
    assert one.silent(13.0005) == "process 0 of 2"
