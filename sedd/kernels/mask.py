"""Counter-based random masks: which genes of a cell are hidden, as a pure function of (seed, epoch, cell, gene).

A generator with a state would make the mask of a cell depend on what was drawn before it: on the batch size, the number
of threads and ranks, the step at which a run was resumed. Here a 64-bit key is mixed from (seed, epoch, cell), once per
cell, and a 32-bit hash of (key, gene) is compared with a threshold, once per gene. The hash uses only 32-bit additions,
multiplications, shifts and exclusive-ors, so that a CPU vectorises it and torch repeats it, bit for bit, on a GPU.

The multipliers and shifts are those of the `lowbias32` mixer (hash-prospector, public domain) and of `splitmix64`
(Steele, Lea, Flood 2014). Half of the key goes in before the first round and half after it: with one half alone, two
cells of a large atlas could share a mask shifted by a few genes.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from sedd.errors import UserError
from sedd.kernels.random_bits import cell_key, cell_keys, shift_right, stream_key

_LOW_A, _LOW_B = 0x21F0AAAD, 0xD35A2D97
_BUCKET_SHIFT = 21
BUCKETS = 1 << (32 - _BUCKET_SHIFT)  # 2,048: their counts stay in the L1 cache


@intrinsic
def _gene_hash(typing_context: Any, gene: Any, low: Any, high: Any) -> Any:
    """Hash a gene under the two halves of its cell's key.

    Written as LLVM instructions: Numba widens the product of two uint32 to 64 bits, which a CPU multiplies four times
    slower in vectors.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(ir.IntType(32), value)

        gene, low, high = arguments
        x = builder.add(gene, low)
        x = builder.xor(x, builder.lshr(x, constant(16)))
        x = builder.mul(x, constant(_LOW_A))
        x = builder.xor(x, builder.lshr(x, constant(15)))
        x = builder.xor(x, high)
        x = builder.mul(x, constant(_LOW_B))
        return builder.xor(x, builder.lshr(x, constant(15)))

    return types.uint32(types.uint32, types.uint32, types.uint32), generate


@numba.njit(cache=True, nogil=True)
def mask_row(stream: Any, cell: Any, threshold: Any, out: Any) -> None:
    """Hide the genes of one cell whose hash is below `threshold` (uint64, at most 2**32)."""
    if threshold == np.uint64(0):
        out[:] = False
        return
    key = cell_key(stream, cell)
    low = np.uint32(key & np.uint64(0xFFFFFFFF))
    high = np.uint32(key >> np.uint64(32))
    last = np.uint32(threshold - np.uint64(1))  # `<= last` and not `< threshold`: 2**32 does not fit in 32 bits
    for gene in range(out.shape[0]):
        out[gene] = _gene_hash(np.uint32(gene), low, high) <= last


@numba.njit(cache=True, nogil=True)
def exact_row(stream: Any, cell: Any, count: Any, hashes: Any, buckets: Any, out: Any) -> None:
    """Hide the `count` genes of one cell with the smallest hashes; of equal hashes, the first genes.

    A histogram of the top bits finds the bucket that the `count`-th smallest hash falls in; only that bucket is sorted.
    `hashes` (n_vars,) uint32 and `buckets` (BUCKETS,) int64 are scratch.
    """
    n_vars = out.shape[0]
    if count >= n_vars:
        out[:] = True
        return
    if count <= 0:
        out[:] = False
        return
    key = cell_key(stream, cell)
    low = np.uint32(key & np.uint64(0xFFFFFFFF))
    high = np.uint32(key >> np.uint64(32))
    for gene in range(n_vars):
        hashes[gene] = _gene_hash(np.uint32(gene), low, high)
    buckets[:] = 0
    for gene in range(n_vars):
        buckets[hashes[gene] >> np.uint32(_BUCKET_SHIFT)] += 1
    below, bucket = 0, 0
    while below + buckets[bucket] < count:
        below += buckets[bucket]
        bucket += 1
    wanted = count - below
    inside = np.empty(buckets[bucket], np.uint64)
    n_inside = 0
    for gene in range(n_vars):
        at = np.int64(hashes[gene] >> np.uint32(_BUCKET_SHIFT))
        out[gene] = at < bucket
        if at == bucket:
            inside[n_inside] = (np.uint64(hashes[gene]) << np.uint64(32)) | np.uint64(gene)
            n_inside += 1
    inside.sort()
    for i in range(wanted):
        out[np.int64(inside[i] & np.uint64(0xFFFFFFFF))] = True


@numba.njit(cache=True, nogil=True)
def _random_rows(stream: Any, cells: Any, thresholds: Any, out: Any) -> None:
    for row in range(cells.shape[0]):
        mask_row(stream, cells[row], thresholds[row], out[row])


@numba.njit(cache=True, nogil=True)
def _exact_rows(stream: Any, cells: Any, count: Any, out: Any) -> None:
    for row in range(cells.shape[0]):
        hashes = np.empty(out.shape[1], np.uint32)
        buckets = np.empty(BUCKETS, np.int64)
        exact_row(stream, cells[row], count, hashes, buckets, out[row])


MASK_STREAM = 0x6D61736B  # a constant per purpose keeps the streams of masks, orders and times apart


def mask_stream(seed: int, epoch: int) -> int:
    """Key of the masks of an epoch."""
    return stream_key(MASK_STREAM, seed, epoch)


def masked_count(ratio: float, n_vars: int) -> int:
    """How many genes "exactly a share `ratio`" are: rounded, and at least one."""
    return max(1, round(ratio * n_vars))


