"""How fast training is: our loop against the same step fed from memory, two processes against one, and a plain implementation.

    python benchmarks/train.py                     # on a GPU if there is one, else on the CPU
    python benchmarks/train.py --rounds 5 --model large --device cuda --compile
    python benchmarks/train.py --add                 # three more rounds of the same, in the same file

Contestants run one after the other, each in processes of its own, `--rounds` times; every round, medians and ranges go to
`benchmarks/results/train_DEVICE.json`, with what is required of them.

    loop            `sedd train` itself: cells from the store, masks, bar, logs
    memory          the same loop, fed from tensors that were made beforehand
    loop_masks      the loop with the masks drawn on the side that it does not choose by itself: beside the network on a CPU,
                    by the loader's threads on a GPU
    loop_1core, memory_1core, loop_2procs
                    the same by one process on one core, and by two on one core each (on CPUs); threads pinned
    loop_apart      two runs that know nothing of each other, on one core each: what the machine leaves to two
    loop_full       `sedd train --attention full`, the network that `plain` is, at the batch size of `plain`
    plain           a straightforward implementation: float32 transformer with positions, logits of every gene and bin,
                    dense int64 tokens in memory, masks by torch.rand

A figure is over the optimizer steps after `--warmup`, by the clock, with everything between two steps included; the validation
between epochs is not. The utilisation is the arithmetic that the network needs (benchmarks/model.py) over the time, as a share of
what a large matrix product reaches in the same process and precision: `peak_tflops`, measured right after training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, machine, matmul_flops, peak_mib, summary, write_result
from flags import Flags

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]
Step = tuple[float, float, int]  # seconds, of them waiting, cells
CONTESTS = ("loop", "memory", "loop_masks", "loop_1core", "memory_1core", "loop_2procs", "loop_apart", "loop_full", "plain")
CORES: dict[str, list[str]] = {
    **{"loop_1core": ["0"], "memory_1core": ["0"]},
    **{"loop_2procs": ["0", "1"], "loop_apart": ["0", "1"]},
}
PRODUCTS = """
import os, sys, time, torch
os.sched_setaffinity(0, {int(sys.argv[1])})
torch.set_num_threads(1)
a, n = torch.randn(192, 192), 0
time.sleep(max(0.0, 6 - time.clock_gettime(time.CLOCK_MONOTONIC) % 6))
began = time.perf_counter()
while (seconds := time.perf_counter() - began) < 3:
    a @ a
    n += 1
