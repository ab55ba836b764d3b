"""The curves of a hundred epochs of each model size with its default learning rate and batch size, on the shipped PBMC 3k.

    python benchmarks/curves.py --work experiments/curves --sizes small
    python benchmarks/curves.py --work experiments/curves --sizes medium large --genes 1000 --limit_cells 675

A size is a run of `sedd train` in `WORK/SIZE`; one that was interrupted goes on, one that is finished is only read. What every run
was given and came to is written to `benchmarks/results/curves.json`, in place of the sizes it repeats, and drawn in
`docs/figures/curves.png`: nats per training and per held-out cell.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import write_result
from flags import Flags

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "curves.json"
SETTINGS = ("model", "learning_rate", "batch_size", "warmup_steps", "ema_decay", "dropout", "genes", "limit_cells", "num_epochs", "seed")
CAME_TO = ("step", "train_loss", "val_nelbo", "val_mae")


def train(args: argparse.Namespace, size: str) -> None:
    """Run `sedd train` for a size to the end."""
    limits = ["--genes", args.genes, *([] if args.limit_cells is None else ["--limit_cells", str(args.limit_cells)])]
    words = ["--data_path", args.data, "--cache_dir", str(args.work), "--checkpoint_dir", str(args.work / size)]
    more = ["--model", size, "--num_threads", "1", "--log_with", "none", "--resume", "auto", "--checkpoint_every", "10min"]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *words, *more, *limits], check=True)


def collect(directory: Path) -> dict[str, Any]:
    """What a run was given and came to."""
    settings = json.loads((directory / "args.json").read_text())
    history = json.loads((directory / "history.json").read_text())
    best = min(history, key=lambda entry: entry["val_nelbo"])
    return {
        "settings": {name: settings[name] for name in SETTINGS},
        "epochs": len(history),
        "best_epoch": best["epoch"],
        "best_val_nelbo": best["val_nelbo"],
        "last_val_nelbo": history[-1]["val_nelbo"],
        "largest_rise_of_train_loss": max(b["train_loss"] - a["train_loss"] for a, b in pairwise(history)),
        "curve": {name: [round(entry[name], 4) for entry in history] for name in CAME_TO},
    }


def plot(runs: dict[str, Any], path: Path) -> None:
    """Draw the curves, one panel a run."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4 * len(runs), 3.2), layout="constrained")
    for axis, (name, run) in zip(axes if len(runs) > 1 else [axes], runs.items(), strict=True):
        settings, epochs = run["settings"], range(1, run["epochs"] + 1)
        axis.plot(epochs, run["curve"]["train_loss"], color="0.6", linewidth=1, label="training cells, own noise levels")
        axis.plot(epochs, run["curve"]["val_nelbo"], color="#0b6e99", label="held-out cells, averaged weights")
        axis.plot(run["best_epoch"], run["best_val_nelbo"], "o", color="#0b6e99", markersize=4)
        cells = "" if settings["limit_cells"] is None else f", {settings['limit_cells']:,} cells"
        axis.set_title(f"{name}: {settings['learning_rate']:g}, batches of {settings['batch_size']}{cells}", fontsize=9)
        axis.set_xlabel("epoch")
    first = axes[0] if len(runs) > 1 else axes
    first.set_ylabel("nats per cell")
    first.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train what is not trained yet, then write and draw."""
    parser = Flags(__doc__)
    parser.add_argument("--data", default=str(ROOT / "data" / "pbmc3k.h5ad"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["small", "medium", "large"])
    parser.add_argument("--genes", default="2000")
    parser.add_argument("--limit_cells", type=int)
    parser.add_argument("--figure", default=str(ROOT / "docs" / "figures" / "curves.png"))
    args = parser.parse_args()
    runs = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for size in args.sizes:
        train(args, size)
        runs[size] = collect(args.work / size)
    write_result(RESULT, runs)
    if args.figure:
        plot(runs, Path(args.figure))


if __name__ == "__main__":
    main()