def thresholds(probability: np.ndarray) -> np.ndarray:
    """Turn mask probabilities into hash thresholds.

    Parameters
    ----------
    probability : (B,) float64 in [0, 1]

    Returns
    -------
    thresholds : (B,) uint64 in [0, 2**32]; a hash below its threshold hides its gene

    Raises
    ------
    ValueError
        If a probability is outside [0, 1] or NaN.
    """
    probability = np.asarray(probability, dtype=np.float64)
    if not bool(np.all((probability >= 0) & (probability <= 1))):
        bad = probability[~((probability >= 0) & (probability <= 1))][0]
        raise UserError(f"mask probability {bad} is outside [0, 1]; a noise schedule must give probabilities")
    return np.rint(probability * 2.0**32).astype(np.uint64)


def _checked(cells: np.ndarray, n_vars: int, out: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    cells = np.ascontiguousarray(cells, dtype=np.int64)
    if cells.ndim != 1:
        raise UserError(f"cells has {cells.ndim} dimensions; expected one cell number per row of the mask")
    if out is None:
        return cells, np.empty((cells.shape[0], n_vars), dtype=np.bool_)
    if out.shape != (cells.shape[0], n_vars) or out.dtype != np.bool_:
        raise UserError(f"out is {out.dtype} {out.shape}; expected bool {(cells.shape[0], n_vars)}")
    return cells, out


def random_mask(
    seed: int,
    epoch: int,
    cells: np.ndarray,
    n_vars: int,
    probability: np.ndarray,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Hide each gene of each cell independently.

    Parameters
    ----------
    seed, epoch : int
    cells : (B,) int64, the cells' numbers in the store
    n_vars : int
        Genes of the panel; gene `j` is keyed by its index in the panel.
    probability : (B,) float64 in [0, 1], the share of genes to hide
    out : (B, n_vars) bool, optional
        Where to write.

    Returns
    -------
    masked : (B, n_vars) bool
    """
    cells, out = _checked(cells, n_vars, out)
    limits = np.broadcast_to(thresholds(probability), cells.shape)
    _random_rows(np.uint64(mask_stream(seed, epoch)), cells, np.ascontiguousarray(limits), out)
    return out


def exact_mask(
    seed: int,
    epoch: int,
    cells: np.ndarray,
    n_vars: int,
    count: int,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Hide exactly `count` genes of each cell: those with the smallest hashes.

    Parameters
    ----------
    seed, epoch : int
    cells : (B,) int64, the cells' numbers in the store
    n_vars : int
        Genes of the panel; gene `j` is keyed by its index in the panel.
    count : int in [0, n_vars]
    out : (B, n_vars) bool, optional
        Where to write.

    Returns
    -------
    masked : (B, n_vars) bool
    """
    if not 0 <= count <= n_vars:
        raise UserError(f"cannot hide {count} of {n_vars} genes; expected a count from 0 to {n_vars}")
    cells, out = _checked(cells, n_vars, out)
    _exact_rows(np.uint64(mask_stream(seed, epoch)), cells, count, out)
    return out


def _hashes_torch(seed: int, epoch: int, cells: torch.Tensor, n_vars: int) -> torch.Tensor:
    """Hash every gene of every cell: (B, n_vars) int64 in [0, 2**32); int64 products wrap as uint64 ones do."""
    key = cell_keys(mask_stream(seed, epoch), cells)
    low, high = (key & 0xFFFFFFFF)[:, None], shift_right(key, 32)[:, None]
    x = (torch.arange(n_vars, device=cells.device) + low) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * _LOW_A) & 0xFFFFFFFF
    x = (((x ^ (x >> 15)) ^ high) * _LOW_B) & 0xFFFFFFFF
    return x ^ (x >> 15)


def random_mask_torch(
    seed: int, epoch: int, cells: torch.Tensor, n_vars: int, probability: torch.Tensor
) -> torch.Tensor:
    """Draw the same mask as `random_mask`, on the device of `cells`.

    Parameters
    ----------
    seed, epoch : int
    cells : (B,) int64 tensor
    n_vars : int
    probability : (B,) float64 tensor in [0, 1]

    Returns
    -------
    masked : (B, n_vars) bool tensor
    """
    limits = torch.round(probability.to(torch.float64) * 2.0**32).to(torch.int64)
    return _hashes_torch(seed, epoch, cells, n_vars) < limits[:, None]


def exact_mask_torch(seed: int, epoch: int, cells: torch.Tensor, n_vars: int, count: int) -> torch.Tensor:
    """Draw the same mask as `exact_mask`, on the device of `cells`.

    Parameters
    ----------
    seed, epoch : int
    cells : (B,) int64 tensor
    n_vars : int
    count : int in [0, n_vars]

    Returns
    -------
    masked : (B, n_vars) bool tensor
    """
    if not 0 <= count <= n_vars:
        raise UserError(f"cannot hide {count} of {n_vars} genes; expected a count from 0 to {n_vars}")
    # The sign bit is spent so that (hash, gene) orders as one signed 64-bit integer, as the kernel's unsigned one does.
    ordered = ((_hashes_torch(seed, epoch, cells, n_vars) - (1 << 31)) << 32) + torch.arange(
        n_vars, device=cells.device
    )
    smallest = torch.topk(ordered, count, dim=1, largest=False, sorted=False).indices
    masked = torch.zeros(ordered.shape, dtype=torch.bool, device=cells.device)
    return masked.scatter_(1, smallest, True)