print(n / seconds)
"""
SETTINGS = (
    *("genes", "num_bins", "model", "batch_size", "slow_batch_size", "steps", "slow_steps", "warmup"),
    *("mixed_precision", "compile", "threads", "rounds"),
)


class Enough(Exception):
    """The steps that were asked for are done."""


def train(args: argparse.Namespace) -> Record:
    """Run the trainer with a bar that counts, until it has seen enough steps."""
    from sedd import trainer
    from sedd.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
    from sedd.training.logs import Progress

    full = args.contest == "loop_full"
    warmup, steps = n_steps(args, slow=full)
    seen: list[Step] = []
    first: list[float] = []

    class Recorder(Progress):
        def step(self, loss: float, cells: int, seconds: float, wait: float) -> None:
            first.append(time.time())
            seen.append((seconds, wait, cells))
            super().step(loss, cells, seconds, wait)
            if len(seen) == warmup + steps:
                raise Enough

    class Fed(trainer.SEDDTrainer):
        def _make_loader(self, *, loader_masks: bool) -> Any:
            loader = super()._make_loader(loader_masks=loader_masks)
            return Memory(loader) if args.contest.startswith("memory") else loader

    trainer.Progress = Recorder  # type: ignore[misc]
    batch_size = args.slow_batch_size if full else args.batch_size
    side: Any = "auto" if args.contest != "loop_masks" else "loader" if args.device == "cuda" else "device"
    config = TrainConfig(
        data=DataConfig(
            data_path=args.data, genes=str(args.genes), num_bins=args.num_bins, cache_dir=args.work, masks_on=side
        ),
        model=ModelConfig(model=args.model, attention="full" if full else "latent"),
        optim=OptimConfig(
            batch_size=batch_size, num_epochs=10_000, mixed_precision=args.mixed_precision, compile=args.compile
        ),
        run=RunConfig(
            checkpoint_dir=f"{args.work}/{args.contest}{args.core or ''}",
            overwrite=True,
            num_threads=args.threads,
            log_with="none",
        ),
    )
    run = Fed(config)
    with contextlib.suppress(Enough):
        run.fit()
    record = figures(args, seen[warmup:], first[0], args.mixed_precision, run.accelerator.num_processes)
    n_vars = run.model.config["n_vars"]
    flop = run.model.flops(n_vars, n_vars // 2)
    peak = record["peak_tflops"] * 1e12 * run.accelerator.num_processes
    return {**record, "gflop_per_cell": flop / 1e9, "utilisation": record["cells_per_s"] * flop / peak}


class Memory:
    """All batches of an epoch, made beforehand, in the place of the loader."""

    def __init__(self, loader: Any) -> None:
        self.n_cells, self.wait_seconds, self.epoch = loader.n_cells, 0.0, 0
        self.batches, self._state = list(loader), loader.state_dict()
        loader.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.epoch = epoch

    def state_dict(self) -> Record:
        """The state at the start of an epoch."""
        return {**self._state, "position": 0}

    def close(self) -> None:
        """Let go of the batches."""
        self.batches = []


def plain(args: argparse.Namespace) -> Record:
    """The straightforward implementation: what one writes first."""
    import numpy as np
    import torch
    from torch import nn

    from sedd.config import MODEL_SIZES, DataConfig, RunConfig, TrainConfig
    from sedd.io.loader import CellLoader
    from sedd.training.run_data import prepare_panel

    if args.threads:
        torch.set_num_threads(args.threads)
    data = DataConfig(data_path=args.data, genes=str(args.genes), num_bins=args.num_bins, cache_dir=args.work)
    panel = prepare_panel(TrainConfig(data=data, run=RunConfig(log_with="none")), None)
    given: Record = {"split": panel.train_cells, "genes": panel.genes, "binning": panel.binning, "mask": None}
    with CellLoader(panel.store, batch_size=256, **given) as loader:
        cells = torch.from_numpy(np.concatenate([batch.tokens.numpy() for batch in loader])).long()
    # Its states are a fixed number of values; larger counts share the last.
    n_vars, n_bins, device = cells.shape[1], args.num_bins, torch.device(args.device)
    cells.clamp_(max=n_bins - 1)
    dim, layers, heads = (MODEL_SIZES[args.model][name] for name in ("hidden_dim", "num_layers", "num_heads"))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Embedding(n_bins + 1, dim)
            self.position = nn.Parameter(torch.randn(n_vars, dim) * 0.02)
            self.time = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
            layer = nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, activation="gelu", batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.out = nn.Linear(dim, n_bins)

        def forward(self, tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x = self.token(tokens) + self.position + self.time(t[:, None])[:, None]
            return self.out(self.layers(x))

    torch.manual_seed(0)
    model = Plain().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    warmup, steps = n_steps(args, slow=True)
    seen: list[Step] = []
    first, began = 0.0, time.monotonic()
    for _ in range(warmup + steps):
        tokens = cells[torch.randint(len(cells), (args.slow_batch_size,))].to(device)
        t = torch.rand(len(tokens), device=device).clamp(min=1e-3)
        masked = torch.rand(tokens.shape, device=device) < t[:, None]
        logits = model(tokens.masked_fill(masked, n_bins), t)
        nats = -logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        loss = (nats * masked / t[:, None]).sum(1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(float(loss)):
            raise SystemExit("the loss of the plain implementation is not finite")
        now = time.monotonic()
        seen.append((now - began, 0.0, len(tokens)))
        began, first = now, first or time.time()
    return figures(args, seen[warmup:], first, "no", 1)


def n_steps(args: argparse.Namespace, *, slow: bool) -> tuple[int, int]:
    """Steps that are not counted and steps that are; on a CPU few of full attention's."""
    return (1, args.slow_steps) if slow and args.device == "cpu" else (args.warmup, args.steps)


