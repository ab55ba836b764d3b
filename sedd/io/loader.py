"""CellLoader: a store, a plan and the kernels make token batches, ahead of whoever consumes them."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sedd.binning import Binning
from sedd.errors import UserError, warn_user
from sedd.io.files import parse_bytes
from sedd.io.format.histogram import histogram
from sedd.io.loading.batch import Batch, CSRBatch
from sedd.io.loading.pipeline import Pipeline, Recipe
from sedd.io.loading.rows import RowReader, WholeStore
from sedd.io.loading.selection import cumulative_weights, encode_label, find_genes, make_split
from sedd.io.loading.torch_dataset import TorchDataset
from sedd.io.plan import FULL_SHUFFLE_BYTES, CellList, EpochOrder, RankPlan, Split
from sedd.io.store import CellStore
from sedd.kernels.mask import masked_count
from sedd.kernels.tokens import RowFiller


class CellLoader:
    """Batches of tokens from a store, in an order that is a pure function of (seed, epoch).

    Iterating gives the batches of the current epoch: from its start, or once from where `load_state_dict` points. The order does not depend on the batch size, the
    number of threads or ranks or the memory budget; see docs/loader.md.

    Parameters
    ----------
    store : CellStore or path
    batch_size : int
        Cells per batch and rank.
    split : {"train", "val", "all"}, Split, or array of cell numbers
    val_fraction, split_seed
        Describe the split when it is given by name.
    genes : list of str, optional
        The panel, in this order; all genes by default.
    binning : Binning or str
        A string is fitted to the training cells with `n_bins` bins.
    mask : {"score_entropy", "masked"} or None
        Hide each gene with the mask probability of the cell's time, or exactly `round(mask_ratio * n_vars)` of them.
    noise : callable, optional
        Mask probability at time t; log-linear with eps 1e-3 by default.
    labels : list of str
        Columns of `obs` to deliver as codes.
    rank, world_size : int
        This process takes positions p of the sequence with `p % world_size == rank`.
    threads : int
        Threads that read, and threads that fill batches.
    memory_budget : int or str
        Bound on the memory for cells and batches under way.
    dtype : {"auto", "float32"}
        `float32` gives counts instead of tokens.
    target_sum, log1p : float, bool
        With `float32`: scale each cell to this sum over the panel, take log(1 + x).
    pin_memory : bool or "auto"
        Page-locked batches; "auto" where there is a CUDA device.
    shuffle : bool or {"full", "window"}
        True permutes a store of up to 1 GiB as a whole, and a larger one by windows; "full" and "window" say which.
    drop_last, pad : bool
        What becomes of the last step of an epoch; `pad` defaults to True for the training split on several ranks.
    weights : array or dict, optional
        Draw cells with replacement: one weight per cell of the store, or `{column: {label: weight}}`.
    limit_cells : int, optional
        Use only this many cells, evenly spaced over the split.
    client : dask.distributed.Client, optional
        Read windows on its workers.

    Attributes
    ----------
    n_cells : int
        Cells in the split.
    n_vars : int
        Genes in the panel.
    epoch : int
    label_categories : dict of str -> array
        The labels behind the codes.
    wait_seconds : float
        Time that the consumer has waited for batches so far.
    """

    def __init__(
        self,
        store: CellStore | str | os.PathLike[str],
        *,
        batch_size: int = 32,
        split: str | Split | CellList | np.ndarray | Sequence[int] = "train",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        genes: Sequence[str] | None = None,
        binning: Binning | str = "auto",
        n_bins: int = 100,
        mask: str | None = "score_entropy",
        mask_ratio: float = 0.15,
        noise: Callable[[Any], Any] | None = None,
        labels: Sequence[str] = (),
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        memory_budget: int | str = "2GiB",
        dtype: str = "auto",
        target_sum: float = 0.0,
        log1p: bool = False,
        pin_memory: bool | str = "auto",
        shuffle: bool | str = True,
        drop_last: bool = False,
        pad: bool | None = None,
        weights: np.ndarray | dict[str, dict[str, float]] | None = None,
        limit_cells: int | None = None,
        client: Any = None,
    ) -> None:
        _check_numbers(batch_size=batch_size, threads=threads, world_size=world_size)
        if not 0 <= rank < world_size:
            raise UserError(f"rank is {rank} of world_size {world_size}; expected 0 to {world_size - 1}")
        if mask not in ("score_entropy", "masked", None):
            raise UserError(f"unknown mask '{mask}'; expected score_entropy, masked or None")
        if not 0 < mask_ratio < 1:
            raise UserError(f"mask_ratio is {mask_ratio}; expected a share between 0 and 1")
        if dtype not in ("auto", "float32"):
            raise UserError(f"unknown dtype '{dtype}'; expected auto or float32")
        self.store = store if isinstance(store, CellStore) else CellStore(store)
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        self.threads, self.drop_last = threads, drop_last
        self.memory_budget = parse_bytes(memory_budget)
        self.cells = make_split(self.store, split, val_fraction, split_seed, limit_cells)
        self.n_cells = self.cells.n_cells
        is_train = split == "train" if isinstance(split, str) else getattr(split, "part", "") == "train"
        self.pad = (is_train and world_size > 1) if pad is None else pad
        self.mode = self._shuffle_mode(shuffle)
        panel = find_genes(self.store, genes)
        self.n_vars = self.store.n_vars if panel is None else len(panel)
        self._binning, self._fit = self._choose_binning(binning, n_bins, panel, val_fraction, split_seed)
        if dtype == "float32":
            self._binning, self._fit = None, None
        self.label_categories: dict[str, np.ndarray] = {}
        codes = {}
        for name in labels:
            codes[name], self.label_categories[name] = encode_label(self.store, name)
        self._recipe = Recipe(
            filler=RowFiller(
                self.store.n_vars,
                genes=panel,
                binning=self._binning,
                max_count=int(self.store.max_value) if self.store.is_counts else 0,
                target_sum=target_sum,
                log1p=log1p,
            ),
            codes=codes,
            mask=mask,
            count=masked_count(mask_ratio, self.n_vars),
            noise=noise,
            seed=seed,
            cumulative=cumulative_weights(self.store, self.cells, weights),
            pinned=torch.cuda.is_available() if pin_memory == "auto" else bool(pin_memory),
        )
        self._client = client
        self._pipeline: Pipeline | None = None
        self._pid = os.getpid()
        self.epoch = 0
        self._position = 0
        self._resume_at: int | None = None
        self.wait_seconds = 0.0

    # -- what an epoch is ----------------------------------------------------------------------------------------

    def _shuffle_mode(self, shuffle: bool | str) -> str:
        if shuffle is False:
            return "none"
        if shuffle in ("full", "window"):
            return str(shuffle)
        if shuffle is not True:
            raise UserError(f"unknown shuffle '{shuffle}'; expected True, False, full or window")
        return "full" if self._store_bytes() <= FULL_SHUFFLE_BYTES else "window"

    def _store_bytes(self) -> int:
        arrays = self.store.x_arrays
        return self.store.nnz * (arrays["data"].dtype.itemsize + arrays["indices"].dtype.itemsize)

    def _choose_binning(
        self, binning: Binning | str, n_bins: int, panel: np.ndarray | None, val_fraction: float, split_seed: int
    ) -> tuple[Binning | None, Callable[[], Binning] | None]:
        """The rule that makes tokens, and how to fit the values that they decode to if that is still to be done."""
        if isinstance(binning, Binning):
            return binning, None
        if not self.store.is_counts:
            raise UserError(
                f"{self.store.path} holds real values; pass binning=Binning.fit(kind, n_bins, values=...), or dtype='float32'"
            )

        def fit() -> Binning:
            train = Split(self.store.n_obs, val_fraction, split_seed, "train")
            hist = histogram(self.store, train.cells())
            return Binning.fit(binning, n_bins, hist=hist if panel is None else hist[panel])

        if binning == "counts" or (binning in ("auto", "identity") and self.store.max_value < n_bins):
            # Tokens need no fit here, only decoding does, and that is a pass over the store: left until asked for.
            return Binning("counts", n_bins, None, np.arange(n_bins, dtype=np.float32)), fit
        return fit(), None

    @property
    def binning(self) -> Binning | None:
        """How counts become tokens and tokens counts; fitted on first use. None with `dtype="float32"`."""
        if self._fit is not None:
            self._binning, self._fit = self._fit(), None
        return self._binning

    def _plan(self, start: int) -> RankPlan:
        return RankPlan(self.n_cells, self.batch_size, self.rank, self.world_size, start, self.drop_last, self.pad)

    @property
    def order(self) -> EpochOrder:
        """The sequence of the current epoch."""
        return EpochOrder(self.n_cells, self.seed, self.epoch, self.mode)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return -(-self._plan(0).n_mine // self.batch_size)

    @property
    def bytes_read(self) -> int:
        """Encoded bytes read from the store since the loader began to run, when its shards are read directly."""
        return 0 if self._pipeline is None else self._pipeline.reader.bytes_read

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        if epoch < 0:
            raise UserError(f"epoch is {epoch}; expected 0 or more")
        self.epoch = int(epoch)
        self._position = 0
        self._resume_at = None

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is: after the batches it has been given. The same on every rank, under 1 KB."""
        return {
            "version": 1,
            "epoch": self.epoch,
            "position": self._position,
            "seed": self.seed,
            "n_cells": self.n_cells,
            "mode": self.mode,
            "weighted": self._recipe.cumulative is not None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any number of ranks and with any batch size.

        Raises
        ------
        UserError
            If the state belongs to another sequence: another seed, number of cells or way of shuffling.
        """
        own = self.state_dict()
        for name in ("version", "seed", "n_cells", "mode", "weighted"):
            if state.get(name) != own[name]:
                raise UserError(
                    f"the loader's state has {name} {state.get(name)}, this loader {own[name]}; "
                    "continue with the data and settings it was taken with"
                )
        self.set_epoch(int(state["epoch"]))
        self._position = self._resume_at = int(state["position"])

    # -- running -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        for fields in self._iterate("dense"):
            yield Batch(**fields)

    def as_csr(self) -> Iterator[CSRBatch]:
        """Iterate over the same cells in the same order as float32 CSR matrices: counts, normalised if asked for."""
        for fields in self._iterate("csr"):
            yield CSRBatch(**fields)

    def as_torch_dataset(self) -> TorchDataset:
        """Wrap the loader for `torch.utils.data.DataLoader(dataset, batch_size=None)`."""
        return TorchDataset(self)

    def part(self, index: int, parts: int) -> CellLoader:
        """A loader like this one that takes the `index`-th of `parts` equal shares of this one's cells."""
        other = copy.copy(self)
        other._pipeline, other._pid = None, os.getpid()
        other.rank, other.world_size = self.rank + self.world_size * index, self.world_size * parts
        return other

    def _iterate(self, form: str) -> Iterator[dict[str, Any]]:
        start = self._resume_at or 0
        self._position, self._resume_at = start, None
        span, epoch, plan = self.batch_size * self.world_size, self.epoch, self._plan(start)
        if plan.n_mine == 0:
            return
        batches = self._running().run(plan, self.order, form)
        try:
            for step in itertools.count(1):
                began = time.perf_counter()
                fields = next(batches, None)
                self.wait_seconds += time.perf_counter() - began
                if fields is None:
                    return
                if self.epoch == epoch:
                    self._position = min(start + step * span, self.n_cells)
                yield fields
        finally:
            batches.close()

    def _running(self) -> Pipeline:
        if self._pipeline is not None and self._pid != os.getpid():
            self._pipeline = None  # a fork has the parent's objects and none of its threads
        if self._pipeline is None:
            self._pid = os.getpid()
            fits = self._store_bytes() <= self.memory_budget // 2
            if self.mode == "full" and not fits:
                warn_user(
                    f"{self.store.path} takes {self._store_bytes() >> 20} MiB in memory, more than half of memory_budget; "
                    "a full shuffle then reads it several times per epoch. Raise memory_budget or pass shuffle='window'."
                )
            reader = WholeStore if self.mode == "full" and fits and self._client is None else RowReader
            self._pipeline = Pipeline(
                self._recipe,
                reader(self.store),
                self.cells,
                threads=self.threads,
                memory_budget=self.memory_budget,
                client=self._client,
            )
        return self._pipeline

    def close(self) -> None:
        """Stop the threads and drop the memory; iterating again starts them anew."""
        if self._pipeline is not None and self._pid == os.getpid():
            self._pipeline.close()
        self._pipeline = None

    def __enter__(self) -> CellLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pipeline": None, "_client": None}


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected at least 1")
