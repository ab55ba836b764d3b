"""Denoising where the truth is known: RNA of three cell lines mixed in known proportions and measured by two protocols.

    python benchmarks/truth.py --data mixology_rnamix.h5ad --other mixology_rnamix_sortseq.h5ad --peer_python PEERS/bin/python

Data: Tian et al. 2019 (github.com/LuyiTian/sc_mixology, `data/csv`) as AnnData, cells x genes, with `obs` columns of the proportions (H2228, H1975,
HCC827), of the `mix` and of the amount of RNA, `mRNA_pg`. `--peer_python` has scvi-tools and magic-impute; `--methods` chooses, and what is in `--work` is used again.

Five folds: sedd is trained on four (settings of `configs/quick.yaml`, but 1,000 steps; none chosen), every method denoises all cells, and what it makes of the fifth
is scored. Peers' settings are chosen among six in each fold, see `truth_methods.tuned`; ALRA has none. The panel is of the 2,000 most variable genes of
the first fold's training cells. The truth of a cell are the counts of its mixture by the other protocol, pooled, over the genes that both have; and, beside it,
those of the same protocol's 30 pg training cells, which kNN averages. No setting was chosen on either. Then use: proportions recovered, clusters, markers,
differences between lines at 3.75 pg against those at 30 pg, and false differences between random halves of a line. Writes `benchmarks/results/truth.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scanpy as sc
import yaml
from common import RESULTS, machine, write_result
from flags import Flags
from quality_methods import alra, knn_denoise
from scipy import sparse
from scipy.optimize import nnls
from scipy.stats import ttest_ind
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from truth_methods import log_cp10k, rmse, tuned

import sedd

LINES, AMOUNTS, FOLDS, STEPS = ["H2228", "H1975", "HCC827"], (3.75, 7.5, 15.0, 30.0), 5, 1000
METHODS = ["kNN", "ALRA", "MAGIC", "scVI", "sedd"]
KNN = [{"k": k, "root": root} for k in (10, 30, 60) for root in (False, True)]
QUICK = Path(__file__).resolve().parent.parent / "configs" / "quick.yaml"
Task = dict[str, Any]


def pooled(counts: np.ndarray, mix: np.ndarray) -> dict[int, np.ndarray]:
    """Logarithm of the pooled counts of each mixture."""
    return {int(k): log_cp10k(counts[mix == k].sum(0, keepdims=True))[0] for k in np.unique(mix)}


def prepare(data: Path, other: Path, n_genes: int) -> Task:
    """Folds, panel, truths, and cells to choose settings on."""
    cells, others = ad.read_h5ad(data), ad.read_h5ad(other)
    whole = sparse.csr_matrix(cells.X).astype(np.float32)
    mix, amount = cells.obs["mix"].to_numpy(int), cells.obs["mRNA_pg"].to_numpy(float)
    rng = np.random.default_rng(0)
    fold = np.empty(len(mix), int)
    fold[rng.permutation(len(mix))] = np.arange(len(mix)) % FOLDS
    first = ad.AnnData(whole[fold != 0], var=cells.var[[]])
    first = first[:, np.asarray((first.X > 0).sum(0)).ravel() >= 3].copy()
    sc.pp.highly_variable_genes(first, flavor="seurat_v3", n_top_genes=n_genes)
    genes = first.var_names[first.var["highly_variable"]].to_numpy(str)
    counts = np.asarray(cells[:, genes].X.todense() if sparse.issparse(cells.X) else cells[:, genes].X, np.float64)
    shared = np.isin(genes, others.var_names)
    theirs = others[:, genes[shared]].X
    theirs = np.asarray(theirs.todense() if sparse.issparse(theirs) else theirs, np.float64)
    by_other = pooled(theirs, others.obs["mix"].to_numpy(int))
    task: Task = {"counts": counts, "fold": fold, "genes": genes, "shared": shared, "mix": mix, "amount": amount}
    task["proportions"] = cells.obs[LINES].to_numpy(float)
    task["truth"] = np.stack([by_other[k] for k in mix])
    task["same"] = np.zeros_like(task["truth"])
    for f in range(FOLDS):
        train = np.flatnonzero(fold != f)
        deep = train[amount[train] == 30]
        same = pooled(counts[deep][:, shared], mix[deep])
        task["same"][fold == f] = np.stack([same[k] for k in mix[fold == f]])
        apart, validation, rest = np.split(rng.permutation(train), [int(0.25 * len(train)), int(0.5 * len(train))])
        target = pooled(counts[apart], mix[apart])
        validation = np.sort(validation[np.isin(mix[validation], list(target))])
        task |= {f"seen_{f}": np.sort(np.concatenate([validation, rest])), f"validation_{f}": validation}
        task[f"target_{f}"] = np.stack([target[k] for k in mix[validation]])
    return task


def run_sedd(task: Task, folder: Path) -> dict[str, Any]:
    """Train on four folds, denoise the fifth, each in turn: by each rule, and one draw."""
    made: dict[str, Any] = {}
    shares = []
    settings = {**yaml.safe_load(QUICK.read_text()), "genes": "all", "val_fraction": 0.1, "log_with": "none", "min_steps": STEPS}
    every = ad.AnnData(sparse.csr_matrix(task["counts"].astype(np.float32)))
    every.var_names = task["genes"]
    asked: dict[str, dict[str, Any]] = {"sedd": {}, "sedd, no similar cells": {"similar_cells": "none"}, "sedd, own counts in full": {"own_counts": "full", "log1p": True}}
    asked["sedd, other genes alone"] = {"own_counts": "none", "num_samples": 1}
    for f in range(FOLDS):
        with tempfile.TemporaryDirectory(dir=folder) as run:
            model = sedd.train(every[task["fold"] != f].copy(), checkpoint_dir=Path(run) / "run", **settings)
            assert model is not None
        test = task["fold"] == f
        for name, how in asked.items():
            found = sedd.denoise(model, every, progress=False, **how)[:, task["genes"]]
            values = {name: found.X}
            if how.get("log1p"):
                values[f"{name}, sedd_log1p"] = np.expm1(found.layers["sedd_log1p"])
            if how.get("num_samples"):
                values["sedd, one draw"] = found.layers["sedd_mean"]
            if not how:
                shares.append(found.uns["sedd"]["own_share"])
            for key, value in values.items():
                whole = value.toarray() if sparse.issparse(value) else np.asarray(value)
                made.setdefault(key, np.zeros(task["counts"].shape))[test] = whole[test]
    return {**made, "own_share": np.stack(shares)}


def nearness(task: Task, values: np.ndarray) -> dict[str, float]:
    """How near to the truth: error and correlation of deviations from the mean cell, of all cells and of each amount."""
    out = {}
    guess, truth = log_cp10k(values[:, task["shared"]]), task["truth"]
    away, truly = guess - guess.mean(0), truth - truth.mean(0)
    along = np.array([np.corrcoef(a, b)[0, 1] if a.std() > 0 else 0.0 for a, b in zip(away, truly, strict=True)])
    for name, rows in {"all": task["amount"] > 0, **{f"{pg:g} pg": task["amount"] == pg for pg in AMOUNTS}}.items():
        out |= {f"rmse, {name}": rmse(guess[rows], truth[rows]), f"r, {name}": float(along[rows].mean())}
        out[f"rmse to 30 pg of the same protocol, {name}"] = rmse(guess[rows], task["same"][rows])
    return out


def usefulness(task: Task, values: np.ndarray) -> dict[str, float]:
    """What denoised cells are good for."""
    guess, amount, proportions = log_cp10k(values), task["amount"], task["proportions"]
    raw = log_cp10k(task["counts"])
    pure = proportions.max(1) == 1
    line = np.where(pure, proportions.argmax(1), -1)
    share = values / np.maximum(values.sum(1, keepdims=True), 1e-12)
    found = np.zeros_like(proportions)
    for f in range(FOLDS):
        ends = np.stack([task["counts"][(line == k) & (task["fold"] != f)].sum(0) for k in range(3)])
        ends /= ends.sum(1, keepdims=True)
        weight = 1 / np.sqrt(ends.mean(0) + 1e-6)  # else the few largest genes decide
        for i in np.flatnonzero(task["fold"] == f):
            found[i] = nnls(ends.T * weight[:, None], share[i] * weight)[0]
    found /= np.maximum(found.sum(1, keepdims=True), 1e-12)
    out = {f"proportions off, {name}": float(np.abs(found - proportions)[rows].mean()) for name, rows in (("all", amount > 0), ("3.75 pg", amount == 3.75))}
    components = PCA(10, random_state=0).fit_transform(guess)
    aris = [adjusted_rand_score(task["mix"], KMeans(8, n_init=10, random_state=s).fit_predict(components)) for s in range(3)]
    out["ARI of clusters"] = float(np.mean(aris))
    markers, auc, top = [], [], []
    low, deep = amount == AMOUNTS[0], amount == 30
    for a in range(3):
        rest = pure & (line != a)
        effect = raw[(line == a) & deep].mean(0) - raw[rest & deep].mean(0)
        best = np.isin(np.arange(len(effect)), np.argsort(-effect)[:50])
        markers.append(roc_auc_score(best, guess[(line == a) & low].mean(0) - guess[rest & low].mean(0)))
        for b in range(a + 1, 3):
            p = ttest_ind(raw[(line == a) & deep], raw[(line == b) & deep])[1]
            true = np.nan_to_num(p, nan=1.0) < 0.01 / len(p)
            here = np.nan_to_num(np.abs(ttest_ind(guess[(line == a) & low], guess[(line == b) & low])[0]), posinf=1e9)
            auc.append(roc_auc_score(true, here))
            top.append(true[np.argsort(-here)[:100]].mean())
    out |= {"markers, AUROC": float(np.mean(markers)), "differences, AUROC": float(np.mean(auc)), "differences, true of the first 100": float(np.mean(top))}
    rng, false = np.random.default_rng(0), []
    for k in np.repeat(np.arange(3), 10):
        half = rng.permutation(np.flatnonzero(line == k))
        p = ttest_ind(guess[half[::2]], guess[half[1::2]])[1]
        false.append(np.mean(np.nan_to_num(p, nan=1.0) < 0.05))
    out["false differences (0.05 is right)"] = float(np.mean(false))
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """The tables of the page, Markdown."""
    amounts = ["all", *(f"{pg:g} pg" for pg in AMOUNTS)]
    near = [("", [*(f"rmse, {a}" for a in amounts), *(f"r, {a}" for a in amounts)]), ("", [f"rmse to 30 pg of the same protocol, {a}" for a in amounts])]
    known = {column for _, columns in near for column in columns} | {"method", "chosen"}
    near.append(("", [column for column in rows[0] if column not in known]))
    lines = []
    for _, columns in near:
        lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {row['method']} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |" for row in rows] + [""]
    return "\n".join(lines)


def main() -> None:
    """Run, score, write."""
    parser = Flags(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True, help="the same mixtures, measured by the other protocol")
    parser.add_argument("--peer_python", help="interpreter with scvi-tools and magic-impute")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--work", type=Path, default=Path("experiments/truth"), help="where what methods made is kept")
    parser.add_argument("--n_genes", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=RESULTS / "truth.json")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    task = prepare(args.data, args.other, args.n_genes)
    np.savez(args.work / "task.npz", **{k: v for k, v in task.items() if k != "genes"})
    for method in args.methods:
        if not (args.work / f"{method}.npz").exists():
            answer(method, task, args.work, args.peer_python)
    made: dict[str, tuple[np.ndarray, Any]] = {"none": (task["counts"], None), "mean of the mixture's training cells (anchor)": (mixture_means(task), None)}
    head: dict[str, Any] = {"peers": []}
    for method in METHODS:
        if (args.work / f"{method}.npz").exists():
            with np.load(args.work / f"{method}.npz") as answers:
                if method == "sedd":
                    share = answers["own_share"]
                    head["own share, mean and largest"] = [float(share.mean()), float(share.max())]
                    made |= {key: (answers[key], None) for key in answers.files if key != "own_share"}
                else:
                    made[method] = (answers["denoised"], json.loads(str(answers["chosen"])))
                    head["peers"] += [str(answers["version"])] if "version" in answers else []
    rows = [{"method": key, **nearness(task, value), **usefulness(task, value), "chosen": chosen} for key, (value, chosen) in made.items()]
    head |= {"cells": len(task["mix"]), "genes": len(task["genes"]), "genes of both": int(task["shared"].sum()), "folds": FOLDS, "steps": STEPS}
    head["machine"] = machine(("sedd", "torch", "numpy", "scipy", "scikit-learn", "scanpy"))
    write_result(args.output, {**head, "rows": rows})
    print(table(rows))


def answer(method: str, task: Task, work: Path, peer_python: str | None) -> None:
    """Run one method on all folds and keep what it made."""
    if method in ("MAGIC", "scVI"):
        if peer_python is None:
            raise SystemExit(f"{method} needs --peer_python; or leave it out by --methods.")
        words = [peer_python, str(Path(__file__).with_name("truth_methods.py")), method, str(work / "task.npz"), str(work / f"{method}.npz")]
        subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
        return
    if method == "sedd":
        made = run_sedd(task, work)
    else:
        run, settings = {"kNN": (run_knn, KNN), "ALRA": (run_alra, [{}])}[method]
        denoised, chosen = tuned(run, settings, task)
        made = {"denoised": denoised, "chosen": json.dumps(chosen)}
    np.savez(work / f"{method}.npz", **made)


def run_knn(counts: np.ndarray, setting: dict[str, Any]) -> np.ndarray:
    """Means of neighbours."""
    return knn_denoise(sparse.csr_array(counts), setting["k"], root=setting["root"])


def run_alra(counts: np.ndarray, setting: dict[str, Any]) -> np.ndarray:
    """Own implementation; it chooses its rank itself."""
    return np.maximum(alra(sparse.csr_array(counts))[0], 0)


def mixture_means(task: Task) -> np.ndarray:
    """What a method would give that knew the mixture of every cell: the pooled counts of its training cells."""
    out = np.zeros(task["counts"].shape)
    for f in range(FOLDS):
        for k in np.unique(task["mix"]):
            out[(task["fold"] == f) & (task["mix"] == k)] = task["counts"][(task["fold"] != f) & (task["mix"] == k)].sum(0)
    return out


if __name__ == "__main__":
    main()
