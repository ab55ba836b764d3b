"""Time of each kernel on one core, beside NumPy doing the same and the first call's cost of compiling it.

    python benchmarks/kernels.py

Rates are per second of processor time, best of several repeats, on 512 cells of 20,000 genes with 6.8 % non-zeros.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from common import machine, write_result
from flags import Flags

from sedd.binning import Binning
from sedd.kernels.gather import gather_rows, row_pointers
from sedd.kernels.mask import exact_mask, random_mask, random_mask_torch
from sedd.kernels.tokens import MaskRule, RowFiller

RESULTS = Path(__file__).parent / "results" / "kernels.json"
N_CELLS, N_GENES, DENSITY = 512, 20_000, 0.068

FIRST_CALL = """
import time, numpy as np
from sedd.binning import Binning
from sedd.kernels.tokens import MaskRule, RowFiller
filler = RowFiller(9, genes=None, binning=Binning("identity", 5, None, np.arange(5)), max_count=9)
began = time.process_time()
filler.fill(np.zeros(1, np.uint16), np.ones(1, np.uint8), np.zeros(1, np.int64), np.ones(1, np.int64), np.empty((1, 9), np.uint8),
            mask=MaskRule(0, 0), cells=np.zeros(1, np.int64), probability=np.ones(1), masked=np.empty((1, 9), bool))
print(time.process_time() - began)
"""


def best(work: Callable[[], object], repeats: int) -> float:
    """Least processor time of one call, in seconds; the first call, which may compile, is not counted."""
    work()
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


def first_calls() -> dict[str, float]:
    """Processor seconds of the first call of the main kernel: compiled, and loaded from Numba's cache on disk."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", FIRST_CALL]
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    return {"compiling": float(runs[0].stdout), "from the cache": float(runs[1].stdout)}


def kernels(repeats: int) -> dict[str, float]:
    """Microseconds per cell of each kernel and of NumPy, scipy or torch doing the same."""
    rng = np.random.default_rng(0)
    x = sp.random_array((N_CELLS, N_GENES), density=DENSITY, format="csr", rng=rng, dtype=np.float64)
    data = (rng.poisson(1, x.nnz) + 1).astype(np.uint8)
    indices, bounds = x.indices.astype(np.uint16), x.indptr.astype(np.int64)
    starts, stops = bounds[:-1], bounds[1:]
    scipy_x = sp.csr_matrix((data, x.indices.astype(np.int32), x.indptr.astype(np.int32)), shape=x.shape)
    cells, p = np.arange(N_CELLS), rng.random(N_CELLS)
    masked = np.empty((N_CELLS, N_GENES), bool)
    binning = Binning("identity", 100, None, np.arange(100))
    panel = rng.permutation(N_GENES)[:2000]
    result: dict[str, float] = {}

    def filler(name: str, binning: Binning | None, genes: np.ndarray | None = None, mask: bool = False) -> None:
        made = RowFiller(N_GENES, genes=genes, binning=binning, max_count=255)
        out = np.empty((N_CELLS, made.n_panel), made.dtype)
        given = {"mask": MaskRule(0, 0), "cells": cells, "probability": p, "masked": masked} if mask else {}
        result[name] = best(lambda: made.fill(indices, data, starts, stops, out, **given), repeats)

    def numpy_tokens() -> None:
        out = np.zeros(x.shape, np.uint8)
        out[np.repeat(cells, np.diff(bounds)), indices] = np.digitize(data, np.arange(1, 100))

    def gather() -> None:
        pointers = row_pointers(indices, starts, stops, n_store=N_GENES, columns=np.empty(0, np.int32))
        gather_rows(
            indices, data, starts, stops, columns=np.empty(0, np.int32), indptr=pointers,
            out_indices=np.empty(pointers[-1], np.int32), out_data=np.empty(pointers[-1], np.float32),
        )  # fmt: skip

    filler("tokens, uint8", binning)
    filler("tokens, uint16", Binning("identity", 1000, None, np.arange(1000)))
    filler("tokens, 2,000 genes", binning, panel)
    filler("tokens, quantile bins", Binning("quantile", 51, None, np.zeros(51)))
    filler("tokens and masks", binning, None, True)
    filler("float32", None)
    result["csr"] = best(gather, repeats)
    result["random mask"] = best(lambda: random_mask(0, 0, cells, N_GENES, p, out=masked), repeats)
    result["exact mask"] = best(lambda: exact_mask(0, 0, cells, N_GENES, 3000, out=masked), repeats)
    few = max(2, repeats // 5)
    result["numpy: tokens, uint8"] = best(numpy_tokens, few)
    result["scipy: float32"] = best(lambda: scipy_x.toarray().astype(np.float32), few)
    result["numpy: random mask"] = best(lambda: rng.random(x.shape, np.float32) < p[:, None], few)
    twin = torch.from_numpy(cells), torch.from_numpy(p)
    result["torch, same bits: random mask"] = best(lambda: random_mask_torch(0, 0, twin[0], N_GENES, twin[1]), few)
    target = np.empty((N_CELLS, N_GENES), np.uint8)
    result["limit: writing zeros, uint8"] = best(lambda: target.fill(0), repeats)
    return {name: round(seconds / N_CELLS * 1e6, 3) for name, seconds in result.items()}


def main() -> None:
    """Measure and save."""
    parser = Flags(__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "machine": machine(),
        "microseconds_per_cell": kernels(args.repeats),
        "first_call_cpu_seconds": first_calls(),
    }
    write_result(args.output, record)
    print(args.output)


if __name__ == "__main__":
    main()
