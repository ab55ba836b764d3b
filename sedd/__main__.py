"""`python -m sedd` is the `sedd` command."""

import gc
import sys


def run() -> None:
    """Run the command that the program was called with, and exit."""
    # Python looks for cyclic garbage after every 700 new objects, and imports make a million that stay.
    gc.set_threshold(100_000, 20, 20)
    from sedd.cli import main

    status = main()
    gc.freeze()  # what is left goes with the process; looking through it takes a quarter of a second
    sys.exit(status)


if __name__ == "__main__":
    run()
