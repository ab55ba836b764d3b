r"""Speed and quality of generation against the number of steps, for both backbones.

    python benchmarks/sampling.py --data data/pbmc3k.h5ad --n_genes 200 --attention latent full
    python benchmarks/sampling.py --data data/pbmc3k.h5ad --n_genes 2000 --attention latent --hidden_dim 128 --num_layers 3 \
        --num_heads 4 --cells 540 --steps 1 8 16 32 128 512
    python benchmarks/sampling.py --data data/pbmc3k.h5ad --n_genes 2000 --attention full --hidden_dim 128 --num_layers 3 \
        --num_heads 4 --cells 4 --steps 1 8 32 --confidence_steps 8 --epochs 0

Each backbone is trained on the 80 % of the cells that `benchmarks/quality.py` trains on, then draws cells at each number of
steps. They are compared with the other 20 %, beside real training cells (what a perfect model gets) and independent genes.
With `--epochs 0` the network is left as it starts and speed alone is measured, which training does not change.
Appends to `benchmarks/results/sampling.json`: an entry with the same panel and backbone is replaced.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import NOISE, Stopwatch, new_model, processor, training_step, with_record, write_result
from flags import Flags
from quality import Task, prepare

from sedd import metrics as m
from sedd.binning import UNBOUNDED
from sedd.graph import AbsorbingGraph
from sedd.likelihood import nelbo
from sedd.model import SEDDTransformer
from sedd.sampling import make_sampler
from sedd.training.ema import EMA

Record = dict[str, Any]


def train(task: Task, args: argparse.Namespace, attention: str) -> SEDDTransformer:
    """Train a model of the given size and return it with its averaged weights."""
    model = new_model(task.train, args, attention=attention)
    tokens = torch.from_numpy(task.train.toarray())
    graph, ema = AbsorbingGraph(UNBOUNDED), EMA(model, decay=0.995)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    for _ in range(args.epochs):
        for batch in tokens[torch.randperm(len(tokens))].split(16):
            training_step(model, graph, batch, optimizer, ema)
    model.load_state_dict(ema.average, strict=False)
    return model.eval()


def runs(args: argparse.Namespace) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of steps and what else is set; the confident order once, to show its bias and its price."""
    for steps in args.steps:
        yield steps, {}
    yield args.confidence_steps, {"order": "confidence"}


def measure(task: Task, args: argparse.Namespace, attention: str) -> Iterator[Record]:
    """Train one backbone and sample from it."""
    began = time.perf_counter()
    model = train(task, args, attention)
    seconds = time.perf_counter() - began
    graph = AbsorbingGraph(UNBOUNDED)
    if args.epochs:
        bound = nelbo(model, graph, NOISE, torch.from_numpy(task.test.toarray()).split(64), n_masks=16)
        yield {
            "what": "training",
            "epochs": args.epochs,
            "seconds": round(seconds, 1),
            "nelbo": round(bound.mean, 2),
            "nelbo_ci": [round(x, 2) for x in bound.interval],
        }
    anchor, outside = m.generation_split(task.train.shape[0], task.test.shape[0], 0)
    pca = m.fit_pca(task.train[outside])
    size = min(args.cells, task.test.shape[0])

    def scores(cells: Any) -> Record:
        if not args.epochs:
            return {}
        a, b = (pca.transform(m.log_cp10k(x)) for x in (task.test[:size], cells[:size]))
        found = {
            "w2": m.gaussian_w2(a, b),
            "mmd2": m.mmd2_unbiased(a, b),
            "correlation": m.gene_correlation_error(task.test[:size], cells[:size]),
            "library_ks": m.library_ks(task.test[:size], cells[:size]),
            "zero_fraction": m.gene_moment_errors(task.test[:size], cells[:size])["zero_fraction"],
        }
        return {name: round(value, 5) for name, value in found.items()}

    if args.epochs:
        yield {"what": "real training cells", **scores(task.train[anchor])}
        yield {"what": "independent genes", **scores(task.baselines.sample(size, args.seed))}
    for steps, settings in runs(args):
        sampler = make_sampler("analytic", model, graph, NOISE, num_steps=steps, **settings)
        start = torch.full((size, task.train.shape[1]), graph.mask_token)
        sampler.sample(start[:2], seed=args.seed)
        with Stopwatch() as clock:
            cells = sampler.sample(start, seed=args.seed)
        speed = clock.rates(size)
        yield {
            "what": "generation",
            "num_steps": steps,
            **settings,
            "cells": size,
            **speed,
            **scores(cells.numpy()),
        }
    known = torch.from_numpy(task.test.toarray())[:size]
    hidden = torch.from_numpy(task.hidden[15][:size])
    sampler = make_sampler("analytic", model, graph, NOISE, num_steps=64)
    with Stopwatch() as clock:
        sampler.sample(known.masked_fill(hidden, graph.mask_token), seed=args.seed)
    yield {
        "what": "imputation of 15 % by draws",
        "num_steps": 64,
        "cells": size,
        **clock.rates(size),
    }


def main() -> None:
    """Run the benchmark."""
    parser = Flags(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--n_genes", type=int, default=200)
    parser.add_argument("--attention", nargs="+", choices=("latent", "full"), default=["latent", "full"])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--confidence_steps", help="steps of the sampler in order of confidence", type=int, default=32)
    parser.add_argument("--cells", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--hidden_dim", type=int, default=64)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--num_heads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sampling.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = prepare(args.data, args.n_genes, None, args.seed)
    for attention in args.attention:
        records = []
        for record in measure(task, args, attention):
            print(attention, record, flush=True)
            records.append(record)
        entry = {
            "data": args.data.name,
            "n_genes": args.n_genes,
            "attention": attention,
            "hidden_dim": args.hidden_dim,
            "num_layers": args.num_layers,
            "seed": args.seed,
            "machine": {"processor": processor(), "threads": args.threads, "python": platform.python_version()},
            "versions": {name: version(name) for name in ("torch", "numpy", "scipy", "scikit-learn")},
            "records": records,
        }
        write_result(args.output, with_record(args.output, entry, ("data", "n_genes", "attention", "hidden_dim", "num_layers")))


if __name__ == "__main__":
    main()
