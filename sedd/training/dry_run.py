"""What `--dry_run` prints: what a run would cost."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from itertools import islice

import torch

from sedd.config import TrainConfig
from sedd.io.loader import CellLoader
from sedd.io.loading.batch import Batch
from sedd.model import SEDDTransformer
from sedd.training.run_data import Panel


def forecast(
    config: TrainConfig,
    panel: Panel,
    model: SEDDTransformer,
    loader: CellLoader,
    step: Callable[[list[Batch]], object],
) -> str:
    """Return sizes, steps, and the time and memory of a step, which is taken to measure them.

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
    group = list(islice(iter(loader), accumulation))
    seconds = 0.0
    for _ in range(2):  # the first also compiles
        start = time.monotonic()
        step(group)
        seconds = time.monotonic() - start
    copies = 5 if config.optim.ema_decay else 4  # weights, their average, gradients, two moments
    return (
        f"cells {panel.train_cells.n_cells} to train, {panel.val_cells.n_cells} to validate; genes {len(panel.genes)}; "
        f"values {panel.binning.describe()}\n"
        f"parameters {n_parameters:,}; weights, gradients and optimizer {4 * n_parameters * copies / 2**20:.0f} MiB; "
        f"{_peak_memory()} with batches of {config.batch_size}\n"
        f"steps {steps} an epoch, {steps * epochs} in all; {seconds:.3f} s a step, "
        f"about {steps * epochs * seconds / 60:.1f} minutes"
    )


def _peak_memory() -> str:
    if torch.cuda.is_available():
        return f"the GPU's memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    return f"the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
