"""What `--dry_run` prints: what a run would cost."""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable

import torch

from sedd.config import TrainConfig
from sedd.io.loader import CellLoader
from sedd.io.loading.batch import Batch
from sedd.kernels.mask import masked_count
from sedd.model import SEDDTransformer
from sedd.training.run_data import Panel

_WARM_UP, _MEASURED, _LONGEST = 5, 20, 120.0


def forecast(
    config: TrainConfig,
    panel: Panel,
    model: SEDDTransformer,
    loader: CellLoader,
    step: Callable[[list[Batch]], object],
) -> str:
    """Return sizes, steps, and the time and memory of a step, of which some are taken to measure them.

    The time is the median of 20 steps after 5 (which compile, fill caches and make the optimizer's moments), or of fewer where these would take
    more than two minutes; waiting for data is part of it, as it is of a run's.

    Parameters
    ----------
    config, panel, model, loader
        Of the run.
    step
        Trains on the batches of one step.
    """
    accumulation, epochs = config.optim.gradient_accumulation_steps, config.optim.epochs_of(len(loader))
    n_parameters = sum(p.numel() for p in model.parameters())
    steps = math.ceil(len(loader) / accumulation)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # a small data set has fewer than that in an epoch
    seconds: list[float] = []
    began = time.monotonic()
    while len(seconds) < _WARM_UP + _MEASURED and not (len(seconds) >= 2 and time.monotonic() - began > _LONGEST):
        start = time.monotonic()
        step(list(itertools.islice(batches, accumulation)))
        seconds.append(time.monotonic() - start)
    a_step = statistics.median(seconds[min(_WARM_UP, len(seconds) - 1) :])
    copies = 5 if config.optim.ema_decay else 4  # weights, their average, gradients, two moments
    n_vars = len(panel.genes)
    hidden = n_vars // 2 if config.model.objective == "score_entropy" else masked_count(config.model.mask_ratio, n_vars)
    flops = model.flops(n_vars, hidden)
    return (
        f"cells {panel.train_cells.n_cells} to train, {panel.val_cells.n_cells} to validate; genes {len(panel.genes)}; "
        f"values {panel.binning.describe()}\n"
        f"parameters {n_parameters:,}; weights, gradients and optimizer {4 * n_parameters * copies / 2**20:.0f} MiB; "
        f"{_peak_memory(next(model.parameters()).device)} with batches of {config.batch_size}\n"
        f"matrix products of {flops / 1e9:.3g} GFLOP a cell, {flops * config.batch_size * accumulation / a_step / 1e9:.2g} GFLOP a second\n"
        f"steps {steps} an epoch, {steps * epochs} in all; {a_step:.3f} s a step, "
        f"about {steps * epochs * a_step / 60:.1f} minutes of training"
    )


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"the GPU's memory {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB"
    return f"the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
