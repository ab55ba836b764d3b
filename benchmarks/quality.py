r"""Imputation, denoising, likelihood, generation and embedding of sedd and its peers, on the same cells and masks.

    python benchmarks/quality.py --data data/pbmc3k.h5ad --name pbmc3k --peer_python PEERS/bin/python
    python benchmarks/quality.py --data data/pbmc3k.h5ad --name pbmc3k --export experiments/quality/pbmc3k_train.h5ad
    sedd train --data_path experiments/quality/pbmc3k_train.h5ad --config configs/quality.yaml --checkpoint_dir DIR
    python benchmarks/quality.py --data data/pbmc3k.h5ad --name pbmc3k --checkpoint DIR
    python benchmarks/quality.py --data data/pbmc3k.h5ad --name pbmc3k --checkpoint DIR/final.pt --protocols generation --steps 32 \
        --called "sedd, last epoch"

The first line runs the peers (in an interpreter with scvi-tools and magic-impute), the others write the training cells,
train sedd on them and score it; each writes its part of `benchmarks/results/quality_NAME.json` and leaves the rest. Cells are split 80/20 by `default_rng(0).permutation`, genes
seen in 3 cells or more are kept, and of those the most variable on the training cells. A seed decides what is hidden,
which molecules are held out and how a method is initialised.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import quality_sedd
import scanpy as sc
from common import machine, write_result
from flags import Flags
from quality_methods import alra, knn_denoise, knn_impute
from scipy import sparse
from sklearn.decomposition import PCA

from sedd import metrics as m
from sedd import tasks
from sedd.likelihood import confidence_interval
from sedd.metrics.baselines import nb_cdf, nb_log_prob

FRACTIONS = (15, 30, 50)
N_DRAWS = 5  # of generated cells for each trained model
PROTOCOLS = ["imputation", "likelihood", "denoising", "generation", "embedding"]
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "scVI NB": ("scvi", {"likelihood": "nb", "kl_warmup": 50, "modelled_library": True}),
    "scVI ZINB": ("scvi", {"likelihood": "zinb", "kl_warmup": 50, "modelled_library": False}),
    "MAGIC": ("magic", {"reverse": False}),
    "MAGIC (reverse)": ("magic", {"reverse": True}),
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One data set, split and hidden for one seed."""

    seed: int
    genes: np.ndarray
    train_rows: np.ndarray
    test_rows: np.ndarray
    labels: np.ndarray | None
    train: sparse.csr_array
    test: sparse.csr_array
    hidden: dict[int, np.ndarray]
    kept: sparse.csr_array
    held_out: sparse.csr_array
    baselines: m.CountBaselines

    @property
    def test_dense(self) -> np.ndarray:
        return self.test.toarray()


def prepare(data: Path, n_genes: int, label: str | None, seed: int) -> Task:
    """Split the cells, choose the panel on training cells, hide entries and molecules."""
    adata = anndata.read_h5ad(data)
    counts = sparse.csr_array(adata.X).astype(np.int64)
    seen = np.asarray((counts > 0).sum(axis=0)).ravel() >= 3
    order = np.random.default_rng(0).permutation(adata.n_obs)
    train_rows, test_rows = np.split(order, [int(0.8 * adata.n_obs)])
    training = anndata.AnnData(sparse.csr_matrix(counts[train_rows][:, seen]))
    sc.pp.highly_variable_genes(training, flavor="seurat_v3", n_top_genes=n_genes)
    panel = np.flatnonzero(seen)[training.var["highly_variable"].to_numpy()]
    counts = sparse.csr_array(counts[:, panel])
    rng = np.random.default_rng(1000 + seed)
    hidden = {}
    for fraction in FRACTIONS:
        ranks = rng.random((len(test_rows), n_genes)).argsort(axis=1).argsort(axis=1)
        hidden[fraction] = ranks < round(n_genes * fraction / 100)
    kept, held_out = m.split_molecules(counts, 0.9, np.random.default_rng(seed))
    return Task(
        seed=seed,
        genes=np.asarray(adata.var_names[panel], dtype=str),
        train_rows=train_rows,
        test_rows=test_rows,
        labels=None if label is None else adata.obs[label].astype(str).to_numpy(),
        train=sparse.csr_array(counts[train_rows]),
        test=sparse.csr_array(counts[test_rows]),
        hidden=hidden,
        kept=kept,
        held_out=held_out,
        baselines=m.CountBaselines.fit(counts[train_rows]),
    )


