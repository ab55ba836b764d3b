"""`python -m sedd` is the `sedd` command."""

import gc
import os
import signal
import sys
from collections.abc import Sequence


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command that the program was called with, or these words, and exit."""
    _prepare_streams()
    # Python looks for cyclic garbage after every 700 new objects, and imports make a million that stay.
    gc.set_threshold(100_000, 20, 20)
    from sedd.cli import main

    status = 128 + signal.SIGPIPE  # unless the command ends before it notices that the reader of its output, such as `head`, went away
    try:
        status = main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    gc.freeze()  # what is left goes with the process; looking through it takes a quarter of a second
    sys.exit(status)


def _prepare_streams() -> None:
    """Make standard streams that every part of a command may write to, in any surroundings."""
    # Start again in UTF-8: columns of obs are names of files in a store. Once: `python -E` and `-X utf8=0` do not look at the variable.
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by `2>&-`: the next file that is opened would be in its place
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
        elif number and stream.errors == "strict":  # what a terminal has no letter for is printed as \u03b2
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    run()
