"""Settings chosen alike for every method, and MAGIC and scVI in an interpreter that need not have sedd.

    OTHER/python benchmarks/truth_methods.py MAGIC task.npz answers.npz

Reads what `truth.py` wrote: counts of all cells, and for each fold which cells are for choosing settings, with what each should look like.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flags import Flags

Run = Callable[[np.ndarray, dict[str, Any]], np.ndarray]
MAGIC = [{"root": root, "t": t, "knn": knn} for root, t, knn in ((False, "auto", 5), (False, 3, 5), (False, 6, 5), (False, 3, 15), (True, "auto", 5), (True, 3, 15))]
SCVI = [
    {"n_latent": n, "n_layers": layers, "gene_likelihood": law}
    for n, layers, law in ((10, 1, "nb"), (5, 2, "nb"), (10, 2, "nb"), (20, 2, "nb"), (10, 2, "zinb"), (10, 3, "nb"))
]


def log_cp10k(x: np.ndarray) -> np.ndarray:
    """Logarithms of shares of the panel, 1 + 10,000 a cell."""
    x = np.asarray(x, np.float64)
    return np.log1p(1e4 * x / np.maximum(x.sum(1, keepdims=True), 1e-12))


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean squared difference."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def tuned(run: Run, settings: Sequence[dict[str, Any]], task: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Denoised counts of all cells, each as a cell that was tested, and the setting of each fold.

    In a fold a setting is judged on validation cells among those of the training: against what others of their mixture, which no method
    sees meanwhile, have together. With it the method is given all cells, and what it makes of the fold's test cells is kept.
    """
    counts, out, chosen = task["counts"], np.zeros(task["counts"].shape), []
    for fold in range(int(task["fold"].max()) + 1):
        seen, validation, target = (task[f"{name}_{fold}"] for name in ("seen", "validation", "target"))
        at = np.searchsorted(seen, validation)
        errors = [0.0] if len(settings) == 1 else [rmse(log_cp10k(run(counts[seen], one)[at]), target) for one in settings]
        best = settings[int(np.argmin(errors))]
        test = task["fold"] == fold
        out[test] = run(counts, best)[test]
        chosen.append(best)
        print(fold, best, [round(e, 4) for e in errors], flush=True)
    return out, chosen


def run_magic(counts: np.ndarray, setting: dict[str, Any]) -> np.ndarray:
    """MAGIC on log1p CP10k or on square roots of shares."""
    import magic

    x = np.sqrt(counts / counts.sum(1, keepdims=True)) if setting["root"] else log_cp10k(counts)
    made = magic.MAGIC(knn=setting["knn"], t=setting["t"], n_pca=50, random_state=0, verbose=0, n_jobs=1).fit_transform(x, genes="all_genes")
    made = np.maximum(np.asarray(made), 0)
    return made**2 if setting["root"] else np.expm1(made)


def run_scvi(counts: np.ndarray, setting: dict[str, Any]) -> np.ndarray:
    """scVI with early stopping on a tenth of the cells; shares averaged over 25 draws of the latent."""
    import anndata
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.seed = 0
    adata = anndata.AnnData(counts.astype(np.float32))
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, **setting)
    stops = {"early_stopping": True, "early_stopping_patience": 20, "check_val_every_n_epoch": 1}
    model.train(max_epochs=400, accelerator="cpu", enable_progress_bar=False, **stops)
    return np.asarray(model.get_normalized_expression(n_samples=25, return_numpy=True))


def main() -> None:
    """Run one peer on all folds."""
    parser = Flags(__doc__)
    parser.add_argument("method", choices=["MAGIC", "scVI"])
    parser.add_argument("task", type=Path)
    parser.add_argument("answers", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    run, settings, package = {"MAGIC": (run_magic, MAGIC, "magic-impute"), "scVI": (run_scvi, SCVI, "scvi-tools")}[args.method]
    with np.load(args.task) as arrays:
        denoised, chosen = tuned(run, settings, dict(arrays))
    np.savez(args.answers, denoised=denoised, chosen=json.dumps(chosen), version=f"{package} {version(package)}")


if __name__ == "__main__":
    main()
