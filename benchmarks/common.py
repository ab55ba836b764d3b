"""What the benchmarks share: clocks, the machine, contestants in processes of their own, summaries, results."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy import sparse

from sedd import metrics as m
from sedd.binning import UNBOUNDED
from sedd.graph import AbsorbingGraph
from sedd.io.files import new_file
from sedd.loss import diffusion_loss
from sedd.model import SEDDTransformer
from sedd.noise import LogLinearNoise, stratified_times
from sedd.training.ema import EMA

NOISE = LogLinearNoise()
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numba", "numpy", "torch", "zarr", "numcodecs", "anndata", "dask")


class Stopwatch:
    """Seconds on the wall and of the processor while it runs; they differ where other programs run.

    It runs inside its `with`, several times if need be, and their seconds add up.
    """

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> Stopwatch:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]

    def rates(self, n: int) -> dict[str, float]:
        """Cells a second, n of them, by either time."""
        return {"cells_per_s": round(n / self.wall, 3), "cells_per_cpu_s": round(n / self.cpu, 3)}


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def machine(packages: Sequence[str] = PACKAGES, device: str = "cpu") -> dict[str, Any]:
    """Processor or GPU, cores, load and versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in packages},
    }


@contextmanager
def trees(commit: str | None) -> Iterator[dict[str, Path]]:
    """Folders of the code that is here, "now", and of that of a commit, by its name; what is on the path decides which is imported."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        if commit is not None:
            content = subprocess.run(["git", "archive", commit], cwd=root, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x"], cwd=folder, input=content, check=True)
        yield {"now": root} | ({} if commit is None else {commit: Path(folder)})


def with_code_of(tree: Path) -> dict[str, str]:
    """Return the environment in which Python imports the package of `tree`."""
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}


def peak_mib() -> int:
    """The most memory that this process has held."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used >> (20 if sys.platform == "darwin" else 10)


def in_process(words: list[str], timeout: float | None = None, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a contestant and read the JSON on its last line."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range of every figure over the rounds; what is no figure, or never differs, is kept."""
    result: dict[str, Any] = {}
    for name, first in rounds[0].items():
        values = [one[name] for one in rounds]
        if isinstance(first, dict):
            result[name] = summary(values)
        elif isinstance(first, (int, float)) and any(value != first for value in values):
            result[name] = {"median": statistics.median(values), "range": [min(values), max(values)]}
        else:
            result[name] = first
    return result


def ratios(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """How many times that of `before` each figure is; of one round, so that both were measured on the same busy machine."""
    return {
        name: ratios(value, before[name]) if isinstance(value, dict) else value / before[name]
        for name, value in now.items()
        if before.get(name)
    }


def median(figure: Any) -> float:
    """The median of a figure that `summary` made."""
    return float(figure["median"] if isinstance(figure, dict) else figure)


def matmul_flops(device: str, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second, by a clock, that a large matrix product reaches: the best of several."""
    n = 8192 if device == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        began = clock()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (clock() - began))
    return best


def write_result(path: Path, content: Any) -> None:
    """Write a result as JSON, whole or not at all; not-a-number is allowed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def with_record(path: Path, record: dict[str, Any], key: Sequence[str], within: str | None = None) -> list[dict[str, Any]]:
    """The records of a result, under `within` in it, with one more in place of that which it repeats by `key`."""
    old = json.loads(path.read_text()) if path.exists() else []
    records = (old[within] if old else []) if within else old
    return [r for r in records if any(r[k] != record[k] for k in key)] + [record]


def new_model(train: Any, sizes: Any, **settings: Any) -> SEDDTransformer:
    """A model that starts at the laws of training counts; `sizes` has its hidden_dim, num_layers, num_heads and seed."""
    torch.manual_seed(sizes.seed)
    return SEDDTransformer(
        train.shape[1],
        UNBOUNDED,
        hidden_dim=sizes.hidden_dim,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        histogram=sparse.csr_array(m.count_histogram(train)),
        **settings,
    )


def training_step(
    model: SEDDTransformer, graph: AbsorbingGraph, batch: torch.Tensor, optimizer: torch.optim.Optimizer, ema: EMA
) -> None:
    """One step on clean tokens, masked as `NOISE` has it."""
    t = stratified_times(len(batch), 1 - float(torch.rand(())))
    masked = torch.rand(batch.shape, dtype=torch.float64) < NOISE.mask_probability(t)[:, None]
    loss, _ = diffusion_loss(model, graph, NOISE, batch, masked, t)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    ema.update()
