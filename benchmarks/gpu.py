"""What a GPU reaches: first whether it computes what a CPU does, then how fast, and what falls short of the marks.

    benchmarks/gpu.sh                                on a rented GPU: everything, into benchmarks/results/gpu.json
    benchmarks/gpu.sh --device cpu --tiny            the same on a CPU with toy sizes, to see that it runs

Correctness is of one training step (loss and gradients beside those of the CPU, in float32) and of the masks; then for each preset and panel
the median and the largest step in milliseconds, cells a second and the share of what a matrix product reaches on this device (MFU).
Nothing of this had run on a GPU when it was written.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from common import NOISE, RESULTS, machine, matmul_flops, write_result
from flags import Flags

from sedd.binning import UNBOUNDED
from sedd.config import MODEL_SIZES
from sedd.graph import AbsorbingGraph
from sedd.io.loading.batch import Batch
from sedd.kernels.mask import random_mask
from sedd.loss import diffusion_loss
from sedd.model import SEDDTransformer
from sedd.noise import stratified_times
from sedd.training.ema import EMA
from sedd.training.masking import DeviceMasks

MARKS = {("large", 2000): {"mfu": 0.45}, ("small", 2000): {"cells_per_s": 100_000}}
"""What is asked of presets and panels on a GPU."""

SLOWEST = 1.5  # no step takes more than so many medians
Record = dict[str, Any]


def counts_of(n_genes: int, cells: int) -> np.ndarray:
    """Counts of a panel, most of them 0."""
    rng = np.random.default_rng(0)
    return rng.negative_binomial(0.3, 0.3 / (0.3 + rng.gamma(0.5, 2.0, n_genes)), (cells, n_genes)).clip(max=255)


def model_of(size: str, n_genes: int) -> SEDDTransformer:
    """A preset that starts at the laws of some counts."""
    counts = counts_of(n_genes, 200)
    histogram = sp.csr_array(np.stack([np.bincount(gene, minlength=256) for gene in counts.T]))
    torch.manual_seed(0)
    return SEDDTransformer(n_genes, UNBOUNDED, histogram=histogram, **MODEL_SIZES[size])


class Steps:
    """Training steps of a model on one batch that lies on the device."""

    def __init__(self, model: SEDDTransformer, cells: int, device: torch.device, precision: str) -> None:
        self.model, self.device, self.precision = model.to(device), device, precision
        self.tokens = torch.from_numpy(counts_of(model.config["n_vars"], cells).astype(np.int32)).to(device)
        self.t = stratified_times(cells, 0.5).float()
        batch = Batch(self.tokens, None, self.t, torch.arange(cells), {}, None, None)
        self.masked = DeviceMasks("score_entropy", 0.15, NOISE, 0).of(batch, 0, batch.cell.to(device))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.ema = EMA(model, decay=0.999)

    def loss(self) -> torch.Tensor:
        """The loss of the batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return diffusion_loss(self.model, AbsorbingGraph(UNBOUNDED), NOISE, self.tokens, self.masked, self.t.to(self.device))[0]

    def take(self) -> None:
        """One optimizer step."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def correctness(device: torch.device, n_genes: int) -> Record:
    """One step beside that of the CPU, and the masks beside the loader's."""
    found: Record = {}
    losses, gradients, masks = [], [], []
    for own in (torch.device("cpu"), device):
        steps = Steps(model_of("small", n_genes), 32, own, "no")
        loss = steps.loss()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in steps.model.parameters() if p.grad is not None]))
        masks.append(steps.masked.cpu())
    found["loss, relative difference"] = abs(losses[1] / losses[0] - 1)
    found["gradient, relative difference"] = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    found["masks equal"] = bool(torch.equal(*masks))
    expected = random_mask(0, 0, np.arange(32), n_genes, NOISE.mask_probability(steps.t.double()).numpy())
    found["masks of the loader"] = bool(np.array_equal(masks[1].numpy(), expected))
    return found


def speed(size: str, n_genes: int, cells: int, device: torch.device, n: int) -> Record:
    """Steps in the precision that training takes on the device."""
    precision = "bf16" if device.type == "cuda" else "no"
    steps = Steps(model_of(size, n_genes), cells, device, precision)
    seconds = []
    for _ in range(n + 3):
        began = time.perf_counter()
        steps.take()
        steps.wait()
        seconds.append(time.perf_counter() - began)
    seconds = seconds[3:]
    median = statistics.median(seconds)
    flops = steps.model.flops(n_genes, n_genes // 2) * cells / median
    peak = matmul_flops(device.type, torch.bfloat16 if precision == "bf16" else torch.float32)
    return {
        "model": size, "genes": n_genes, "batch": cells, "precision": precision, "ms": round(1e3 * median, 3), "slowest": round(max(seconds) / median, 3),
        "cells_per_s": round(cells / median), "mfu": round(flops / peak, 4),
    }  # fmt: skip


def short_of(steps: list[Record], right: Record) -> list[str]:
    """What falls short of the marks."""
    found = [f"correctness: {name} is {value}" for name, value in right.items() if value is False or (value is not True and value > 1e-3)]
    for one in steps:
        place = f"{one['model']}, {one['genes']} genes"
        for name, mark in MARKS.get((one["model"], one["genes"]), {}).items():
            if one[name] < mark:
                found.append(f"{place}: {name} is {one[name]}, the mark is {mark}")
        if one["slowest"] > SLOWEST:
            found.append(f"{place}: the slowest step took {one['slowest']} times the median, the mark is {SLOWEST}")
    return found


def main() -> None:
    """Measure, write and say what falls short."""
    parser = Flags(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; pass --device cpu --tiny to see that this runs.")
    panels, cells, n = ((60,), 8, 3) if args.tiny else ((2000, 20_000), 1024, 50)
    right = correctness(device, 60 if args.tiny else 2000)
    print(json.dumps(right), flush=True)
    steps = []
    for size in ("small",) if args.tiny else tuple(MODEL_SIZES):
        for n_genes in panels:
            steps.append(speed(size, n_genes, cells if n_genes <= 2000 else cells // 8, device, n))
            print(json.dumps(steps[-1]), flush=True)
    short = short_of(steps, right)
    write_result(args.output, {"machine": machine(device=device.type), "correctness": right, "steps": steps, "falls short": short})
    print("\n".join(short) or "nothing falls short")


if __name__ == "__main__":
    main()
