"""What a training step needs to know of devices and processes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from sedd.errors import UserError

_COLLECTIVE_TIMEOUT = timedelta(hours=24)  # the other ranks wait for the first while it converts a file


def make_accelerator(mixed_precision: str) -> Accelerator:
    """The processes and the precision of a run, as `accelerate launch` or a plain start set them up."""
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU, and there is none; use bf16 or no.")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        # Accelerate takes processes without GPUs for single ones unless it is told that they are meant to use the CPU.
        cpu=several and not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT)],
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on biases, norms and embeddings of single genes."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is memory that failed: on the CPU torch says so in the words of a RuntimeError only."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error).lower() for w in words)