def save_task(task: Task, path: Path) -> None:
    """Write what a peer may see as plain arrays."""
    arrays: dict[str, np.ndarray] = {f"hidden_{k}": v for k, v in task.hidden.items()}
    for name, matrix in (("train", task.train), ("test", task.test), ("kept", task.kept)):
        for part in ("data", "indices", "indptr", "shape"):
            arrays[f"{name}_{part}"] = np.asarray(getattr(matrix, part))
    np.savez(path, **arrays)  # type: ignore[arg-type]


def run_peer(method: str, task_file: Path, output: Path, seed: int, python: str) -> None:
    """Run a peer in its own interpreter, on one thread, unless its answers are there already."""
    if output.exists():
        return
    kind, options = PEERS[method]
    script = Path(__file__).with_name("quality_peers.py")
    partial = output.with_name("partial_" + output.name)
    command = [python, str(script), kind, str(task_file), str(partial), "--seed", str(seed)]
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    subprocess.run([*command, "--options", json.dumps(options)], check=True, env={**os.environ, **single})
    partial.replace(output)


# --- scoring ---------------------------------------------------------------------------------------------------------


def score_denoising(task: Task, method: str, denoised: np.ndarray, log_estimate: np.ndarray | None = None) -> Record:
    """Denoising on the test cells, and on all cells as transductive methods are usually scored.

    `mse` is that of the denoised counts themselves; `mse_expected_log` gives the method the estimator that this error
    rewards, the expectation of the logarithm at the depth of the held-out molecules.
    """
    ratio = task.held_out.sum() / task.kept.sum()
    record: Record = {"protocol": "denoising", "method": method, "seed": task.seed}
    everything = np.arange(task.kept.shape[0])
    for name, rows in (("", task.test_rows), ("_all_cells", everything)):
        if len(denoised) == len(task.test_rows) and name:
            continue
        guess = denoised if len(denoised) == len(task.test_rows) else denoised[rows]
        kept, held = task.kept[rows], task.held_out[rows]
        scores = m.denoising_metrics(guess, held, kept)
        depth = np.asarray(kept.sum(axis=1)).ravel() * ratio
        rate = guess / np.maximum(guess.sum(axis=1, keepdims=True), 1e-12) * depth[:, None]
        expected = m.expected_log_cp10k(rate, np.maximum(depth, 1e-12)) if log_estimate is None else log_estimate
        scores["mse_expected_log"] = m.mse_log_cp10k(expected, held, predicted_is_log=True)
        record |= {f"{key}{name}": value for key, value in scores.items()}
    return record


def score_imputation(task: Task, method: str, fraction: int, mean: np.ndarray, **given: np.ndarray) -> Record:
    """Hidden entries of test cells; a method without a distribution gets an NB of the gene's dispersion around its mean."""
    cell, gene = np.nonzero(task.hidden[fraction])
    true = task.test_dense[cell, gene]
    guess = mean[cell, gene].astype(np.float64)
    if given:
        log_prob = given["log_prob"][cell, gene].astype(np.float64)
        below = given["cdf_below"][cell, gene].astype(np.float64)
        upto = np.minimum(below + np.exp(log_prob), 1.0)
    else:
        dispersion = task.baselines.dispersion_scaled[gene]
        log_prob = nb_log_prob(true, guess, dispersion)
        below, upto = nb_cdf(true - 1, guess, dispersion), nb_cdf(true, guess, dispersion)
    scores = m.recovery_metrics(true, guess, log_prob=log_prob, cdf_below=below, cdf=upto)
    return {"protocol": "imputation", "method": method, "seed": task.seed, "hidden_percent": fraction, **scores}


def score_likelihood(task: Task, method: str, nats: np.ndarray, conditions_on: str) -> Record:
    mean, (low, high) = float(nats.mean()), confidence_interval(nats)
    scores = {"nats_per_cell": mean, "ci_low": low, "ci_high": high, "conditions_on": conditions_on}
    return {"protocol": "likelihood", "method": method, "seed": task.seed, **scores}


def score_generation(task: Task, method: str, cells: Any, train_rows: np.ndarray | None = None) -> Record:
    """Cells against the test cells; components from training cells that are on neither side."""
    outside = m.generation_split(task.train.shape[0], task.test.shape[0], 0)[1]
    pca = m.fit_pca(task.train[outside])
    train = task.train if train_rows is None else task.train[train_rows]
    scores = m.generation_metrics(task.test, cells, pca=pca, train=train, seed=task.seed)
    return {"protocol": "generation", "method": method, "seed": task.seed, **scores}


