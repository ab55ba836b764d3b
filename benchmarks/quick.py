"""What the README shows: the quick run, timed, with its metrics beside the baselines and its picture.

    python benchmarks/quick.py        runs ./bash/train_quick.sh three times in a temporary directory

Writes `benchmarks/results/quick.json` and `docs/figures/quick.png`, and puts the table into README.md.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
from common import machine, write_result
from flags import Flags

import sedd

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "pbmc3k.h5ad"
RESULT = ROOT / "benchmarks" / "results" / "quick.json"
ROWS = [
    ("likelihood", "nats_per_cell", "held-out likelihood bound, nats per cell (lower is better)", "NB per gene"),
    ("imputation", "nll", "15 % of genes hidden: negative log score (lower)", "NB, library-scaled"),
    ("imputation", "mae", "15 % hidden: mean absolute error (lower)", "gene mean (Poisson)"),
    ("imputation", "rmse_log1p", "15 % hidden: RMSE of log1p (lower)", "gene mean (Poisson)"),
    ("generation", "w2", "generated cells: Gaussian W2 (lower; real cells {real})", None),
    ("generation", "auc", "generated cells: real-or-fake AUC (0.5 is best; real cells {real})", None),
]


def run(directory: Path) -> tuple[float, float]:
    """Run the script and return its seconds, by the clock and of the processor."""
    began, worked = time.perf_counter(), _children()
    environment = {**os.environ, "OUTPUT": str(directory)}
    subprocess.run([ROOT / "bash" / "train_quick.sh"], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began, _children() - worked


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def picture(directory: Path) -> None:
    """Draw four figures of the report side by side."""
    made = {"imputed": directory / "imputed.h5ad", "generated": directory / "generated.h5ad"}
    only = ["validation_nelbo", "predicted_against_true", "gene_mean", "cells"]
    axes = sedd.pl.report(directory, DATA, only=only, columns=2, **made, n_masks=1, steps=(), progress=False)
    target = ROOT / "docs" / "figures" / "quick.png"
    target.parent.mkdir(exist_ok=True)
    axes["cells"].figure.savefig(target, dpi=110)


def table(result: dict[str, Any]) -> str:
    """The rows of the README."""
    lines = ["| on held-out cells | sedd | gene marginals | another baseline | all zeros |", "|---|---|---|---|---|"]
    for section, metric, title, other in ROWS:
        row = result["metrics"][section][metric]
        base = row["baselines"]
        real = row.get("anchors", {}).get("real cells", "")
        cells = [
            f"**{row['sedd']:.4g}**",
            f"{base['gene marginals']:.4g}" if "gene marginals" in base else "",
            f"{base[other]:.4g} ({other})" if other else "",
            f"{base['all zeros']:.4g}" if "all zeros" in base else "",
        ]
        lines.append("| " + " | ".join([title.format(real=f"{real:.3g}" if real != "" else ""), *cells]) + " |")
    seconds = result["seconds"]
    lines += [
        "",
        f"PBMC 3k, 2,000 genes, 270 held-out cells, {len(result['history'])} epochs. The whole script takes "
        f"{result['processor_seconds']['median']:.0f} s of processor time (median of {len(seconds['all'])} runs), here {min(seconds['all']):.0f} to "
        f"{max(seconds['all']):.0f} s by the clock on two cores that did other work as well,",
        "with the environment built. Made by `benchmarks/quick.py`, kept with the machine in `benchmarks/results/quick.json`.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run, record, draw and fill in the README."""
    parser = Flags(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    matplotlib.use("agg")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "quick"
        seconds, worked = zip(*(run(directory) for _ in range(repeats)), strict=True)
        result = {
            "command": "./bash/train_quick.sh",
            "machine": machine(),
            "seconds": {"median": statistics.median(seconds), "all": seconds},
            "processor_seconds": {"median": statistics.median(worked), "all": worked},
            "settings": json.loads((directory / "args.json").read_text()),
            "history": json.loads((directory / "history.json").read_text()),
            "metrics": json.loads((directory / "metrics.json").read_text()),
        }
        for name in ("data_path", "checkpoint_dir", "cache_dir"):
            del result["settings"][name]
        write_result(RESULT, result)
        picture(directory)
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition("<!-- results -->")
    after = rest.partition("<!-- end of results -->")[2] or rest
    readme.write_text(f"{before}<!-- results -->\n{table(result)}\n<!-- end of results -->{after}")
    print(table(result))


if __name__ == "__main__":
    sys.exit(main())