def figures(args: argparse.Namespace, measured: list[Step], first: float, precision: str, processes: int) -> Record:
    """What the measured steps say; `first` is when the first of all steps was done."""
    import torch

    seconds, waits, cells = ([row[i] for row in measured] for i in range(3))
    whole = [s for s, n in zip(seconds, cells, strict=True) if n == max(cells)]  # the last batch of an epoch is smaller
    median = statistics.median(whole)
    rate = sum(cells) / sum(seconds)
    memory = peak_mib()
    if args.device == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    return {
        "cells_per_s": rate,
        "tokens_per_s": rate * args.genes,
        "wait_share": sum(waits) / sum(seconds),
        "median_step_ms": 1e3 * median,
        "steps_above_1.5x_median": sum(s > 1.5 * median for s in whole),
        "slowest_step_over_median": max(whole) / median,
        "steps": len(measured),
        "batch_size": max(cells) // processes,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "peak_memory_mib": memory,
        "first_step_s": first - args.began,
        "peak_tflops": matmul_flops(args.device, torch.float32 if precision == "no" else torch.bfloat16) / 1e12,
    }


# -- running the contestants -------------------------------------------------------------------------------------------


def contest(name: str, args: argparse.Namespace, work: str) -> Record:
    """One contestant in processes of its own."""
    words = [sys.executable, __file__, "--contest", name, "--work", work, "--data", args.data, "--device", args.device]
    for option in SETTINGS:
        value = getattr(args, option)
        words += [f"--{option}", str(value)] if not isinstance(value, bool) else [f"--{option}"] * value
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank, core in enumerate(CORES.get(name, [None])):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if name == "loop_2procs":
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            environment |= {k: str(v) for k, v in ranks.items()} | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        if core is not None:
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        pinned = [] if core is None else ["--core", core, "--threads", "1"]
        command = [*words, *pinned, "--began", str(time.time())]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            raise SystemExit(f"{name} failed:\n{errors[-2000:]}")
    first, *others = [json.loads(output.strip().splitlines()[-1]) for output, _ in said]
    if name == "loop_apart":
        first["cells_per_s"] += others[0]["cells_per_s"]
    return dict(first)


def rate_ratio(found: dict[str, list[Record]], a: str, b: str) -> float | None:
    """Cells/s of one contestant over those of another in the same round, the median over rounds."""
    if a not in found or b not in found:
        return None
    pairs = zip(found[a], found[b], strict=False)  # of some there can be more rounds than of others
    return statistics.median(x["cells_per_s"] / y["cells_per_s"] for x, y in pairs)


def requirements(found: dict[str, list[Record]], device: str) -> list[Record]:
    """What is asked of training and what was found: medians over rounds, of ratios within a round."""

    def ratio(a: str, b: str) -> float | None:
        return rate_ratio(found, a, b)

    def middle(name: str, figure: str) -> float | None:
        return statistics.median(one[figure] for one in found[name]) if name in found else None

    asked: list[tuple[str, float | None, str, float]] = [
        ("loop over the same step fed from memory, cells/s", ratio("loop", "memory"), ">=", 0.9),
        ("the same on one core", ratio("loop_1core", "memory_1core"), ">=", 0.9),
        ("loop over the loop with masks drawn on the other side, cells/s", ratio("loop", "loop_masks"), ">=", 1.0),
        ("share of a step spent waiting for data", middle("loop", "wait_share"), "<", 0.01),
        ("the same on one core", middle("loop_1core", "wait_share"), "<", 0.01),
        ("two processes on two cores over one on one, cells/s", ratio("loop_2procs", "loop_1core"), ">=", 1.6),
        ("loop over the plain implementation, cells/s", ratio("loop", "plain"), ">=", 3.0),
        ("loop with full attention over the plain implementation, cells/s", ratio("loop_full", "plain"), ">=", 1.0),
    ]
    if device == "cuda":
        asked += [
            ("share of the device's matrix product that the loop uses", middle("loop", "utilisation"), ">=", 0.45),
            ("slowest step over the median step", middle("loop", "slowest_step_over_median"), "<", 1.5),
        ]
    return [
        {
            "what": what,
            "found": value,
            "required": f"{sign} {bound}",
            "met": value >= bound if sign == ">=" else value < bound,
        }
        for what, value, sign, bound in asked
        if value is not None
    ]