def unlabelled(labels: np.ndarray) -> np.ndarray:
    """Which cells have no label."""
    return np.isin(labels, ["nan", "unknown", ""])


def score_embedding(task: Task, method: str, train: np.ndarray, test: np.ndarray) -> Record:
    """kNN from training to test cells, and k-means on all of them; cells without a label take no part."""
    assert task.labels is not None
    a, b = task.labels[task.train_rows], task.labels[task.test_rows]
    known_a, known_b = ~unlabelled(a), ~unlabelled(b)
    both, labels = np.concatenate([train[known_a], test[known_b]]), np.concatenate([a[known_a], b[known_b]])
    scores = {
        "knn_accuracy": m.knn_accuracy(train[known_a], a[known_a], test[known_b], b[known_b]),
        "ari": m.cluster_ari(both, labels, task.seed),
    }
    return {"protocol": "embedding", "method": method, "seed": task.seed, **scores}


# --- baselines, peers, sedd ------------------------------------------------------------------------------------------


def baselines(task: Task) -> Iterator[Record]:
    """Everything that needs no network: anchors, gene means, neighbours, ALRA, PCA."""
    train_mean = np.asarray(task.kept[task.train_rows].mean(axis=0)).ravel()
    yield score_denoising(task, "none", task.kept.toarray().astype(float))
    yield score_denoising(task, "gene mean", np.broadcast_to(train_mean, task.kept.shape))
    yield score_denoising(task, "kNN10", knn_denoise(task.kept, root=False, seed=task.seed))
    yield score_denoising(task, "kNN10, square root", knn_denoise(task.kept, root=True, seed=task.seed))
    yield score_denoising(task, "ALRA (own implementation)", alra(task.kept, seed=task.seed)[0])

    base, test = task.baselines, task.test_dense
    for fraction, hidden in task.hidden.items():
        cell, gene = np.nonzero(hidden)
        library = m.visible_library(test, hidden, base.share)[cell]
        rows = m.recovery_table(base, gene=gene, true=test[cell, gene], predicted=base.mean[gene], library=library)
        cdfs = base.cdfs(gene, test[cell, gene], library)
        log_probs = base.log_probs(gene, test[cell, gene], library)
        for name in ["all zeros", *log_probs]:
            scores = {metric: row["baselines"][name] for metric, row in rows.items() if name in row["baselines"]}
            if name in log_probs:
                scores["nll"] = m.negative_log_score(log_probs[name])
                scores |= {f"coverage_{n}": m.interval_coverage(*cdfs[name], n / 100) for n in (50, 90)}
            head = {"protocol": "imputation", "method": name, "seed": task.seed, "hidden_percent": fraction}
            yield {**head, **scores}
        yield score_imputation(task, "kNN50", fraction, knn_impute(task.train, test, hidden))

    every = np.arange(task.test.shape[1])[None, :]
    total = test.sum(axis=1, keepdims=True)
    for name, log_p in base.log_probs(every, test, total).items():
        given = "the cell's total, as an offset" if name == "NB, library-scaled" else "nothing"
        yield score_likelihood(task, name, -log_p.sum(axis=1), given)

    rng = np.random.default_rng(task.seed)
    anchor, outside = m.generation_split(task.train.shape[0], task.test.shape[0], 0)
    yield score_generation(task, "real training cells (anchor)", task.train[anchor], outside)
    copied = task.train[anchor[rng.integers(len(anchor), size=len(anchor))]]
    yield score_generation(task, "training cells drawn with replacement (anchor)", copied)
    yield score_generation(task, "gene marginals", base.sample(task.test.shape[0], task.seed))

    if task.labels is not None:
        pca = PCA(50, random_state=task.seed).fit(m.log_cp10k(task.train))
        latent = [pca.transform(m.log_cp10k(x)) for x in (task.train, task.test)]
        yield score_embedding(task, "PCA", *latent)


