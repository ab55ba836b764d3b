"""The picture of two marker genes before and after denoising, of the quick run's own model.

    ./bash/train_quick.sh
    python benchmarks/markers.py experiments/quick

Both genes are markers of B cells, so cells have both or neither; most counts of them are lost. Left: counts as measured, in log1p of counts per
10,000. Right: `sedd denoise` of the same cells. Writes `docs/figures/markers.png` and `benchmarks/results/markers.json`.
"""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import matplotlib
import numpy as np
from common import RESULTS, machine, write_result
from flags import Flags
from matplotlib.figure import Figure
from scipy import sparse, stats

from sedd import Pretrained, denoise
from sedd.report import figures
from sedd.shipped import shipped

ROOT = Path(__file__).resolve().parent.parent
GENES = ("CD79A", "MS4A1")


def log_cp10k(values: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return log1p of counts per 10,000."""
    return np.log1p(values * 1e4 / totals[:, None])


def main() -> None:
    """Denoise, measure, draw."""
    parser = Flags(__doc__)
    parser.add_argument("run", type=Path, help="the directory of the quick run")
    args = parser.parse_args()
    matplotlib.use("agg")
    model = Pretrained.load(args.run)
    after = denoise(model, ad.read_h5ad(shipped("pbmc3k.h5ad")))
    found = {"measured": after.layers["counts"], "denoised": after.X}
    dense = {name: np.asarray(matrix.toarray() if sparse.issparse(matrix) else matrix, float) for name, matrix in found.items()}
    pairs = {
        name: log_cp10k(values[:, [after.var_names.get_loc(gene) for gene in GENES]], values.sum(1)) for name, values in dense.items()
    }
    result = {
        "machine": machine(), "genes": GENES, "cells": after.n_obs,
        "both_measured": int((pairs["measured"] > 0).all(1).sum()), "either_measured": int((pairs["measured"] > 0).any(1).sum()),
        "spearman": {name: float(stats.spearmanr(*pair.T).statistic) for name, pair in pairs.items()},
    }  # fmt: skip
    write_result(RESULTS / "markers.json", result)
    with figures.style():
        figure = Figure(figsize=(7.5, 3.3), layout="constrained")
        for axes, (name, pair) in zip(figure.subplots(1, 2), pairs.items(), strict=True):
            axes.scatter(*pair.T, s=5, alpha=0.4, linewidths=0)
            axes.set(title=name, xlabel=f"{GENES[0]}, log1p(CP10k)", ylabel=GENES[1])
        figure.savefig(ROOT / "docs" / "figures" / "markers.png", dpi=110)
    print(result)


if __name__ == "__main__":
    main()
