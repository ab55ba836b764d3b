"""What is waited for before work begins: imports, `--help`, and commands on data so small that they are little else.

    python benchmarks/startup.py --against a89df50

Each command is run in a process of its own, by turns in this tree and in that of a commit, `--rounds` times after one that fills the caches of
bytecode and kernels. Seconds by the clock and of the processor, and how many times the commit's they are, round by round, go
to `benchmarks/results/startup.json`, with whether the limits of `LIMITS` are kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, machine, median, summary, trees, with_code_of, write_result
from flags import Flags

COMMANDS = {
    "import sedd": ["-c", "import sedd"],
    "sedd --help": ["-m", "sedd", "--help"],
    "sedd convert --help": ["-m", "sedd", "convert", "--help"],
    "sedd train --help": ["-m", "sedd", "train", "--help"],
    "sedd convert, 2,700 cells": ["-m", "sedd", "convert", "data/pbmc3k.h5ad", "STORE", "--overwrite"],
    "sedd info STORE": ["-m", "sedd", "info", "STORE"],
    "first batch of a loader": ["-c", "import sys, sedd; next(iter(sedd.CellLoader(sys.argv[1], batch_size=64)))", "STORE"],
    "import sedd.tasks": ["-c", "import sedd.tasks"],
}
LIMITS = {"import sedd": 0.2, "sedd --help": 0.5}
"""Seconds by the clock that the median of the rounds may take."""


def cost(words: list[str], tree: Path, store: Path) -> dict[str, float]:
    """Seconds by the clock and of processors that Python takes for `words` with the package of `tree`."""
    own = [sys.executable, *(str(store) if word == "STORE" else word for word in words)]
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(own, cwd=tree, env=with_code_of(tree), capture_output=True, text=True)
    wall, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(own)} failed in {tree}: {done.stderr[-2000:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": round(wall, 3), "cpu": round(used, 3)}


def main() -> None:
    """Time all commands, print a table and write the JSON."""
    parser = Flags(__doc__)
    parser.add_argument("--against", required=True, help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS / "startup.json")
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with trees(args.against) as codes, tempfile.TemporaryDirectory() as scratch:
        for name, words in COMMANDS.items():
            rounds: list[dict[str, Any]] = []
            for number in range(args.rounds + 1):
                order = list(codes)[:: 1 if number % 2 else -1]
                costs = {which: cost(words, codes[which], Path(scratch) / f"{which}.zarr") for which in order}
                rounds.append({
                    which: costs[which] | {f"{unit}_ratio": costs[which][unit] / costs[args.against][unit] for unit in costs[which]}
                    for which in codes
                })  # fmt: skip
            rows[name] = summary(rounds[1:])
            now, then = rows[name]["now"], rows[name][args.against]
            text = [f"{median(one[unit]):.2f} s {unit}" for one in (now, then) for unit in ("wall", "cpu")]
            print(f"{name:26s} {', '.join(text)}; {median(now['cpu_ratio']):.2f} of the processor time", flush=True)
    kept = {name: median(rows[name]["now"]["wall"]) <= most for name, most in LIMITS.items()}
    write_result(args.output, {"machine": machine(), "rounds": args.rounds, "limits": LIMITS, "kept": kept, "rows": rows})
    print(args.output, kept)


if __name__ == "__main__":
    main()
