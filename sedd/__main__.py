"""`python -m sedd` is the `sedd` command."""

import gc
import os
import sys


def run() -> None:
    """Run the command that the program was called with, and exit."""
    _prepare_streams()
    # Python looks for cyclic garbage after every 700 new objects, and imports make a million that stay.
    gc.set_threshold(100_000, 20, 20)
    from sedd.cli import main

    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 0
    gc.freeze()  # what is left goes with the process; looking through it takes a quarter of a second
    sys.exit(status)


def _prepare_streams() -> None:
    """Make standard streams that every part of a command may write to, in any surroundings."""
    if sys.getfilesystemencoding() != "utf-8":  # start again in UTF-8: columns of obs are names of files in a store
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
