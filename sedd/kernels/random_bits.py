"""Random numbers that are a pure function of what they are for: (seed, stream, cell, gene). One home for all of them.

What is drawn for a cell must not depend on the cells that share its batch, nor on the step at which a run was resumed. So there
is no generator with a state. A 64-bit key is folded from integers (`stream_key`), mixed with the number of a cell (`cell_key`),
and starts a splitmix64 sequence (Steele, Lea, Flood 2014), of which the gene is the index. The mixer exists for Python's integers,
for Numba, for NumPy arrays and for torch tensors; all give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:  # imported by what draws on tensors; orders of epochs need no torch
    from torch import Tensor

GOLDEN64 = 0x9E3779B97F4A7C15
"""The step of a splitmix64 sequence: 2**64 divided by the golden ratio."""

_MIX_A, _MIX_B = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U64 = (1 << 64) - 1


@numba.njit(cache=True, nogil=True, inline="always")
def mix64(x: Any) -> Any:
    """Mix 64 bits (the finaliser of splitmix64): a bijection in which every input bit reaches every output bit."""
    x = np.uint64(x)
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MIX_A)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MIX_B)
    return x ^ (x >> np.uint64(31))


def mix64_int(x: int) -> int:
    """Mix 64 bits as `mix64` does, on a Python integer."""
    x &= _U64
    x = ((x ^ (x >> 30)) * _MIX_A) & _U64
    x = ((x ^ (x >> 27)) * _MIX_B) & _U64
    return x ^ (x >> 31)


@numba.njit(cache=True, nogil=True)
def sequence(key: Any, n: int) -> Any:
    """Return the first `n` words of the splitmix64 sequence that `key` starts, (n,) uint64."""
    out = np.empty(n, np.uint64)
    for i in range(n):
        out[i] = mix64(np.uint64(key) + np.uint64(i + 1) * np.uint64(GOLDEN64))
    return out


def stream_key(*words: int) -> int:
    """Fold integers into one 64-bit key.

    Parameters
    ----------
    *words : int
        Whatever names the stream: a seed, an epoch, a constant per purpose. The order matters.

    Returns
    -------
    key : int in [0, 2**64)
    """
    key = 0
    for word in words:
        key = mix64_int((key + GOLDEN64) ^ mix64_int(word))
    return key


@numba.njit(cache=True, nogil=True, inline="always")
def cell_key(stream: Any, cell: Any) -> Any:
    """Key of one cell in the stream whose key is `stream`."""
    return mix64(np.uint64(stream) + np.uint64(cell) * np.uint64(GOLDEN64))


def signed(word: int) -> int:
    """Return the int64 that has the bits of a word of 64 bits: torch has no unsigned ones, and products wrap alike."""
    return word - (1 << 64) if word >> 63 else word


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 words as if they were unsigned: the copies of the sign are cleared."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix64_(x: Tensor) -> Tensor:
    """Mix int64 words in place, bit for bit as `mix64` does."""
    for shift, factor in ((30, _MIX_A), (27, _MIX_B)):
        x ^= shift_right(x, shift)
        x *= signed(factor)
    x ^= shift_right(x, 31)
    return x


def cell_keys(stream: int, cells: Tensor) -> Tensor:
    """`cell_key` of many cells, (B,) int64, on their device."""
    import torch

    return _mix64_(cells.to(torch.int64) * signed(GOLDEN64) + signed(stream))


def uniforms(seed: int, stream: int, cells: Tensor, n: int) -> Tensor:
    """Draw n uniform numbers for each cell.

    They have all 53 bits of a float64, so that a value of probability 1e-8 can be drawn at that rate (Zheng et al. 2024).

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
    import torch

    step = torch.arange(1, n + 1, device=cells.device) * signed(GOLDEN64)
    bits = _mix64_(cell_keys(stream_key(seed, stream), cells)[:, None] + step)
    return shift_right(bits, 11).double() * 2.0**-53


def mixed(u: Tensor) -> Tensor:
    """Make other uniform numbers of uniform numbers float64 in [0, 1), by mixing their bits."""
    import torch

    return shift_right(_mix64_(u.view(torch.int64) + signed(GOLDEN64)), 11).double() * 2.0**-53


def random_subsets(
    seed: int, stream: int, cells: Tensor, n: int, sizes: Tensor, among: Tensor | None = None
) -> Tensor:
    """Choose `sizes` of n genes for each cell, every subset of that size being equally likely.

    Parameters
    ----------
    seed, stream, cells, n
        As in `uniforms`.
    sizes : (B,) int64 in [0, n]
    among : (n,) bool, optional
        Choose these genes only; `sizes` are then at most their number.

    Returns
    -------
    chosen : (B, n) bool
    """
    import torch

    draws = uniforms(seed, stream, cells, n)
    if among is not None:
        draws = draws.masked_fill(~among, 1.0)
    # The sizes-th smallest draw bounds those chosen: draws of 53 bits are all different. NumPy sorts values in vector instructions.
    ordered = torch.from_numpy(np.sort(draws.numpy(), axis=1)) if draws.device.type == "cpu" else draws.sort(dim=1).values
    last = ordered.gather(1, (sizes - 1).clamp(min=0)[:, None])
    return (draws <= last) & (sizes > 0)[:, None]
