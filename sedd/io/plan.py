"""Which cells, in which order, at which noise: pure functions of (seed, epoch), computed anywhere, never replayed.

Every function here maps a position (or a rank within a split) to its answer in constant time and memory, by keyed
permutations (Feistel networks with cycle walking) instead of shuffled lists. So a run is resumed at any position of any
epoch at once, and each rank computes the cells of its own positions alone, of a billion cells too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from sedd.errors import UserError
from sedd.io.loading.split import CellList, Split, split_cells
from sedd.kernels.random_bits import GOLDEN64, mix64, stream_key

__all__ = ["CellList", "EpochOrder", "RankSteps", "Split", "noise_times", "permute", "split_cells", "weighted_ranks"]

LANES = 192
"""Lanes of a window: rank r of W reads only its own lanes when W divides this (1, 2, 3, 4, 6, 8, 12, 16, 24, .. 64, 96)."""
BLOCK = 64
"""Consecutive cells of a split that are read together."""
LANE_WINDOW = 128
"""Cells of a lane that are shuffled together; LANES * LANE_WINDOW cells are in memory at once."""
FULL_SHUFFLE_BYTES = 1 << 30
"""Stores whose non-zeros take up to this much memory are permuted as a whole; half the default memory budget."""

_ORDER, _BLOCKS, _NOISE, _WEIGHTS = 0x6F726465, 0x626C6F63, 0x6E6F6973, 0x77656967
_ROUNDS = 5
_SCRAMBLED = 20  # leading bits of a noise time that are scrambled one by one; the others share a flip


@numba.njit(cache=True, nogil=True)
def _permute(i: Any, n: Any, key: Any) -> Any:
    """Image of `i` under the permutation of [0, n) that `key` names."""
    if n <= 1:
        return np.int64(0)
    bits = 0
    while (np.int64(1) << bits) < n:
        bits += 1
    low_bits = np.uint64((bits + 1) // 2)
    high_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << high_bits) - np.uint64(1)
    x = np.uint64(i)
    while True:
        low, high = x & low_mask, x >> low_bits
        for step in range(_ROUNDS):  # each half is altered by a hash of the other: a bijection whatever the hash
            salt = key + np.uint64(2 * step + 1) * np.uint64(GOLDEN64)
            high ^= (mix64(low ^ salt) >> np.uint64(20)) & high_mask
            salt += np.uint64(GOLDEN64)
            low ^= (mix64(high ^ salt) >> np.uint64(20)) & low_mask
        x = (high << low_bits) | low
        if x < np.uint64(n):  # walk the cycle until it is back inside
            return np.int64(x)


@numba.njit(cache=True, nogil=True)
def _permute_many(items: Any, n: Any, key: Any, out: Any) -> None:
    for i in range(items.shape[0]):
        out[i] = _permute(items[i], n, key)


def permute(items: np.ndarray, n: int, key: int) -> np.ndarray:
    """Map items of [0, n) by the permutation that `key` names.

    Parameters
    ----------
    items : (k,) int64 in [0, n)
    n : int
    key : int in [0, 2**64)

    Returns
    -------
    images : (k,) int64 in [0, n)
    """
    items = np.ascontiguousarray(items, dtype=np.int64)
    if items.size and (items.min() < 0 or items.max() >= n):
        raise UserError(f"items run from {items.min()} to {items.max()}; expected 0 to {n - 1}")
    out = np.empty_like(items)
    _permute_many(items, n, np.uint64(key), out)
    return out


@numba.njit(cache=True, nogil=True)
def _window_ranks(positions: Any, n: Any, block_key: Any, order_key: Any, rotation: Any, out: Any) -> None:
    n_blocks = n // BLOCK
    for i in range(positions.shape[0]):
        lane, step = positions[i] % LANES, positions[i] // LANES
        length = n // LANES + (1 if lane < n % LANES else 0)
        base = step // LANE_WINDOW * LANE_WINDOW
        key = mix64(order_key + np.uint64(lane) * np.uint64(GOLDEN64) + np.uint64(base))
        place = lane * (n // LANES) + min(lane, n % LANES)
        place += base + _permute(step - base, min(np.int64(LANE_WINDOW), length - base), key)
        if place < n_blocks * BLOCK:
            place = _permute(place // BLOCK, n_blocks, block_key) * BLOCK + place % BLOCK
        out[i] = (place + rotation) % n


@dataclass(frozen=True)
class EpochOrder:
    """The sequence of an epoch: position -> rank within the split.

    `full`: a permutation of all cells. `window`: the split is cut into blocks of 64 consecutive cells (from a starting
    point that is new in every epoch), the blocks are permuted and dealt to 192 lanes, position p is the next cell of lane
    `p mod 192`, and within a lane each run of 128 cells is permuted. `none`: the store's order.

    Attributes
    ----------
    n_cells : int
    seed, epoch : int
    mode : {"full", "window", "none"}
    """

    n_cells: int
    seed: int
    epoch: int
    mode: str

    def __post_init__(self) -> None:
        if self.mode not in ("full", "window", "none"):
            raise UserError(f"unknown shuffle '{self.mode}'; expected full, window or none")

    def ranks(self, positions: np.ndarray) -> np.ndarray:
        """Ranks within the split at the given positions of the epoch.

        Parameters
        ----------
        positions : (k,) int64 in [0, n_cells)

        Returns
        -------
        ranks : (k,) int64
        """
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.n_cells):
            raise UserError(f"positions run to {positions.max()}; the epoch has {self.n_cells} cells")
        if self.mode == "none":
            return positions.copy()
        order_key = stream_key(_ORDER, self.seed, self.epoch)
        if self.mode == "full":
            return permute(positions, self.n_cells, order_key)
        block_key = stream_key(_BLOCKS, self.seed, self.epoch)
        out = np.empty_like(positions)
        rotation = block_key % max(self.n_cells, 1)
        _window_ranks(positions, self.n_cells, np.uint64(block_key), np.uint64(order_key), rotation, out)
        return out

    @property
    def window(self) -> int:
        """Positions whose cells are shuffled together; reads that end at its multiples read nothing twice."""
        return LANES * LANE_WINDOW if self.mode == "window" else 1


@numba.njit(cache=True, nogil=True, inline="always")
def _swap(x: Any, shift: Any, keep: Any) -> Any:
    """Swap neighbouring groups of `shift` bits; `keep` has the lower of each two groups."""
    return ((x >> np.uint64(shift)) & np.uint64(keep)) | ((x & np.uint64(keep)) << np.uint64(shift))


@numba.njit(cache=True, nogil=True)
def _times(positions: Any, key: Any, out: Any) -> None:
    # Loops over positions lie innermost: each bit's hash needs the bits below it, but positions do not need each other.
    masks = (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF)
    digits, low = np.empty(positions.shape[0], np.uint64), np.zeros(positions.shape[0], np.uint64)
    for i in range(positions.shape[0]):
        x = np.uint64(positions[i])
        # Pascal's matrix mod 2: bit i becomes the parity of the bits j of x for which the binary digits of j include i's.
        for step in range(6):
            keep = np.uint64(masks[step]) if step < 5 else np.uint64(0x00000000FFFFFFFF)
            x ^= (x >> (np.uint64(1) << np.uint64(step))) & keep
        digits[i] = x
    for bit in range(_SCRAMBLED):  # nested scrambling: whether a bit is flipped is a hash of the scrambled bits below it
        mark = np.uint64(1) << np.uint64(bit + 1)
        for i in range(positions.shape[0]):
            salt = mix64(key ^ (low[i] | mark))
            low[i] |= (((digits[i] >> np.uint64(bit)) ^ salt) & np.uint64(1)) << np.uint64(bit)
    above = np.uint64(_SCRAMBLED)
    for i in range(positions.shape[0]):
        x = low[i] | (((digits[i] >> above) ^ mix64(key + low[i])) << above)
        for step in range(5):
            x = _swap(x, 1 << step, masks[step])
        x = (x >> np.uint64(32)) | (x << np.uint64(32))  # the bits of x, backwards
        out[i] = 1.0 - np.float64(x >> np.uint64(11)) * 2.0**-53


def noise_times(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """Noise times of the cells at the given positions of an epoch.

    The second coordinate of Sobol's sequence with a nested (Owen) scrambling of its own per epoch. Every aligned run of
    `2**k` positions has exactly one time in each `1/2**k` of (0, 1], and so have the positions that one of `2**w` ranks
    takes of it; the plain base-2 radical inverse would give rank 0 of 2 only one half of the times.

    Parameters
    ----------
    seed, epoch : int
    positions : (k,) int64

    Returns
    -------
    t : (k,) float64 in (0, 1]
    """
    positions = np.ascontiguousarray(positions, dtype=np.int64)
    out = np.empty(positions.shape, np.float64)
    _times(positions, np.uint64(stream_key(_NOISE, seed, epoch)), out)
    return out


@numba.njit(cache=True, nogil=True)
def _uniforms(positions: Any, key: Any, out: Any) -> None:
    for i in range(positions.shape[0]):
        bits = mix64(key + np.uint64(positions[i]) * np.uint64(GOLDEN64))
        out[i] = np.float64(bits >> np.uint64(11)) * 2.0**-53


def weighted_ranks(seed: int, epoch: int, positions: np.ndarray, cumulative: np.ndarray) -> np.ndarray:
    """Draw ranks with replacement, in proportion to weights.

    Parameters
    ----------
    seed, epoch : int
    positions : (k,) int64
    cumulative : (n_cells,) float64
        Running sum of the weights.

    Returns
    -------
    ranks : (k,) int64
    """
    positions = np.ascontiguousarray(positions, dtype=np.int64)
    draws = np.empty(positions.shape, np.float64)
    _uniforms(positions, np.uint64(stream_key(_WEIGHTS, seed, epoch)), draws)
    ranks = np.searchsorted(cumulative, draws * cumulative[-1], side="right")
    return np.minimum(ranks, cumulative.size - 1).astype(np.int64)


@dataclass(frozen=True)
class RankSteps:
    """The positions that one rank takes of an epoch, cut into steps.

    Attributes
    ----------
    n_positions : int
        Positions of the epoch.
    batch_size, rank, world_size : int
    start : int
        First position that is still to be seen.
    drop_last, pad : bool
        A last step that not all ranks can fill is dropped, or filled with positions from the start of the epoch, so that
        all ranks have as many cells; without either it is short, and on some ranks empty.
    part, parts : int
        Which of several processes this is that share the cells of the rank: one by one while all can fill a batch, then the last
        batches in turn. Together they make as many batches as one would.
    """

    n_positions: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    start: int = 0
    drop_last: bool = False
    pad: bool = False
    part: int = 0
    parts: int = 1

    @property
    def n_steps(self) -> int:
        """Steps from `start` on, the same on every rank."""
        left = max(self.n_positions - self.start, 0)
        span = self.batch_size * self.world_size
        return left // span if self.drop_last else -(-left // span)

    @property
    def first(self) -> int:
        """First position of this rank."""
        return self.start + (self.rank - self.start) % self.world_size

    @property
    def n_of_rank(self) -> int:
        """Cells of the rank from `start` on, padding included."""
        left = max(self.n_positions - self.start, 0)
        if self.drop_last:
            return self.n_steps * self.batch_size
        if self.pad:
            return -(-left // self.world_size)
        return max(-(-(self.n_positions - self.first) // self.world_size), 0)

    def _shares(self) -> tuple[int, int]:
        """Cells of this part that are dealt one by one, and those of its last batch."""
        even = self.n_of_rank // (self.batch_size * self.parts) * self.batch_size
        left = self.n_of_rank - even * self.parts - self.part * self.batch_size
        return even, min(max(left, 0), self.batch_size)

    @property
    def n_mine(self) -> int:
        """Cells of this part of the rank from `start` on, padding included."""
        return sum(self._shares())

    def positions(self, low: int, high: int) -> np.ndarray:
        """Positions of this part's cells `low .. high - 1`, which increase; those at or above `n_positions` are padding."""
        even, last = self._shares()
        mine = np.arange(low, min(high, even + last), dtype=np.int64)
        of_rank = np.where(mine < even, mine * self.parts + self.part, mine + even * (self.parts - 1) + self.part * self.batch_size)
        return self.first + self.world_size * of_rank

    def before(self, position: int) -> int:
        """Return how many of this part's cells have positions below `position`."""
        of_rank = -(-(position - self.first) // self.world_size)
        even, last = self._shares()
        dealt = min(max(-(-(of_rank - self.part) // self.parts), 0), even)
        return dealt + min(max(of_rank - even * self.parts - self.part * self.batch_size, 0), last)
