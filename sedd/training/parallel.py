"""The processes of a run: how they are set up, how they agree, and how weights are divided among them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor

from sedd.errors import UserError

T = TypeVar("T")

_COLLECTIVE_TIMEOUT = timedelta(hours=24)  # the other ranks wait for the first while it converts a file


def make_accelerator(mixed_precision: str) -> Accelerator:
    """Return the processes and the precision of a run, as `accelerate launch` or a plain start set them up."""
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed_precision fp16 needs a GPU, and there is none; use bf16 or no.")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    divided = several and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if divided and (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(
            f"the launcher asks for FSDP version {version}; expected fsdp_version: 2, as in configs/accelerate/fsdp.yaml."
        )
    accelerator = Accelerator(
        # Accelerate takes processes without GPUs for single ones unless the use of the CPU is asked for, and Apple's GPUs, which know no
        # float64, for GPUs.
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=_COLLECTIVE_TIMEOUT),
            # Buffers never change, and gradients need no copy of their own to be sent from.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    # In TF32, if nothing is narrower; else what autocast leaves in float32, as the last product before the logits, is meant to be it.
    torch.set_float32_matmul_precision("high" if mixed_precision == "no" and accelerator.device.type == "cuda" else "highest")
    if divided:
        _divide_weights(accelerator)
    return accelerator


def on_gpu(accelerator: Accelerator) -> bool:
    """Whether a run trains on a GPU, which is busy with larger batches than a CPU."""
    return accelerator.device.type == "cuda"


def _divide_weights(accelerator: Accelerator) -> None:
    """Set up FSDP as a run needs it."""
    state = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # accelerate divides on GPUs only; torch can on CPUs
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # Where accelerate itself keeps the type: it copies the first into the second whenever it looks at its state.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    # Accelerate would round the inputs of every block, noise levels included; autocast rounds what may be rounded.
    state.fsdp_plugin.mixed_precision_policy = None


def together(accelerator: Accelerator, function: Callable[[], T]) -> list[T]:
    """Return what `function` returns on every process, on every process. All of them must call this, with what can be sent.

    Raises
    ------
    UserError
        On all processes, if it was raised on one.
    """
    if accelerator.num_processes == 1:
        return [function()]
    found: tuple[Any, str | None]
    try:
        found = function(), None
    except UserError as error:
        found = None, str(error)
    everywhere: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(everywhere, found)
    for _, message in everywhere:
        if message is not None:
            raise UserError(message)
    return [value for value, _ in everywhere]


def from_first(accelerator: Accelerator, value: T | None) -> T:
    """Return what the first process has, on every process. All of them must call this; it is pickled among the processes of one run alone."""
    sent = [value]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(sent, src=0)
    assert sent[0] is not None
    return sent[0]


class Ranks:
    """What the processes of a run tell each other, through the CPU, where it does not make a GPU wait.

    Every process must make every call, in the same order.

    Parameters
    ----------
    accelerator
        Of the run.

    Attributes
    ----------
    number
        How many processes there are.
    first
        Whether this is the one that writes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.number: int = accelerator.num_processes
        self.first: bool = accelerator.is_main_process
        self._group = dist.new_group(backend="gloo") if self.number > 1 else None

    def largest(self, *values: int) -> list[int]:
        """Return the largest of each value over all processes."""
        found = torch.tensor(values)
        if self._group is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return found.tolist()

    def total(self, values: Tensor) -> Tensor:
        """Return the sums of `values` over all processes; with one process `values` themselves."""
        if self._group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self._group)
        return values


def divide_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of `value`, divided as `like` is; `value` itself if that is whole.

    Parameters
    ----------
    value
        The whole tensor, the same on every process.
    like
        A tensor of its shape.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    # Every process has read the same file: each keeps its part and nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def divide_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the `state_dict` of a checkpoint with its tensors divided as the parameters of `optimizer` are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    divided = {
        i: {name: divide_like(v, parameters[i]) if isinstance(v, Tensor) else v for name, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": divided}


@contextlib.contextmanager
def ends_gathered(root: Any) -> Iterator[None]:
    """Have what of divided weights is in no block whole on every process, as within a training step; a block is gathered when it is run.

    Parameters
    ----------
    root
        What `Accelerator.prepare` returned of the network. Whose weights were changed before are gathered anew, and again afterwards.
    """
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    def divide() -> None:
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    divide()
    root.set_reshard_after_forward(False, recurse=False)
    root.gather = lambda: None
    register_fsdp_forward_method(root, "gather")
    try:
        root.gather()
        yield
    finally:
        del root.gather
        divide()


def whole(value: Tensor) -> Tensor:
    """All of a divided tensor; any other is returned unchanged."""
    full = getattr(value, "full_tensor", None)  # of a DTensor, whose module takes long to import
    return value if full is None else full()
