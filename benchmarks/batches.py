"""Embeddings without batches, beside PCA, Harmony, scVI and scANVI, by the columns of scib-metrics and by scGraph.

    python benchmarks/batches.py embed --data mixology_cells.h5ad --label cell_line --batch batch --folder DIR
    OTHER/python benchmarks/batches.py measure --folder DIR   # an environment with scib-metrics, harmonypy, scvi-tools and scgraph-eval
    python benchmarks/batches.py table

`embed` trains sedd with `--condition BATCH` on all cells, whose types it is not given, and writes embeddings as arrays: PCA (50 and 10 components of
log CP10k of the same 2,000 genes), sedd with the batch given as it is, hidden, and without it (`sedd embed --without`), and the principal
components of `sedd denoise --as_if BATCH=average`. `--coincide` first leaves every second label to one batch alone: a method that then
mixes batches mixes types. `measure` adds Harmony on the PCA of 50 components, and on the embedding without batches, at its defaults, and scVI and scANVI of the same genes,
both given the batch: of the first `--trials` of `SETTINGS` that with the best ELBO of a tenth of the cells, which also ends the training. **scANVI is given the types of
all cells, which the columns then ask for.** All are measured by scib-metrics, on one job, and by scGraph; written to
`benchmarks/results/batches.json`. sedd has one setting, chosen nowhere here; types serve to measure alone, but for scANVI.
"""

from __future__ import annotations

import argparse
import datetime
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flags import Flags

RESULT = Path(__file__).parent / "results" / "batches.json"
COLUMNS = ("iLISI", "KBET", "BRAS", "PCR comparison", "Graph connectivity", "Isolated labels", "Silhouette label", "cLISI")
COLUMNS += ("KMeans ARI", "KMeans NMI", "Batch correction", "Bio conservation", "Total")
GRAPH = ("Rank-PCA", "Corr-PCA", "Corr-Weighted")
SETTINGS: list[dict[str, Any]] = [
    {"n_latent": n, "n_layers": layers, "gene_likelihood": law} for n, layers, law in ((30, 2, "nb"), (10, 1, "nb"), (10, 2, "nb"))
]
FLAGS = ["--genes", "2000", "--val_fraction", "0.15", "--num_epochs", "1", "--batch_size", "16", "--learning_rate", "2e-4", "--ema_decay", "0.995"]
FLAGS += ["--warmup_steps", "50", "--hidden_dim", "128", "--num_layers", "3", "--num_heads", "4", "--num_latents", "1", "--num_threads", "1"]


def coincide(labels: np.ndarray, batches: np.ndarray) -> np.ndarray:
    """Which cells are left if every second label, in their order, stays in one batch alone, by turns the first and the next."""
    kept, names = np.ones(len(labels), bool), np.unique(batches)
    for turn, label in enumerate(np.unique(labels)[::2]):
        kept &= (labels != label) | (batches == names[turn % len(names)])
    return kept


