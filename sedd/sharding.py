"""FSDP: weights divided among processes to train with, made whole to be saved and validated.

Divided tensors are torch's `DTensor`. Making one whole is a collective: every process must call it, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def divide_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of `value`, divided as `like` is; `value` itself if that is whole.

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
    """The `state_dict` of a checkpoint with its tensors divided as the parameters of `optimizer` are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    divided = {
        i: {name: divide_like(v, parameters[i]) if isinstance(v, Tensor) else v for name, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": divided}


def whole(value: Tensor) -> Tensor:
    """All of a divided tensor; one that is not divided as it is."""
    full = getattr(value, "full_tensor", None)  # of a DTensor, whose module takes long to import
    return value if full is None else full()
