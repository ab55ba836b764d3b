"""Uniform numbers that are a pure function of (seed, stream, cell, gene).

What is drawn for a cell must not depend on the cells that share its batch. So there is no generator with a state: the
64-bit key of a cell starts a splitmix64 sequence (Steele, Lea, Flood 2014), of which the gene is the index. The numbers
have all 53 bits of a float64, so that a bin of probability 1e-8 can be drawn at that rate (Zheng et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd.kernels.mask import GOLDEN64, stream_key

_MIX_A, _MIX_B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mix64_(x: Tensor) -> Tensor:
    """Mix int64 words in place; products wrap as unsigned ones do, and the copies of the sign are cleared after a shift."""
    for shift, factor in ((30, _MIX_A), (27, _MIX_B)):
        x ^= (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        x *= _signed(factor)
    x ^= (x >> 31).bitwise_and_((1 << 33) - 1)
    return x


def uniforms(seed: int, stream: int, cells: Tensor, n: int) -> Tensor:
    """Draw n uniform numbers for each cell.

    Parameters
    ----------
    seed, stream : int
        Any integers; two streams of a seed are independent.
    cells : (B,) int64
        What names the cells; equal numbers get equal draws.
    n : int
        Draws per cell.

    Returns
    -------
    u : (B, n) float64 in [0, 1), on the device of `cells`
    """
    key = cells.to(torch.int64) * _signed(GOLDEN64) + _signed(stream_key(seed, stream))
    step = torch.arange(1, n + 1, device=cells.device) * _signed(GOLDEN64)
    bits = _mix64_(_mix64_(key)[:, None] + step)
    return (bits >> 11).bitwise_and_((1 << 53) - 1).double() * 2.0**-53


def random_subsets(seed: int, stream: int, cells: Tensor, n: int, sizes: Tensor) -> Tensor:
    """Choose `sizes` of n genes for each cell, every subset of that size being equally likely.

    Parameters
    ----------
    seed, stream, cells, n
        As in `uniforms`.
    sizes : (B,) int64 in [0, n]

    Returns
    -------
    chosen : (B, n) bool
    """
    order = uniforms(seed, stream, cells, n).argsort(dim=1)
    chosen = torch.empty(order.shape, dtype=torch.bool, device=order.device)
    return chosen.scatter_(1, order, torch.arange(n, device=order.device) < sizes[:, None])