def peer_records(task: Task, method: str, answers: Any) -> Iterator[Record]:
    """Score what a peer wrote."""
    yield score_denoising(task, method, np.maximum(answers["denoised"].astype(np.float64), 0))
    for fraction in FRACTIONS:
        given = {k: answers[f"{k}_{fraction}"] for k in ("log_prob", "cdf_below") if f"{k}_{fraction}" in answers}
        yield score_imputation(task, method, fraction, answers[f"mean_{fraction}"], **given)
    for suffix, given_what in (("", "the cell's total, as an offset"), ("_library_modelled", "nothing")):
        if f"elbo{suffix}" in answers:
            yield score_likelihood(task, f"{method}, ELBO", answers[f"elbo{suffix}"], given_what)
            yield score_likelihood(task, f"{method}, importance-weighted (300)", answers[f"iw{suffix}"], given_what)
    if "prior" in answers:
        yield score_generation(task, f"{method}, prior", answers["prior"])
        yield score_generation(task, f"{method}, posterior of training cells", answers["posterior"])
    if "latent_train" in answers and task.labels is not None:
        yield score_embedding(task, method, answers["latent_train"], answers["latent_test"])


def sedd_records(
    task: Task, checkpoint: Path, protocols: Sequence[str], n_masks: int, steps: Sequence[int]
) -> Iterator[Record]:
    """Score a model that was trained on the task's training cells."""
    model = quality_sedd.Pretrained.load(checkpoint)
    test = quality_sedd.aligned(model, task.test, task.genes)
    if "imputation" in protocols:
        for fraction, hidden in task.hidden.items():
            answers = quality_sedd.impute(model, test, hidden)
            yield score_imputation(task, "sedd", fraction, answers.pop("mean"), **answers)
    if "likelihood" in protocols:
        for whole in (False, True) if model.model.config["condition_library"] else (False,):
            nats = quality_sedd.likelihood(model, test, n_masks, task.seed, whole=whole)
            row = score_likelihood(task, "sedd, bound", nats, "the cell's total" if whole else "nothing")
            yield {**row, "masks_per_cell": n_masks}
    if "denoising" in protocols:
        kept = quality_sedd.aligned(model, task.kept[task.test_rows], task.genes)
        for method, denoised in quality_sedd.denoise(model, kept, task.seed).items():
            yield score_denoising(task, method, denoised)
    if "generation" in protocols:
        order = quality_sedd.gene_order(model, task.genes)
        for n_steps in steps:
            name = "sedd" if n_steps == 32 else f"sedd, {n_steps} steps"
            scores = [score_generation(task, name, cells[:, order]) for cells in draws(model, task, n_steps)]
            numbers = [key for key, value in scores[0].items() if isinstance(value, float)]
            yield {**scores[0], **{key: float(np.mean([s[key] for s in scores])) for key in numbers}, "draws": len(scores)}
    if "embedding" in protocols and task.labels is not None:
        train = quality_sedd.aligned(model, task.train, task.genes)
        states = [tasks.embed(model, cells, progress=False).obsm["X_sedd"] for cells in (train, test)]
        yield score_embedding(task, "sedd", states[0], states[1])


def draws(model: quality_sedd.Pretrained, task: Task, n_steps: int) -> Iterator[sparse.csr_array]:
    """Cells of a model, several times as many as are held out: two such draws differ by more than two models do."""
    for k in range(N_DRAWS):
        seed = task.seed * N_DRAWS + k
        yield sparse.csr_array(tasks.generate(model, task.test.shape[0], num_steps=n_steps, seed=seed, progress=False).X)


def recipe_records(task: Task, checkpoint: Path) -> Iterator[Record]:
    """Score the recipe of cross-entropy at a fixed share of masked genes and a sampler with the forward rate."""
    model = quality_sedd.Pretrained.load(checkpoint)
    if model.config.model.objective != "masked":
        raise SystemExit(f"{checkpoint}: --recipe scores a model trained with --objective masked.")
    test, order = quality_sedd.aligned(model, task.test, task.genes), quality_sedd.gene_order(model, task.genes)
    name = "the same network, cross-entropy at 15 %"
    for fraction, hidden in task.hidden.items():
        answers = quality_sedd.impute(model, test, hidden)
        yield score_imputation(task, name, fraction, answers.pop("mean"), **answers)
    made = quality_sedd.generate_by_forward_rate(model, task.test.shape[0], 100, task.seed)
    yield score_generation(task, f"{name}, forward-rate sampler", sparse.csr_array(made)[:, order])


