"""Trains in children of one process that has imported everything; a child is killed, as by `kill -9`, where the plan says.

    python tests/forked.py PLAN.json

PLAN.json is a list of runs: `argv` of `sedd`, `processes`, and `kill`, which is null or [step, seconds, ranks]: so long after
that step, wherever it then is, each of these ranks dies. With `record`, a folder, RANK.jsonl there gets the cells, the mean loss
and the number of cells of every step. For each run a line of JSON is printed: the exit status of each rank (-9 for a killed one),
the seconds that passed from the first death to the last end, and `fell`: what each killed rank was at.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import sedd.evaluation.evaluate  # noqa: F401
from sedd import checkpoint, cli
from sedd.training.learner import Learner
from sedd.training.validation import Validator


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def record(path: Path) -> None:
    real = Learner.step

    def recorded(self: Any, group: Any, *, step: int, epoch: int) -> Any:
        outcome = real(self, group, step=step, epoch=epoch)
        loss, n_cells = outcome.read()
        cells = [int(cell) for batch in group for cell in batch.cell]
        with open(path, "a") as file:
            file.write(json.dumps({"step": step + 1, "cells": cells, "loss": loss, "n": n_cells}) + "\n")
        return outcome

    Learner.step = recorded  # type: ignore[method-assign]


def note_work(memory: mmap.mmap) -> None:
    """Keep in `memory`, which the parent shares, what this process is at, in each of its threads: a killed one cannot tell."""
    at: dict[str, str] = {}

    def note(now: dict[str, str]) -> None:
        nonlocal at
        at = now
        memory[:] = (" and ".join(sorted(at.values())) or "between two steps").ljust(200).encode()

    def noted(of: Any, name: str, work: str) -> None:
        real = getattr(of, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            thread = threading.current_thread().name
            note({**at, thread: work})
            try:
                return real(*args, **kwargs)
            finally:
                note({name: what for name, what in at.items() if name != thread})

        setattr(of, name, wrapped)

    noted(Learner, "step", "a step")
    noted(Validator, "run", "validation")
    noted(checkpoint, "save", "a checkpoint")


def child(run: dict[str, Any], rank: int, port: int, memory: mmap.mmap) -> None:
    if run["processes"] > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["processes"], "LOCAL_WORLD_SIZE": run["processes"]}
        os.environ.update({k: str(v) for k, v in ranks.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if run.get("record"):
        record(Path(run["record"]) / f"{rank}.jsonl")
    if run["kill"] is not None and rank in run["kill"][2]:
        note_work(memory)
        step, seconds, _ = run["kill"]
        real, armed = Learner.step, []

        def watched(self: Any, group: Any, **at: int) -> Any:
            if at["step"] >= step and not armed:
                armed.append(1)
                threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return real(self, group, **at)

        Learner.step = watched  # type: ignore[method-assign]
    try:
        status = cli.main(run["argv"])
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def execute(run: dict[str, Any]) -> dict[str, Any]:
    port, pids = free_port(), {}
    shared = [mmap.mmap(-1, 200) for _ in range(run["processes"])]
    for rank in range(run["processes"]):
        pid = os.fork()
        if pid == 0:
            child(run, rank, port, shared[rank])
        pids[pid] = rank
    statuses, first = [0] * len(pids), 0.0
    for _ in range(len(pids)):
        pid, status = os.wait()
        first = first or time.monotonic()
        statuses[pids[pid]] = os.waitstatus_to_exitcode(status)
    fell = [memory[:].decode().strip(" \0") for memory in shared]
    return {"statuses": statuses, "seconds": time.monotonic() - first, "fell": [at for at in fell if at]}


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(execute(one)), flush=True)
