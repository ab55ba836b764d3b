"""Train, kill, resume, append, denoise and verify on one store, over and over: does anything grow, does anything break?

    python benchmarks/soak.py --minutes 30 --work FOLDER

Training runs in processes that are killed at random moments and resumed; the rest runs in this one, whose memory, descriptors and threads are
counted after each round, as are files that are left in FOLDER beside those that belong there. Adds to `benchmarks/results/soak.json`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from common import RESULTS, machine, write_result
from flags import Flags

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    *("--genes", "all", "--hidden_dim", "32", "--num_layers", "1", "--num_heads", "2", "--num_latents", "1", "--num_threads", "1"),
    *("--log_with", "none", "--checkpoint_every", "20", "--batch_size", "32"),
]


def some_cells(path: Path, n: int, seed: int) -> str:
    """Write a file of new cells."""
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(rng.negative_binomial(0.5, 0.2, (n, 200)).astype(np.float32))
    obs = pd.DataFrame({"batch": pd.Categorical([f"b{seed}"] * n)}, index=[f"{seed}-{k}" for k in range(n)])
    ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{k}" for k in range(200)])).write_h5ad(path)
    return str(path)


def counted(work: Path) -> dict[str, int]:
    """What this process holds, and what lies in `work`."""
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "resident_mib": resident >> 20, "descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
        "os_threads": len(os.listdir("/proc/self/task")), "left_over": sum(".part" in path.name or ".tmp" in path.name for path in work.rglob("*")),
    }  # fmt: skip


def train(store: str, run: Path, epochs: int, kill_after: float | None) -> str:
    """Train in a process, killed after some seconds or left alone; how it ended."""
    words = [sys.executable, "-m", "sedd", "train", "--data_path", store, "--checkpoint_dir", str(run), *FLAGS, "--num_epochs", str(epochs), "--resume", "auto"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return "killed"
    if process.returncode:
        raise SystemExit(f"training failed: {said[-2000:]}")
    return "ended"


def main() -> None:
    """Go round until the time is over."""
    parser = Flags(__doc__)
    parser.add_argument("--minutes", help="minutes to go on for", type=float, default=30)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS / "soak.json")
    args = parser.parse_args()
    from sedd.io.convert import convert
    from sedd.io.verify import verify
    from sedd.tasks import denoise

    warnings.simplefilter("ignore")
    args.work.mkdir(parents=True, exist_ok=True)
    rng, rounds, end = random.Random(0), [], time.monotonic() + 60 * args.minutes
    store, run = str(args.work / "s.zarr"), args.work / "run"
    inputs = [some_cells(args.work / "0.h5ad", 1500, 0)]
    convert(inputs, store, progress=False, overwrite=True)
    while time.monotonic() < end:
        number = len(rounds) + 1
        ends = [train(store, run, 2 * number, rng.uniform(2, 9)) for _ in range(2)] + [train(store, run, 2 * number, None)]
        made: Any = denoise(run, inputs[0], output=args.work / "denoised.h5ad", overwrite=True, progress=False)
        inputs.append(some_cells(args.work / f"{number}.h5ad", 100, number))
        grown = convert([inputs[-1]], store, append=True, progress=False)
        assert grown.n_obs == 1500 + 100 * number
        verify(store, against=inputs, progress=False)
        del made, grown
        rounds.append({"trainings": ends, "steps": len(list(run.glob("*.pt"))), **counted(args.work)})
        print(number, rounds[-1], flush=True)
    first, last = rounds[len(rounds) // 3], rounds[-1]
    growth = {name: last[name] - first[name] for name in ("resident_mib", "descriptors", "threads", "os_threads", "left_over")}
    write_result(args.output, {"minutes": args.minutes, "rounds": rounds, "growth from a third on": growth, "machine": machine()})
    print(growth)
    shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
