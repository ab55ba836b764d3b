"""Interferon on real cells: the response of a cell type whose stimulated cells were left out of training.

    python benchmarks/perturbation_real.py --data kang_pbmc_ifnb.h5ad

Data: PBMC of Kang et al. 2018 (GSE96583), control and stimulated with interferon beta, cells x genes with `obs["condition"]` of two labels, the one to leave out
given by `--stimulated`. Cells are named by marker genes that interferon hardly changes, as written below. In each round the stimulated cells of one type
are held out and half of its control cells, which its changes are measured against. sedd is trained on the rest with two `--condition` columns (quick
settings but 1,000 steps, none chosen), and answers in two ways: new cells of the type under either condition, and the type's other control cells denoised as if they were stimulated, against
the same as if they were not. Score: agreement over genes of the change of the logarithm of mean CP10k with that of the real cells, by the functions of
`perturbation.py`, whose simple methods are the peers. scGen 2.1.0 does not import beside scvi-tools 1.4. Writes `benchmarks/results/perturbation_real.json`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import yaml
from common import RESULTS, machine, write_result
from flags import Flags
from perturbation import change, level, score
from scipy import sparse

import sedd

QUICK = Path(__file__).resolve().parent.parent / "configs" / "quick.yaml"
MARKERS = {
    "CD14 monocytes": ["LYZ", "CD14", "S100A9", "S100A8", "FTL", "CST3"],
    "FCGR3A monocytes": ["FCGR3A", "VMO1", "TYROBP", "CST3"],
    "B cells": ["CD79A", "HLA-DQA1", "CD74", "HLA-DRA"],
    "NK and cytotoxic T cells": ["GNLY", "NKG7", "CCL5", "GZMB", "KLRD1"],
    "CD4 T cells": ["CCR7", "LTB", "SELL"],
}
FEWEST = 25
"""Cells of a type under each condition, for it to be left out."""


def named(counts: np.ndarray, genes: np.ndarray, condition: np.ndarray) -> np.ndarray:
    """The type whose markers stand out most from their mean under the same condition."""
    logs = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    for one in np.unique(condition):
        rows = condition == one
        logs[rows] = (logs[rows] - logs[rows].mean(0)) / np.maximum(logs[rows].std(0), 1e-6)
    at = {gene: i for i, gene in enumerate(genes)}
    scores = np.stack([logs[:, [at[gene] for gene in markers if gene in at]].mean(1) for markers in MARKERS.values()], 1)
    return np.array(list(MARKERS))[scores.argmax(1)]


def measure(adata: ad.AnnData, stimulated: str, left_out: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Leave one type's stimulated cells out, predict them by each method."""
    counts = adata.X.toarray().astype(np.float64)
    kind, condition = adata.obs["kind"].to_numpy(str), adata.obs["condition"].to_numpy(str)
    treated = condition == stimulated
    rng = np.random.default_rng(seed)
    own = rng.permutation(np.flatnonzero((kind == left_out) & ~treated))
    apart, own = np.array_split(own, 2)
    real = np.flatnonzero((kind == left_out) & treated)
    seen = np.ones(len(counts), bool)
    seen[apart] = seen[real] = False
    truth = change(level(counts[real]), level(counts[apart]))

    # What simple methods know: the change of the other types, and the type's control cells.
    others = [k for k in np.unique(kind) if k != left_out and min(((kind == k) & seen & t).sum() for t in (treated, ~treated)) >= FEWEST]
    of = {(k, t): level(counts[seen & (kind == k) & (treated == t)]) for k in others for t in (True, False)}
    base = level(counts[own])
    first, second = np.array_split(own, 2)
    guesses = {
        "no change": change(level(counts[first]), level(counts[second])),
        "mean of the other types' changes": np.mean([change(of[k, True], of[k, False]) for k in others], axis=0),
        "additive shift of the other types": change(np.maximum(base + np.mean([of[k, True] - of[k, False] for k in others], axis=0), 0), base),
    }
    settings = {**yaml.safe_load(QUICK.read_text()), "genes": "all", "condition": ["kind", "condition"], "log_with": "none", "seed": seed, "min_steps": 1000}
    model = sedd.train(adata[seen].copy(), checkpoint_dir=folder / f"{left_out} {seed}", val_fraction=0.1, **settings)
    assert model is not None
    (control,) = set(condition) - {stimulated}
    order = model_order(model, adata)
    made = [sedd.generate(model, 300, where={"kind": left_out, "condition": c}, seed=seed, progress=False).X.toarray()[:, order] for c in (stimulated, control)]
    guesses["sedd generate"] = change(level(made[0]), level(made[1]))
    turned = [sedd.denoise(model, adata[own].copy(), as_if={"condition": c}, progress=False).X[:, order] for c in (stimulated, control)]
    guesses["sedd denoise --as_if"] = change(level(turned[0]), level(turned[1]))
    a, b = np.array_split(rng.permutation(real), 2)
    c, d = np.array_split(apart, 2)
    head = {"seed": seed, "left out": left_out, "cells": len(real)}
    records = [{**head, "method": name, **score(truth, guess)} for name, guess in guesses.items()]
    halves = score(change(level(counts[a]), level(counts[c])), change(level(counts[b]), level(counts[d])))
    return [*records, {**head, "method": "real cells, half against half (anchor)", **halves}]


def model_order(model: sedd.Pretrained, adata: ad.AnnData) -> np.ndarray:
    """Where each gene of the data is in the model's panel."""
    place = {gene: i for i, gene in enumerate(model.genes)}
    return np.array([place[gene] for gene in adata.var_names])


def main() -> None:
    """Run all types and seeds, write."""
    parser = Flags(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stimulated", help="label of the cells to leave out", default="stim")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=RESULTS / "perturbation_real.json")
    args = parser.parse_args()
    adata = ad.read_h5ad(args.data)
    adata.X = sparse.csr_matrix(adata.X).astype(np.float32)
    condition = adata.obs["condition"].astype(str)
    if args.stimulated not in set(condition):
        raise SystemExit(f"--stimulated {args.stimulated}: obs['condition'] has {sorted(set(condition))}.")
    adata.obs["condition"] = condition.to_numpy()
    adata.obs["kind"] = named(adata.X.toarray(), adata.var_names.to_numpy(str), condition.to_numpy(str))
    sizes = pd.crosstab(adata.obs["kind"], adata.obs["condition"])
    print(sizes, flush=True)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in sizes.index[sizes.min(1) >= FEWEST]:
            for seed in args.seeds:
                records += measure(adata, args.stimulated, kind, seed, Path(folder))
    frame = pd.DataFrame(records)
    numbers = ["pearson", "spearman", "rmse"]
    summary = frame.groupby("method")[numbers].mean().sort_values("pearson", ascending=False)
    by_kind = frame.groupby(["method", "left out"])["pearson"].mean().unstack().loc[summary.index]
    content = {"machine": machine(("sedd", "torch", "numpy", "scikit-learn")), "sizes": {k: dict(v) for k, v in sizes.astype(int).to_dict("index").items()}}
    write_result(args.output, {**content, "seeds": args.seeds, "summary": summary.reset_index().to_dict("records"), "records": records})
    both = pd.concat([summary, by_kind], axis=1)
    print("| | " + " | ".join(map(str, both.columns)) + " |\n|---|" + "---|" * both.shape[1])
    for name, row in both.iterrows():
        print(f"| {name} | " + " | ".join(f"{v:.3f}" for v in row) + " |")


if __name__ == "__main__":
    main()