def embed(args: argparse.Namespace) -> None:
    """Train and write embeddings, labels and batches."""
    import anndata as ad
    from scipy import sparse
    from sklearn.decomposition import PCA

    import sedd
    from sedd.cli import main as command

    adata = ad.read_h5ad(args.data)
    adata.X = sparse.csr_matrix(adata.X)
    adata = adata[adata.obs[args.label].notna().to_numpy()].copy()
    name = Path(args.data).stem
    if args.coincide:
        adata = adata[coincide(adata.obs[args.label].astype(str).to_numpy(), adata.obs[args.batch].astype(str).to_numpy())].copy()
        name += ", types and batches coincide"
    args.folder.mkdir(parents=True)
    data = args.folder / "cells.h5ad"
    adata.obs[args.batch] = adata.obs[args.batch].astype(str).astype("category")
    adata.write_h5ad(data)
    flags = ["--condition", args.batch, "--min_steps", str(args.steps), "--seed", str(args.seed), "--log_with", "none"]
    if command(["train", "--data_path", str(data), "--checkpoint_dir", str(args.folder / "run"), *FLAGS, *flags]):
        raise SystemExit("training failed")
    model = sedd.Pretrained.load(args.folder / "run")
    counts = np.asarray(sparse.csr_array(adata[:, model.genes].X).todense(), np.float64)

    def log_cp10k(values: np.ndarray) -> np.ndarray:
        return np.log1p(values / values.sum(1, keepdims=True) * 1e4)

    def components(values: np.ndarray, n: int) -> np.ndarray:
        return PCA(n, random_state=0).fit_transform(log_cp10k(values))

    hidden = adata.copy()
    del hidden.obs[args.batch]
    as_if = sedd.denoise(model, adata, as_if={args.batch: "average"}, progress=False).X
    made = {
        "PCA, 50": components(counts, 50),
        "PCA, 10": components(counts, 10),
        "sedd embed": sedd.embed(model, adata, progress=False).obsm["X_sedd"],
        "sedd embed, batch hidden": sedd.embed(model, hidden, progress=False).obsm["X_sedd"],
        "sedd embed --without batch": sedd.embed(model, adata, without=[args.batch], progress=False).obsm["X_sedd"],
        "sedd denoise --as_if batch=average, PCA, 50": components(np.asarray(as_if, np.float64), 50),
    }
    labels, batches = (adata.obs[column].astype(str).to_numpy(str) for column in (args.label, args.batch))
    np.savez(args.folder / "embeddings.npz", name=name, seed=args.seed, labels=labels, batches=batches, **made)
    np.savez_compressed(args.folder / "counts.npz", counts=counts.astype(np.float32))


def variational(counts: np.ndarray, obs: Any, seed: int, trials: int) -> dict[str, Any]:
    """Embeddings of scVI, of the setting with the best ELBO of a tenth of the cells, and of scANVI on it; what was chosen and of which version."""
    import anndata as ad
    import scvi
    import torch

    torch.set_num_threads(1)
    made = []
    stops = {"early_stopping": True, "early_stopping_patience": 20, "check_val_every_n_epoch": 1, "accelerator": "cpu", "enable_progress_bar": False}
    for setting in SETTINGS[:trials]:
        scvi.settings.seed = seed
        adata = ad.AnnData(counts, obs=obs.copy())
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch", labels_key="label")
        model = scvi.model.SCVI(adata, **setting)
        model.train(max_epochs=400, **stops)
        made.append((float(model.history["elbo_validation"].min().iloc[0]), str(setting), model))
        print(*made[-1][:2], flush=True)
    _, chosen, model = min(made, key=lambda one: one[0])
    scanvi = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category="none is")
    scanvi.train(accelerator="cpu", enable_progress_bar=False)
    found = {"scVI": model.get_latent_representation(), "scANVI, given the types": scanvi.get_latent_representation()}
    return {**found, "chosen": chosen, "version": f"scvi-tools {version('scvi-tools')}"}


def graph(counts: np.ndarray, adata: Any, folder: Path) -> Any:
    """The three columns of scGraph for each embedding: types' distances beside those within batches."""
    from scgraph import scGraph

    copy = adata.copy()
    copy.obsm = {key: np.asarray(value) for key, value in adata.obsm.items()}
    whole = type(adata)(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32), obs=copy.obs.astype(str), obsm=dict(copy.obsm))
    whole.write_h5ad(folder / "graph.h5ad")
    return scGraph(str(folder / "graph.h5ad"), "batch", "label", only_umap=False).main(list(adata.obsm))


