"""Being asked to stop: signals become a request that the training loop honours at the next step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the work is saved, run the same command again (with --resume auto)
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class TrainingInterrupted(Exception):
    """A run stopped on a signal after its state was saved.

    Attributes
    ----------
    exit_code
        75 after SIGTERM or SIGUSR1 (queue the job again), 130 after Ctrl-C.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = EXIT_INTERRUPTED if signal_number == signal.SIGINT else EXIT_PREEMPTED


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C set `signal_number` instead of ending the process.

    A second Ctrl-C ends the process at once. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._at_once = False
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a signal raises `TrainingInterrupted`, as there is nothing to save yet."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number  # kept, in case the exception is lost in a finaliser: then the first step stops
        if self._at_once:
            self._at_once = False
            raise TrainingInterrupted(
                f"stopped by signal {number} before the first step; what was converted so far is kept. Start it again.", number
            )


def report_status(status: int) -> None:
    """Leave the exit status in the file named by SEDD_STATUS_FILE: `accelerate launch` turns every failure into 1."""
    path = os.environ.get("SEDD_STATUS_FILE")
    if path and os.environ.get("RANK", "0") == "0":
        Path(path).write_text(f"{status}\n")


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when `accelerate launch` dies: it does not pass on every signal.

    One process gets none of the launcher's signals; several get no SIGUSR1. Only Linux has this.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by the launcher, for its children
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
