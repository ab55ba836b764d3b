"""Training and validation cells: sets that are described by a few numbers, not listed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np

from sedd.errors import UserError
from sedd.kernels.random_bits import GOLDEN64, mix64, stream_key

_GROUP = 64  # cells among which the validation part draws its share: their membership is one 64-bit word
_SPLIT = 0x73706C69


@numba.njit(cache=True, nogil=True)
def _val_before(cell: Any, n_obs: Any, n_val: Any, phase: Any) -> Any:
    return (cell * n_val + phase) // n_obs


@numba.njit(cache=True, nogil=True)
def _val_word(start: Any, stop: Any, n_obs: Any, n_val: Any, phase: Any, key: Any) -> Any:
    """Bit `i` is set if cell `start + i` of the group `start .. stop - 1` is a validation cell."""
    size = stop - start
    share = _val_before(stop, n_obs, n_val, phase) - _val_before(start, n_obs, n_val, phase)
    drawn = min(share, size - share)
    word = np.uint64(0)
    for last in range(size - drawn, size):  # Floyd's sampling: each subset of `drawn` cells is equally likely
        bits = mix64(key + np.uint64(start + last) * np.uint64(GOLDEN64))
        choice = ((bits >> np.uint64(32)) * np.uint64(last + 1)) >> np.uint64(32)
        bit = np.uint64(1) << choice
        word |= bit if word & bit == 0 else np.uint64(1) << np.uint64(last)
    if drawn < share:
        word = ~word
    return word & (np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - size))


@numba.njit(cache=True, nogil=True)
def _are_val(cells: Any, n_obs: Any, n_val: Any, phase: Any, key: Any, out: Any) -> None:
    for i in range(cells.shape[0]):
        start = cells[i] // _GROUP * _GROUP
        word = _val_word(start, min(start + _GROUP, n_obs), n_obs, n_val, phase, key)
        out[i] = (word >> np.uint64(cells[i] - start)) & np.uint64(1)


@numba.njit(cache=True, nogil=True)
def _split_cells(ranks: Any, n_obs: Any, n_val: Any, phase: Any, key: Any, want_val: Any, out: Any) -> None:
    """Find the `ranks[i]`-th cell of a part: its group by the closed form of the cells before a group, then its bit."""
    total = n_val if want_val else n_obs - n_val
    n_groups = (n_obs + _GROUP - 1) // _GROUP
    first, after, start, word = np.int64(0), np.int64(0), np.int64(0), np.uint64(0)
    for i in range(ranks.shape[0]):
        rank = ranks[i]
        if not first <= rank < after:
            group = min(np.int64(np.float64(rank) / total * n_obs) // _GROUP, n_groups - 1)
            while True:
                start = group * _GROUP
                stop = min(start + _GROUP, n_obs)
                first = _val_before(start, n_obs, n_val, phase)
                after = _val_before(stop, n_obs, n_val, phase)
                if not want_val:
                    first, after = start - first, stop - after
                if rank < first:
                    group -= 1
                elif rank >= after:
                    group += 1
                else:
                    break
            word = _val_word(start, stop, n_obs, n_val, phase, key)
            if not want_val:
                word = ~word
        left = rank - first
        bit = 0
        while True:
            if (word >> np.uint64(bit)) & np.uint64(1):
                if left == 0:
                    break
                left -= 1
            bit += 1
        out[i] = start + bit


@dataclass(frozen=True)
class Split:
    """A set of cells that is described, not listed.

    The validation cells are exactly `round(val_fraction * n_obs)`, or `most` if that is less, spread evenly: each run of 64 cells of the
    store gives its share of them, chosen by keyed hashes, so that a store sorted by label is also split within each label. With `block`
    above 1 whole runs of that many cells are chosen instead of cells: of a store that was shuffled they are as random a part,
    and reading them decodes little else.

    Attributes
    ----------
    n_obs : int
        Cells in the store.
    val_fraction : float in [0, 1)
    seed : int
    part : {"train", "val", "all"}
    limit : int or None
        Keep only this many cells, evenly spaced over the part.
    most : int or None
        Of the validation cells, whatever their share.
    block : int
        Consecutive cells that are in the same part; the number of validation cells is then the nearest multiple, at least one block.
    """

    n_obs: int
    val_fraction: float = 0.1
    seed: int = 0
    part: str = "train"
    limit: int | None = None
    most: int | None = None
    block: int = 1
    n_val: int = field(init=False)

    def __post_init__(self) -> None:
        if self.part not in ("train", "val", "all"):
            raise UserError(f"unknown split '{self.part}'; expected train, val, all or an array of cell numbers")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction is {self.val_fraction}; expected a share from 0 to below 1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit_cells is {self.limit}; expected at least 1")
        if not 1 <= self.block <= max(self.n_obs, 1):
            raise UserError(f"block is {self.block}; expected 1 to the {self.n_obs} cells of the store")
        n_val = int(np.floor(self.val_fraction * self.n_obs + 0.5))
        n_val = n_val if self.most is None else min(n_val, self.most)
        if self.block > 1:
            n_val = min(max(1, round(n_val / self.block)), self._n_units) * self.block
        object.__setattr__(self, "n_val", n_val)

    @property
    def _key(self) -> int:
        return stream_key(_SPLIT, self.seed)

    @property
    def _n_units(self) -> int:
        """Blocks that are given to one part each; the cells behind the last whole one are for training."""
        return self.n_obs // self.block

    @property
    def _rule(self) -> tuple[int, int, int, np.uint64]:
        """Units, those of validation, phase and key."""
        return self._n_units, self.n_val // self.block, self._key % max(self._n_units, 1), np.uint64(self._key)

    @property
    def _n_part(self) -> int:
        return {"train": self.n_obs - self.n_val, "val": self.n_val, "all": self.n_obs}[self.part]

    @property
    def n_cells(self) -> int:
        """Cells in this part."""
        return self._n_part if self.limit is None else min(self.limit, self._n_part)

    def __len__(self) -> int:
        return self.n_cells

    def cells(self, ranks: np.ndarray | None = None) -> np.ndarray:
        """Cell numbers of the given ranks (the k-th cell of the part, in the store's order); of all ranks by default."""
        ranks = np.arange(self.n_cells) if ranks is None else np.ascontiguousarray(ranks, dtype=np.int64)
        if ranks.size and (ranks.min() < 0 or ranks.max() >= self.n_cells):
            raise UserError(f"ranks run from {ranks.min()} to {ranks.max()}; the split has {self.n_cells} cells")
        if self.n_cells < self._n_part:
            ranks = ranks * self._n_part // self.n_cells
        if self.part == "all" or ranks.size == 0:
            return ranks.copy()
        n_units, n_val, *_ = self._rule
        want_val = self.part == "val"
        within = ranks < (n_val if want_val else n_units - n_val) * self.block
        units = ranks[within] // self.block
        _split_cells(units, *self._rule, want_val, units)
        out = ranks + self.n_val  # of the training cells behind the last whole block
        out[within] = units * self.block + ranks[within] % self.block
        return out

    def contains(self, cells: np.ndarray) -> np.ndarray:
        """Tell of each cell whether it is in this part; `limit` is not looked at."""
        cells = np.ascontiguousarray(cells, dtype=np.int64)
        out = np.ones(cells.shape, np.bool_)
        if self.part != "all":
            units, whole = cells // self.block, self._n_units
            _are_val(np.minimum(units, whole - 1), *self._rule, out)
            out &= units < whole
        return ~out if self.part == "train" else out


def split_cells(n_obs: int, val_fraction: float, seed: int) -> tuple[Split, Split]:
    """Divide cells into a training and a validation part.

    Parameters
    ----------
    n_obs : int
    val_fraction : float in [0, 1)
        Exactly `round(val_fraction * n_obs)` cells are for validation.
    seed : int

    Returns
    -------
    train, val : Split
    """
    return Split(n_obs, val_fraction, seed, "train"), Split(n_obs, val_fraction, seed, "val")


@dataclass(frozen=True)
class CellList:
    """A split given as a list of cells."""

    numbers: np.ndarray

    @property
    def n_cells(self) -> int:
        """Cells in the list."""
        return int(self.numbers.size)

    def cells(self, ranks: np.ndarray | None = None) -> np.ndarray:
        """Cell numbers of the given ranks, of all by default."""
        return self.numbers if ranks is None else self.numbers[ranks]
