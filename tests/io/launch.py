"""What those processes run."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import warnings
from typing import Any

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link")


def run(source: str, output: str, options: dict[str, Any]) -> None:
    """Convert; warnings about the made-up cells are not the point. With `exchange=False` on a file system that cannot exchange names."""
    from sedd.io import outputs
    from sedd.io.convert import convert

    warnings.simplefilter("ignore")
    own = dict(options)
    if not own.pop("exchange", True):
        outputs.exchange = lambda *_: False
    convert(source, output, progress=False, **own)


def run_and_tell(source: str, output: str, options: dict[str, Any], pipe: Any) -> None:
    """Convert, and send "done" or the error."""
    try:
        run(source, output, options)
        pipe.send("done")
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")


def run_and_die(source: str, output: str, options: dict[str, Any], at: int | None, pipe: Any) -> None:
    """Convert, and die as by `kill -9` just before the `at`-th change that it makes under `output`; send each before it is made.

    A change is a file that is opened to be written, a folder that is made, or something that is renamed or deleted. For None
    nobody dies.
    """
    numbers, lock = itertools.count(), threading.Lock()

    def watch(event: str, given: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in _CHANGES) or not str(given[0]).startswith(output):
            return
        with lock:
            pipe.send(f"{event} {str(given[0]).removeprefix(output)}")
            if next(numbers) == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run(source, output, options)