def export(data: Path, n_genes: int, label: str | None, path: Path) -> None:
    """Write the training cells on the panel, for `sedd train`."""
    task = prepare(data, n_genes, label, 0)
    adata = anndata.AnnData(sparse.csr_matrix(task.train).astype(np.float32))
    adata.var_names, adata.obs_names = task.genes, [f"cell{i}" for i in task.train_rows]
    if task.labels is not None:
        labels = task.labels[task.train_rows]
        adata.obs["label"] = pd.Categorical(np.where(unlabelled(labels), None, labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(path, compression="gzip")


def update(path: Path, head: dict[str, Any], records: list[Record]) -> None:
    """Replace the records of the same protocol, method, seed and mask, keep the others, write whole."""

    def key(record: Record) -> tuple[Any, ...]:
        return tuple(record.get(k) for k in ("protocol", "method", "seed", "hidden_percent", "conditions_on"))

    old = json.loads(path.read_text()) if path.exists() else {"records": []}
    merged = {key(r): r for r in old["records"]} | {key(r): r for r in records}
    out = {**old, **head, "records": [merged[k] for k in sorted(merged, key=lambda k: tuple(map(str, k)))]}
    write_result(path, out)


def main() -> None:
    parser = Flags(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the data set, in the name of the result")
    parser.add_argument("--label", help="obs column with cell types; without it no embedding is scored")
    parser.add_argument("--n_genes", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peer_python", help="interpreter with scvi-tools and magic-impute; without it no peer is run")
    parser.add_argument("--methods", nargs="+", default=["baselines", *PEERS], choices=["baselines", *PEERS])
    parser.add_argument("--checkpoint", type=Path, help="score this sedd model in place of baselines and peers")
    parser.add_argument("--recipe", action="store_true", help="the checkpoint is one of --objective masked, a peer")
    parser.add_argument("--protocols", nargs="+", default=PROTOCOLS, choices=PROTOCOLS, help="of sedd's score")
    parser.add_argument("--n_masks", type=int, default=64, help="masks per cell of sedd's bound")
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32, 128], help="of sedd's sampler")
    parser.add_argument("--called", default="sedd", help="name of the checkpoint in the tables")
    parser.add_argument("--export", type=Path, help="write the training cells on the panel to this .h5ad and stop")
    parser.add_argument("--work", type=Path, default=Path("experiments/quality"), help="where peers' answers are kept")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.export:
        export(args.data, args.n_genes, args.label, args.export)
        return
    output = args.output or Path(__file__).parent / "results" / f"quality_{args.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    work = args.work / args.name
    work.mkdir(parents=True, exist_ok=True)

    def scored(task: Task) -> Iterator[Record]:
        for record in sedd_records(task, args.checkpoint, args.protocols, args.n_masks, args.steps):
            yield {**record, "method": args.called + record["method"].removeprefix("sedd")}

    for seed in args.seeds:
        task = prepare(args.data, args.n_genes, args.label, seed)
        head = {
            "data": args.name,
            "cells": {"train": task.train.shape[0], "test": task.test.shape[0]},
            "genes": len(task.genes),
            "split": "default_rng(0).permutation, first 80 % train",
            "machine": {**machine(("numpy", "scipy", "scikit-learn", "anndata", "scanpy", "torch", "sedd")), "threads": 1},
        }
        jobs: list[tuple[str, Callable[[], Iterator[Record]]]] = []
        if args.checkpoint and args.recipe:
            jobs.append(("recipe", lambda: recipe_records(task, args.checkpoint)))  # noqa: B023
        elif args.checkpoint:
            jobs.append(("sedd", lambda: scored(task)))  # noqa: B023
        for method in [] if args.checkpoint else args.methods:
            if method == "baselines":
                jobs.append((method, lambda: baselines(task)))  # noqa: B023  (run within this iteration)
            elif args.peer_python:
                jobs.append((method, lambda method=method: _peer(task, method, work, args.peer_python)))  # noqa: B023
        for method, job in jobs:
            start = time.perf_counter()
            records = list(job())
            update(output, head, records)
            print(f"seed {seed}  {method}  {len(records)} records  {time.perf_counter() - start:.0f} s", flush=True)


def _peer(task: Task, method: str, work: Path, python: str) -> Iterator[Record]:
    task_file = work / f"task_{task.seed}.npz"
    if not task_file.exists():
        save_task(task, task_file)
    slug = "".join(c if c.isalnum() else "_" for c in method.lower())
    answer_file = work / f"{slug}_{task.seed}.npz"
    run_peer(method, task_file, answer_file, task.seed, python)
    with np.load(answer_file, allow_pickle=False) as answers:
        extra = {"version": str(answers["version"]), "seconds": round(float(answers["seconds"]), 1)}
        if "log" in answers:
            extra["best_epoch"] = {k: v[0] for k, v in json.loads(str(answers["log"])).items()}
        for record in peer_records(task, method, answers):
            yield {**record, **extra}


if __name__ == "__main__":
    sys.exit(main())
