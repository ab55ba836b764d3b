"""What a training step needs to know of devices and processes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)

from sedd.errors import UserError

_COLLECTIVE_TIMEOUT = timedelta(hours=24)  # the other ranks wait for the first while it converts a file


def make_accelerator(mixed_precision: str) -> Accelerator:
    """The processes and the precision of a run, as `accelerate launch` or a plain start set them up."""
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU, and there is none; use bf16 or no.")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    divided = several and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if divided and (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(
            f"the launcher asks for FSDP version {version}; expected fsdp_version: 2, as in configs/accelerate/fsdp.yaml."
        )
    accelerator = Accelerator(
        # Accelerate takes processes without GPUs for single ones unless it is told that they are meant to use the CPU.
        cpu=several and not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT),
            # Buffers never change, and gradients need no copy of their own to be sent from.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if divided:
        _divide_weights(accelerator)
    return accelerator


def _divide_weights(accelerator: Accelerator) -> None:
    """Set up FSDP as a run needs it."""
    state = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate divides on GPUs only; torch can on CPUs
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # Where accelerate itself keeps the type: it copies the first into the second whenever it looks at its state.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    # Accelerate would round the inputs of every block, noise levels included; autocast rounds what may be rounded.
    state.fsdp_plugin.mixed_precision_policy = None


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on biases, norms and embeddings of single genes."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