def measure(args: argparse.Namespace) -> None:
    """Add Harmony, measure everything, keep the table."""
    import anndata as ad
    import harmonypy
    import pandas as pd
    from scib_metrics.benchmark import Benchmarker

    with np.load(args.folder / "embeddings.npz") as arrays:
        held = {name: arrays[name] for name in arrays.files}
    name, seed, labels, batches = str(held.pop("name")), int(held.pop("seed")), held.pop("labels"), held.pop("batches")
    obs = pd.DataFrame({"label": pd.Categorical(labels), "batch": pd.Categorical(batches)}, index=[str(k) for k in range(len(labels))])
    for start, method in (("PCA, 50", "Harmony"), ("sedd embed --without batch", "Harmony on sedd embed --without batch")):
        # Of the embedding the first 50 directions, which are ordered: as many as there are of the components.
        corrected = np.asarray(harmonypy.run_harmony(held[start][:, :50], obs, "batch", random_state=0).Z_corr)
        held[method] = corrected if corrected.shape[0] == len(labels) else corrected.T
    with np.load(args.folder / "counts.npz") as arrays:
        counts = arrays["counts"]
    given: dict[str, Any] = {"trials": args.trials, "versions": [f"{package} {version(package)}" for package in ("scib-metrics", "harmonypy", "scgraph-eval")]}
    if args.trials:
        if not (args.folder / "variational.npz").exists():
            np.savez(args.folder / "variational.npz", **variational(counts, obs, seed, args.trials))
        with np.load(args.folder / "variational.npz") as arrays:
            peers = {name: arrays[name] for name in arrays.files}
        given["chosen for scVI and scANVI"] = str(peers.pop("chosen"))
        given["versions"].append(str(peers.pop("version")))
        held |= peers
    adata = ad.AnnData(np.zeros((len(labels), 1), np.float32), obs=obs, obsm={key: np.asarray(value, np.float32) for key, value in held.items()})
    # The principal components it would make anew are those that are compared.
    benchmark = Benchmarker(adata, "batch", "label", embedding_obsm_keys=list(held), pre_integrated_embedding_obsm_key="PCA, 50", n_jobs=1)
    benchmark.benchmark()
    found = benchmark.get_results(min_max_scale=False).drop(index="Metric Type").astype(float)
    by_graph = {name: {k: round(float(v), 4) for k, v in row.items()} for name, row in graph(counts, adata, args.folder).to_dict("index").items()}
    rows: list[dict[str, Any]] = [{"method": method, **{k: round(v, 4) for k, v in row.items()}, **by_graph[method]} for method, row in found.to_dict("index").items()]
    record = {"name": name, "seed": seed, "cells": len(labels), "batches": len(set(batches)), "labels": len(set(labels)), **given}
    record |= {"date": datetime.date.today().isoformat(), "rows": rows}
    old = json.loads(RESULT.read_text()) if RESULT.exists() else []
    kept = [r for r in old if (r["name"], r["seed"]) != (name, seed)]
    RESULT.write_text(json.dumps([*kept, record], indent=1) + "\n")
    print(table([record]))


def table(records: list[dict[str, Any]]) -> str:
    """The tables of the page, Markdown."""
    lines = []
    for record in records:
        columns = [column for column in (*COLUMNS, *GRAPH) if column in record["rows"][0]]
        lines += [f"**{record['name']}**: {record['cells']} cells, {record['batches']} batches, {record['labels']} types, one seed, measured {record.get('date', '2026-11-26')}", ""]
        lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {row['method']} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |" for row in record["rows"]]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = Flags(__doc__)
    parser.add_argument("what", help="which of the three steps", choices=["embed", "measure", "table"])
    parser.add_argument("--data")
    parser.add_argument("--label", help="obs column of the cell types")
    parser.add_argument("--batch", help="obs column of the batches")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--coincide", help="leave every second label to one batch alone", action="store_true")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--trials", type=int, default=len(SETTINGS), help="settings that scVI is tried with; 0 leaves it and scANVI out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "table":
        print(table(json.loads(RESULT.read_text())))
    else:
        (embed if args.what == "embed" else measure)(args)


if __name__ == "__main__":
    main()