def two_cores_over_one() -> float | None:
    """Products a second of matrices that fit a cache, by both of two pinned processes at once over one alone.

    It is 2 where a core is a core of its own, and less where the two share one.
    """
    if len(os.sched_getaffinity(0)) < 2:
        return None

    def rates(cores: list[int]) -> list[float]:
        words = [sys.executable, "-c", PRODUCTS]
        started = [subprocess.Popen([*words, str(core)], stdout=subprocess.PIPE, text=True) for core in cores]
        return [float(process.communicate()[0]) for process in started]

    cores = sorted(os.sched_getaffinity(0))[:2]
    return round(sum(rates(cores)) / rates(cores[:1])[0], 3)


def default_device() -> str:
    """cuda where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = Flags(__doc__)
    parser.add_argument("--data", default=str(ROOT / "data" / "pbmc3k.h5ad"))
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--num_bins", type=int, default=100)
    parser.add_argument("--model", choices=("small", "medium", "large"), default="small")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--slow_batch_size", type=int, default=4, help="of plain and loop_full")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=80, help="steps that are not counted")
    parser.add_argument("--slow_steps", type=int, default=3, help="of plain and loop_full on a CPU, after one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the network; 0 leaves torch's choice")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--mixed_precision", choices=("no", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--contests", help="which contestants run; if none is named, those that the device has", nargs="+", choices=CONTESTS)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--add", action="store_true", help="add rounds to those of the output, made with these settings"
    )
    hidden: Record = {"contest": str, "work": str, "core": int, "began": float}
    for name, kind in hidden.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = args.device or default_device()
    args.mixed_precision = args.mixed_precision or ("bf16" if args.device == "cuda" else "no")
    return args


def main() -> None:
    """Run the benchmark, or one contestant of it."""
    args = arguments()
    if args.contest:
        if args.core is not None:
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[args.core]})
        print(json.dumps(plain(args) if args.contest == "plain" else train(args)))
        return
    chosen = args.contests or [
        c for c in CONTESTS if args.device == "cpu" or c in ("loop", "memory", "loop_masks", "loop_full", "plain")
    ]
    output = args.output or RESULTS / f"train_{args.device}.json"
    found: dict[str, list[Record]] = {name: [] for name in chosen}
    settings = {name: getattr(args, name) for name in SETTINGS if name != "rounds"}
    if args.add:
        earlier = json.loads(output.read_text())
        if earlier["settings"] != settings:
            raise SystemExit(
                f"{output}: was made with {earlier['settings']}, not {settings}; give the same or leave out --add"
            )
        found |= earlier["rounds"]
    taken = earlier["seconds"] if args.add else 0
    began = time.time()
    with tempfile.TemporaryDirectory() as work:
        for turn in range(args.rounds):
            for name in chosen:
                found[name].append(contest(name, args, work))
                one = found[name][-1]
                shown = f"{one['cells_per_s']:.4g} cells/s, wait {one['wait_share']:.2%}, {one['median_step_ms']:.4g} ms a step"
                print(f"round {turn + 1}, {name}: {shown}", flush=True)
    content = {
        "machine": machine(("torch", "accelerate", "numpy", "numba"), args.device),
        "two_cores_over_one": None if args.device == "cuda" else two_cores_over_one(),
        "data": Path(args.data).name,
        "settings": settings,
        "seconds": taken + round(time.time() - began),
        "requirements": requirements(found, args.device),
        "two_runs_apart_over_one": rate_ratio(found, "loop_apart", "loop_1core"),
        "two_processes_over_two_runs_apart": rate_ratio(found, "loop_2procs", "loop_apart"),
        "contestants": {name: summary(rounds) for name, rounds in found.items()},
        "rounds": found,
    }
    write_result(output, content)
    for one in content["requirements"]:
        print(f"{one['what']}: {one['found']:.3g} (required {one['required']}) {'met' if one['met'] else 'NOT MET'}")


if __name__ == "__main__":
    main()
