"""Perturbations that a cell type was never seen under: are the changes that the model generates those of real cells?

    python benchmarks/perturbation.py --data data/pbmc3k.h5ad

The cells are real, the perturbations are simulated, because no data set with such a column is at hand. Cells fall into four
groups (k-means) and, at random, into a control and three perturbations. A perturbation activates two of three programs of
genes and a group responds to each program more or less, so what a perturbation does depends on the group, and can be known
from the other perturbations of the group and the other groups under the perturbation. Expression falls by binomial thinning and
rises by a Poisson number of new molecules.

Three pairs of group and perturbation are held out, and with them half of the control cells of these groups, which the changes of
real cells are measured against: changes that share their control cells agree by its noise alone. sedd is trained on the
rest with two `--condition` columns and generates the pairs. Score: correlation, over genes, of the log fold change of mean
CP10k with that of the real held-out cells. Writes `benchmarks/results/perturbation.json`.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from common import machine, write_result
from flags import Flags
from scipy import sparse
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from sedd import metrics as m
from sedd.cli import main as sedd
from sedd.tasks import generate

ROOT = Path(__file__).resolve().parent.parent
GROUPS, PROGRAMS, PROGRAM_GENES = 4, 3, 100
PERTURBATIONS = {"A": (0, 1), "B": (1, 2), "C": (0, 2)}  # the programs that each activates
SIZE = 0.8  # standard deviation of a gene's log fold change in a program
ENOUGH = 5.0  # mean CP10k, of perturbed or control cells, from which a gene is scored; also added before the logarithm
STEPS, CELLS = 64, 200
FLAGS = ["--genes", "all", "--num_bins", "128", "--batch_size", "16", "--learning_rate", "2e-4", "--ema_decay", "0.995"]
FLAGS += ["--warmup_steps", "50", "--hidden_dim", "128", "--num_layers", "3", "--num_heads", "4", "--num_latents", "1"]
FLAGS += ["--val_fraction", "0.05", "--num_threads", "1", "--log_with", "none"]


class Law:
    """What each perturbation does to each group, as log fold changes, (n_vars,) each."""

    def __init__(self, mean: np.ndarray, rng: np.random.Generator) -> None:
        often = np.flatnonzero(mean.mean(0) > 0.05)
        self.programs = np.zeros((PROGRAMS, mean.shape[1]))
        for program in self.programs:
            program[rng.choice(often, PROGRAM_GENES, replace=False)] = rng.normal(0, SIZE, PROGRAM_GENES)
        self.response = rng.uniform(0, 2, (GROUPS, PROGRAMS))
        self.mean = mean

    def apply(self, counts: np.ndarray, group: int, perturbation: str, rng: np.random.Generator) -> np.ndarray:
        """Perturb cells of a group."""
        change = sum(self.response[group, k] * self.programs[k] for k in PERTURBATIONS[perturbation])
        fewer = rng.binomial(counts, np.exp(np.minimum(change, 0)))
        rate = np.outer(counts.sum(1), self.mean[group] / self.mean[group].sum())
        return np.asarray(fewer + rng.poisson(rate * np.expm1(np.maximum(change, 0))))


def simulate(counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, Law]:
    """Perturb real cells: counts, group and condition of each, and the law."""
    places = PCA(20, random_state=0).fit_transform(m.log_cp10k(sparse.csr_array(counts)))
    group = KMeans(GROUPS, n_init=10, random_state=0).fit_predict(places)
    law = Law(np.stack([counts[group == g].mean(0) for g in range(GROUPS)]), rng)
    condition = rng.choice(["control", *PERTURBATIONS], len(counts), p=[0.4, 0.2, 0.2, 0.2])
    out = counts.copy()
    for g in range(GROUPS):
        for name in PERTURBATIONS:
            rows = (group == g) & (condition == name)
            out[rows] = law.apply(counts[rows], g, name, rng)
    return out, group, condition, law


def level(cells: np.ndarray) -> np.ndarray:
    """Mean CP10k of each gene."""
    return np.asarray((1e4 * cells / np.maximum(cells.sum(1, keepdims=True), 1)).mean(0))


def change(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Log fold change of levels."""
    return np.log((after + ENOUGH) / (before + ENOUGH))


def predictions(
    cells: np.ndarray, group: np.ndarray, condition: np.ndarray, pair: tuple[int, str], seen: np.ndarray
) -> dict[str, np.ndarray]:
    """The changes that simple methods expect for a pair that was not seen."""

    def of(g: int, name: str) -> np.ndarray:
        return level(cells[seen & (group == g) & (condition == name)])

    g, name = pair
    others = [h for h in range(GROUPS) if h != g and (seen & (group == h) & (condition == name)).any()]
    control = {h: of(h, "control") for h in range(GROUPS)}
    shift = np.mean([of(h, name) - control[h] for h in others], axis=0)
    effect = {
        (h, p): change(of(h, p), control[h])
        for h in range(GROUPS)
        for p in PERTURBATIONS
        if (seen & (group == h) & (condition == p)).any()
    }
    alike = [p for p in PERTURBATIONS if (g, p) in effect]
    own = np.mean(
        [effect[g, p] - np.mean([effect[h, p] for h in others if (h, p) in effect], axis=0) for p in alike], axis=0
    )
    mean = np.mean([effect[h, name] for h in others], axis=0)
    rng = np.random.default_rng(0)
    rows = rng.permutation(np.flatnonzero(seen & (group == g) & (condition == "control")))
    first, second = np.array_split(rows, 2)
    return {
        "no effect": change(level(cells[first]), level(cells[second])),
        "additive shift of the other groups": change(np.maximum(control[g] + shift, 0), control[g]),
        "mean effect in the other groups": mean,
        "mean effect, and the group's mean deviation": mean + own,
    }


