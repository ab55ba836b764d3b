"""Each process of a run says once in a while that it is there, so that the others need not wait a day for one that is lost.

A process that ends closes its connections, which the others notice at once. One whose machine is gone, or that stands still, does not: what
the others would wait for comes with a time limit of hours, as the first of them may be converting a file meanwhile. A thread of a process at
work, whatever it works at, beats on.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

PATIENCE = 60.0
"""Seconds without a sign after which a process is taken for lost."""

_DONE = b"done"


@contextlib.contextmanager
def heartbeat(index: int, number: int, *, patience: float = PATIENCE) -> Iterator[None]:
    """Context in which this process is heard of by the others, and ends, with a message, when one of them is not heard of any more.

    Parameters
    ----------
    index, number
        Of this process, and how many there are.
    patience
        Seconds without a sign.
    """
    if number == 1:
        yield
        return
    one = _Heartbeat(index, number, patience)
    one.start()
    try:
        yield
    finally:
        one.stop()


class _Heartbeat:
    """Two threads: one that tells and asks, and may have to wait for an answer for ever, and one that looks at the clock."""

    def __init__(self, index: int, number: int, patience: float) -> None:
        self.index, self.number, self.patience, self.every = index, number, patience, patience / 12
        # A connection of its own: a thread that waits in another one keeps it.
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=patience),
        )  # fmt: skip
        self.ended = threading.Event()
        self.reset()
        self.threads = [threading.Thread(target=work, name="heartbeat", daemon=True) for work in (self.beat, self.watch)]

    def reset(self) -> None:
        now = time.monotonic()
        self.heard = {other: now for other in range(self.number) if other != self.index}
        self.answered = now

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(self.every)

    def beat(self) -> None:
        """Tell that this process is there, and ask after the others."""
        signs = dict.fromkeys(self.heard, b"")
        for count in itertools.count():
            try:
                self.store.set(self.key(self.index), _DONE.decode() if self.ended.is_set() else str(count))
                for other in signs:
                    found = self.store.get(self.key(other)) if self.store.check([self.key(other)]) else b""
                    if found != signs[other] or found == _DONE:
                        signs[other], self.heard[other] = found, time.monotonic()
                self.answered = time.monotonic()
            except RuntimeError:  # who keeps the signs is lost, or at its end as this process will be
                pass
            if self.ended.is_set():
                return
            self.ended.wait(self.every)

    def watch(self) -> None:
        """End this process when another one is lost; its other threads wait for that one, where nothing interrupts them."""
        before = time.monotonic()
        while not self.ended.wait(self.every):
            now = time.monotonic()
            if now - before > 3 * self.every:  # this process itself stood still, as all of them may have
                self.reset()
            before = now
            if silent := self.silent(now):
                print(
                    f"sedd train: error: {silent} has given no sign for {self.patience:.0f} s: it is lost or stands still. "
                    "Continue with --resume auto.",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                os._exit(1)

    def silent(self, now: float) -> str | None:
        """Return who has given no sign for too long; while who keeps the signs does not answer, nothing is known of the others."""
        if now - self.answered > self.patience:
            return "the first machine of this run"
        return next((f"process {other} of {self.number}" for other, last in self.heard.items() if self.answered - last > self.patience), None)

    @staticmethod
    def key(index: int) -> str:
        return f"sedd/heartbeat/{index}"
