r"""Held-out likelihood of the designs of the network against the time they were trained for.

    python benchmarks/backbones.py --data data/pbmc3k.h5ad --designs latent latent_4 --epochs 5
    python benchmarks/backbones.py --data data/pbmc3k.h5ad --designs latent full --batch_size 16 4 --seconds 120 300 600 \
        --masks 1 --cells 128

Cells, genes and split are those of `benchmarks/quality.py`. The bound is the time-free one on the held-out cells, in nats per
cell and conditioned on nothing, with the averaged weights; the first design of a call is what the others are compared
with, cell by cell on the same masks. Time is processor time of training, one thread by default, so that it can be compared on a
machine that others use as well. Adds to `benchmarks/results/backbones.json`.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import NOISE, Stopwatch, new_model, processor, training_step, with_record, write_result
from flags import Flags
from quality import Task, prepare

from sedd.binning import UNBOUNDED
from sedd.graph import AbsorbingGraph
from sedd.likelihood import Likelihood, nelbo
from sedd.training.ema import EMA

DESIGNS: dict[str, dict[str, Any]] = {
    "latent": {"attention": "latent", "num_latents": 1},
    "latent_4": {"attention": "latent", "num_latents": 4},
    "latent_8": {"attention": "latent", "num_latents": 8},
    "full": {"attention": "full"},
}
SETTINGS = (
    *("hidden_dim", "num_layers", "num_heads", "batch_size", "learning_rate", "weight_decay"),
    *("warmup_steps", "ema_decay", "seed", "seconds"),
)
Record = dict[str, Any]


def run(task: Task, args: argparse.Namespace, design: str, batch_size: int, first: Likelihood | None) -> Iterator[Record]:
    """Train one design and follow its bound: the record so far at every look, the last one at the end.

    Parameters
    ----------
    first
        What the design is compared with, cell by cell on the same masks.
    """
    train, test = (torch.from_numpy(x.toarray()) for x in (task.train, task.test))
    model, graph = new_model(task.train, args, **DESIGNS[design]), AbsorbingGraph(UNBOUNDED)
    ema = EMA(model, decay=args.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=args.weight_decay, fused=True
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup_steps))
    clock, curve, step, marks = Stopwatch(), [], 0, sorted(args.seconds)

    def look(n_masks: int) -> Record:
        with ema.applied():
            found = nelbo(model, graph, NOISE, test[: args.cells].split(16), n_masks=n_masks)
        curve.append({"epoch": epoch, "step": step, "cpu_seconds": round(clock.cpu, 1), "nelbo": round(found.mean, 2)})
        if first is not None and n_masks == args.masks:
            curve[-1]["minus_first"] = [round(x, 2) for x in found.minus(first)]
        print(design, curve[-1], flush=True)
        return {
            "design": design,
            "epochs": epoch,
            "steps": step,
            "cpu_seconds": round(clock.cpu, 1),
            "wall_seconds": round(clock.wall, 1),
            "nelbo": round(found.mean, 2),
            "nelbo_ci": [round(x, 2) for x in found.interval],
            "cells": found.per_cell.size,
            "masks_per_cell": n_masks,
            "parameters": sum(p.numel() for p in model.parameters()),
            "settings": {name: getattr(args, name) for name in SETTINGS} | {"batch_size": batch_size},
            "curve": [*curve],
            "machine": {"processor": processor(), "threads": args.threads, "python": platform.python_version()},
            "versions": {name: version(name) for name in ("torch", "numpy", "scanpy")},
            "per_cell": found,
        }

    for epoch in range(1, args.epochs + 1):
        for batch in train[torch.randperm(len(train))].split(batch_size):
            with clock:
                training_step(model, graph, batch, optimizer, ema)
                warm_up.step()
            step += 1
            if marks and clock.cpu >= marks[0]:
                yield look(args.masks)
                marks.pop(0)
                if not marks:
                    return
        if epoch == args.epochs:
            yield look(args.masks)
        elif epoch % args.every == 0:
            look(max(1, args.masks // 8))


def save(path: Path, record: Record, before: Record | None) -> None:
    """Put a record into the file in place of the one it repeats, and of the one made at the look before."""
    records = with_record(path, record, ("design", "epochs", "settings", "machine"))
    write_result(path, [r for r in records if r != before])


def main() -> None:
    """Run the benchmark."""
    parser = Flags(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--designs", help="designs of the network; the others are compared with the first", nargs="+", choices=list(DESIGNS), default=["latent", "full"])
    parser.add_argument("--n_genes", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seconds", type=float, nargs="*", default=[], help="processor time of looks; the last one ends it")
    parser.add_argument("--hidden_dim", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=3)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16], help="one, or one for each design")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.01)
    parser.add_argument("--warmup_steps", type=int, default=50)
    parser.add_argument("--ema_decay", type=float, default=0.995)
    parser.add_argument("--every", type=int, default=1, help="epochs between looks at the held-out cells")
    parser.add_argument("--masks", type=int, default=16, help="per held-out cell at the end; an eighth of it in between")
    parser.add_argument("--cells", type=int, default=540, help="held-out cells to look at")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "backbones.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = prepare(args.data, args.n_genes, None, args.seed)
    sizes = args.batch_size * len(args.designs) if len(args.batch_size) == 1 else args.batch_size
    first: Likelihood | None = None
    for design, batch_size in zip(args.designs, sizes, strict=True):
        before = None
        for record in run(task, args, design, batch_size, first):
            found = record.pop("per_cell")
            save(args.output, record, before)
            before = record
        first = first or found


if __name__ == "__main__":
    main()