def score(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """How well changes agree."""
    return {
        "pearson": float(np.corrcoef(expected, found)[0, 1]),
        "spearman": float(spearmanr(expected, found).statistic),
        "rmse": float(np.sqrt(np.mean((expected - found) ** 2))),
    }


def panel(adata: ad.AnnData, n_genes: int) -> np.ndarray:
    """The most variable genes, before anything is perturbed: counts, (n_obs, n_genes) int64."""
    seen = adata[:, np.asarray((adata.X > 0).sum(0)).ravel() >= 3].copy()
    sc.pp.highly_variable_genes(seen, flavor="seurat_v3", n_top_genes=n_genes)
    return np.asarray(seen[:, seen.var["highly_variable"]].X.toarray().astype(np.int64))


def measure(counts: np.ndarray, seed: int, epochs: int, folder: Path) -> list[dict[str, Any]]:
    """Simulate, train, generate and score for one seed."""
    rng = np.random.default_rng(seed)
    cells, group, condition, law = simulate(counts, rng)
    pairs = list(zip(rng.permutation(GROUPS)[: len(PERTURBATIONS)].tolist(), PERTURBATIONS, strict=True))
    seen = np.ones(len(cells), bool)
    reference = {}
    for g, name in pairs:
        seen[(group == g) & (condition == name)] = False
        rows = rng.permutation(np.flatnonzero((group == g) & (condition == "control")))
        reference[g] = rows[: len(rows) // 2]
        seen[reference[g]] = False
    obs = pd.DataFrame(
        {"group": [f"group {g}" for g in group], "perturbation": condition}, index=np.arange(len(cells)).astype(str)
    )
    ad.AnnData(sparse.csr_matrix(cells[seen].astype(np.float32)), obs=obs[seen]).write_h5ad(
        folder / f"train_{seed}.h5ad"
    )
    run = str(folder / f"run_{seed}")
    argv = [
        "train",
        "--data_path",
        str(folder / f"train_{seed}.h5ad"),
        "--checkpoint_dir",
        run,
        "--num_epochs",
        str(epochs),
    ]
    if sedd([*argv, "--seed", str(seed), "--condition", "group", "perturbation", *FLAGS]):
        raise RuntimeError("the training failed")
    records = []
    for g, name in pairs:
        real = cells[~seen & (group == g) & (condition == name)]
        own = cells[seen & (group == g) & (condition == "control")]
        again = np.random.default_rng([seed, g])
        base = level(cells[reference[g]])
        guesses = predictions(cells, group, condition, (g, name), seen)
        after, before = (generated(run, f"group {g}", p, seed) for p in (name, "control"))
        guesses["sedd"] = change(level(after), level(before))
        guesses["the law, on other cells (anchor)"] = change(level(law.apply(own, g, name, again)), level(own))
        scored = np.maximum(level(real), base) > ENOUGH
        truth = change(level(real), base)[scored]
        found = {method: score(truth, guess[scored]) for method, guess in guesses.items()}
        halves = [np.array_split(again.permutation(rows), 2) for rows in (np.arange(len(real)), reference[g])]
        split = [change(level(real[a]), level(cells[b]))[scored] for a, b in zip(*halves, strict=True)]
        found["real cells, half against half (anchor)"] = score(*split)
        head = {"seed": seed, "group": g, "perturbation": name, "cells": len(real), "genes": int(scored.sum())}
        records += [{**head, "method": method, **values} for method, values in found.items()]
        print(json.dumps(records[-len(found) :], indent=1), flush=True)
    return records


def generated(run: str, group: str, perturbation: str, seed: int) -> np.ndarray:
    """New cells of a group under a perturbation."""
    where = {"group": group, "perturbation": perturbation}
    made = generate(run, CELLS, where=where, num_steps=STEPS, seed=seed, progress=False)
    return np.asarray(made.X.toarray())


def write(output: Path, records: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the records with their means over seeds and pairs, and print those."""
    frame = pd.DataFrame(records)
    means = frame.groupby("method")[["pearson", "spearman", "rmse"]].mean().sort_values("pearson", ascending=False)
    spread = frame.groupby(["method", "seed"])["pearson"].mean().groupby("method").std(ddof=0)
    summary = [{"method": name, **row, "pearson_std_over_seeds": spread[name]} for name, row in means.iterrows()]
    result = {"machine": machine(("sedd", "torch", "numpy", "scikit-learn")), "settings": settings, "summary": summary, "records": records}
    write_result(output, result)
    for row in summary:
        pearson = f"{row['pearson']:.3f} ± {row['pearson_std_over_seeds']:.3f}"
        print(f"| {row['method']} | {pearson} | {row['spearman']:.3f} | {row['rmse']:.3f} |")


def main() -> None:
    """Run all seeds."""
    parser = Flags(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "pbmc3k.h5ad")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_epochs", type=int, default=12)
    parser.add_argument("--n_genes", type=int, default=600)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "perturbation.json")
    args = parser.parse_args()
    counts = panel(ad.read_h5ad(args.data), args.n_genes)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            records += measure(counts, seed, args.num_epochs, Path(folder))
    settings = {"data": args.data.name, "cells": len(counts), "genes": args.n_genes, "num_epochs": args.num_epochs}
    settings |= {"flags": FLAGS, "num_steps": STEPS, "cells_generated": CELLS, "seeds": args.seeds, "date": datetime.date.today().isoformat()}
    write(args.output, records, settings)


if __name__ == "__main__":
    main()
