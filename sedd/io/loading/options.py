"""What can be asked of a loader, in four groups: which cells, what a batch holds, in what order, how it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd.binning import Binning
from sedd.errors import UserError
from sedd.io.plan import CellList, Split
from sedd.options import check_seed, parse_bytes


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which cells.

    Attributes
    ----------
    split : {"train", "val", "all"}, Split, or array of cell numbers
        The part that is read; "train" leaves out the cells held out for validation.
    val_fraction, split_seed
        Describe the split when it is given by name.
    limit_cells : int, optional
        Use only this many cells, evenly spaced over the split.
    weights : array or dict, optional
        Draw cells with replacement: one weight per cell of the store, or `{column: {label: weight}}`.
    """

    split: str | Split | CellList | np.ndarray | Sequence[int] = "train"
    val_fraction: float = 0.1
    split_seed: int = 0
    limit_cells: int | None = None
    weights: np.ndarray | dict[str, dict[str, float]] | None = None

    @property
    def is_train(self) -> bool:
        """Whether it is the training part."""
        return self.split == "train" if isinstance(self.split, str) else getattr(self.split, "part", "") == "train"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a batch holds.

    Attributes
    ----------
    genes : list of str, optional
        The panel, in this order; all genes by default.
    binning, n_bins : Binning or str, int
        A string is fitted to the training cells with `n_bins` bins.
    labels : list of str
        Columns of `obs` to deliver as codes.
    mask, mask_ratio : {"score_entropy", "masked"} or None, float
        Hide each gene with the mask probability of the cell's time, or exactly `round(mask_ratio * n_vars)` of them.
    noise : callable, optional
        Mask probability at time t; log-linear with eps 1e-3 by default.
    dtype : {"auto", "float32"}
        `float32` gives counts instead of tokens. Counts above 2**24 are rounded, which a warning says.
    target_sum, log1p : float, bool
        With `float32`: scale each cell to this sum over the panel, take log(1 + x).
    """

    genes: Sequence[str] | None = None
    binning: Binning | str = "auto"
    n_bins: int = 100
    labels: Sequence[str] = ()
    mask: str | None = "score_entropy"
    mask_ratio: float = 0.15
    noise: Callable[[Any], Any] | None = None
    dtype: str = "auto"
    target_sum: float = 0.0
    log1p: bool = False

    def __post_init__(self) -> None:
        if self.mask not in ("score_entropy", "masked", None):
            raise UserError(f"unknown mask '{self.mask}'; expected score_entropy, masked or None")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"mask_ratio is {self.mask_ratio}; expected a share between 0 and 1")
        if self.dtype not in ("auto", "float32"):
            raise UserError(f"unknown dtype '{self.dtype}'; expected auto or float32")


@dataclass(frozen=True, kw_only=True)
class Order:
    """In what order cells come, and to which process.

    Attributes
    ----------
    seed : int
        Of the order, the noise times and the masks.
    shuffle : bool or {"full", "window"}
        True permutes a store of up to 1 GiB as a whole, and a larger one by windows; "full" and "window" say which.
    rank, world_size : int
        This process takes positions p of the sequence with `p % world_size == rank`.
    drop_last, pad : bool
        What becomes of the last step of an epoch; `pad` defaults to True for the training split on several ranks.
    """

    seed: int = 0
    shuffle: bool | str = True
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    pad: bool | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_positive(world_size=self.world_size)
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank is {self.rank} of world_size {self.world_size}; expected 0 to {self.world_size - 1}")
        if self.shuffle not in (True, False, "full", "window"):
            raise UserError(f"unknown shuffle '{self.shuffle}'; expected True, False, full or window")


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a loader runs.

    Attributes
    ----------
    threads : int
        Threads that read, and threads that fill batches.
    memory_budget : int or str
        Bound on the memory for cells and batches under way.
    pin_memory : bool or "auto"
        Page-locked batches; "auto" where there is a CUDA device.
    client : dask.distributed.Client, optional
        Read windows on its workers.
    """

    threads: int = 2
    memory_budget: int | str = "2GiB"
    pin_memory: bool | str = "auto"
    client: Any = None

    def __post_init__(self) -> None:
        check_positive(threads=self.threads)
        object.__setattr__(self, "memory_budget", parse_bytes(self.memory_budget))


def check_positive(**numbers: int) -> None:
    """Check numbers that have to be 1 or more; the first that is not is named."""
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} is {number}; expected at least 1")
