"""CellLoader: a store, an order and the kernels make token batches, ahead of whoever consumes them."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sedd.binning import Binning
from sedd.errors import UserError, warn_user
from sedd.io.format.histogram import histogram
from sedd.io.loading.batch import Batch, CSRBatch
from sedd.io.loading.options import Contents, Order, Running, Selection, check_positive
from sedd.io.loading.pipeline import Pipeline, Recipe
from sedd.io.loading.rows import RowReader, WholeStore
from sedd.io.loading.selection import cumulative_weights, encode_label, find_genes, make_split
from sedd.io.loading.torch_dataset import TorchDataset
from sedd.io.plan import FULL_SHUFFLE_BYTES, EpochOrder, RankSteps, Split
from sedd.io.store import CellStore
from sedd.kernels.gather import EXACT_FLOAT32
from sedd.kernels.mask import masked_count
from sedd.kernels.tokens import RowFiller
from sedd.options import grouped, keywords_of, with_meanings

_GROUPS = (Selection, Contents, Order, Running)


class CellLoader:
    """Batches of tokens from a store, in an order that is a pure function of (seed, epoch).

    Iterating gives the batches of the current epoch: from its start, or once from where `load_state_dict` points. The order does not depend on the batch size, the
    number of threads or ranks or the memory budget; see docs/loader.md.

    Parameters
    ----------
    store : CellStore or path
    batch_size : int
        Cells per batch and rank.
    **options
        Which cells, what a batch holds, in what order, and how it runs:

    Attributes
    ----------
    n_cells : int
        Cells in the split.
    n_vars : int
        Genes in the panel.
    label_categories : dict of str -> array
        The labels behind the codes.
    wait_seconds : float
        Time that the consumer has waited for batches so far.
    """

    @keywords_of(*_GROUPS)
    def __init__(self, store: CellStore | str | os.PathLike[str], *, batch_size: int = 32, **options: Any) -> None:
        check_positive(batch_size=batch_size)
        chosen, contents, order, running = grouped(options, *_GROUPS)
        self.store = store if isinstance(store, CellStore) else CellStore(store)
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, order.rank, order.world_size, order.seed
        self.threads, self.memory_budget, self.drop_last = running.threads, running.memory_budget, order.drop_last
        self.cells = make_split(self.store, chosen.split, chosen.val_fraction, chosen.split_seed, chosen.limit_cells)
        self.n_cells = self.cells.n_cells
        self.pad = (chosen.is_train and order.world_size > 1) if order.pad is None else order.pad
        self.mode = self._shuffle_mode(order.shuffle)
        panel = find_genes(self.store, contents.genes)
        self.n_vars = self.store.n_vars if panel is None else len(panel)
        self.binning = self._choose_binning(contents, panel, chosen)
        self.label_categories: dict[str, np.ndarray] = {}
        codes = {}
        for name in contents.labels:
            codes[name], self.label_categories[name] = encode_label(self.store, name)
        self._recipe = Recipe(
            filler=RowFiller(
                self.store.n_vars,
                genes=panel,
                binning=self.binning,
                max_count=int(self.store.max_value) if self.store.is_counts else 0,
                target_sum=contents.target_sum,
                log1p=contents.log1p,
            ),
            codes=codes,
            mask=contents.mask,
            count=masked_count(contents.mask_ratio, self.n_vars),
            noise=contents.noise,
            seed=order.seed,
            cumulative=cumulative_weights(self.store, self.cells, chosen.weights),
            pinned=torch.cuda.is_available() if running.pin_memory == "auto" else bool(running.pin_memory),
        )
        self._inexact = self.store.is_counts and self.store.max_value > EXACT_FLOAT32 and not (contents.target_sum or contents.log1p)
        self._client = running.client
        self._pipeline: Pipeline | None = None
        self._pid = os.getpid()
        self._part = 0, 1
        self._at = torch.zeros(2, dtype=torch.int64)  # the epoch, and where in it the next iteration starts
        self._position = 0
        self.wait_seconds = 0.0

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._at[0])

    def share_position(self) -> None:
        """Let copies of the loader in other processes follow `set_epoch` and `load_state_dict`."""
        self._at = self._at.share_memory_()

    # -- what an epoch is ----------------------------------------------------------------------------------------

    def _shuffle_mode(self, shuffle: bool | str) -> str:
        if shuffle is False:
            return "none"
        if shuffle in ("full", "window"):
            return str(shuffle)
        return "full" if self._store_bytes() <= FULL_SHUFFLE_BYTES else "window"

    def _store_bytes(self) -> int:
        arrays = self.store.x_arrays
        return self.store.nnz * (arrays["data"].dtype.itemsize + arrays["indices"].dtype.itemsize)

    def _choose_binning(self, contents: Contents, panel: np.ndarray | None, chosen: Selection) -> Binning | None:
        """Return the rule that makes tokens, fitted to the training cells if it has to be; None for numbers."""
        binning = contents.binning
        if contents.dtype == "float32":
            return None
        if isinstance(binning, Binning):
            return binning
        if not self.store.is_counts:
            raise UserError(
                f"{self.store.path} holds real values; pass binning=Binning.fit(kind, n_bins, values=...), or dtype='float32'"
            )
        if binning in ("auto", "counts"):
            return Binning.of_counts()
        val = Split(self.store.n_obs, chosen.val_fraction, chosen.split_seed, "val")
        hist = histogram(self.store, without=val.cells())
        return Binning.fit(binning, contents.n_bins, hist=hist if panel is None else hist[panel])

    def _steps(self, start: int) -> RankSteps:
        return RankSteps(self.n_cells, self.batch_size, self.rank, self.world_size, start, self.drop_last, self.pad, *self._part)

    @property
    def order(self) -> EpochOrder:
        """The sequence of the current epoch."""
        return EpochOrder(self.n_cells, self.seed, self.epoch, self.mode)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return -(-self._steps(0).n_mine // self.batch_size)

    @property
    def bytes_read(self) -> int:
        """Encoded bytes read from the store since the loader began to run, when its shards are read directly."""
        return 0 if self._pipeline is None else self._pipeline.reader.bytes_read

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        if epoch < 0:
            raise UserError(f"epoch is {epoch}; expected 0 or more")
        self._at[0], self._at[1] = int(epoch), 0
        self._position = 0

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
        """Resume where `state_dict` was taken, on any number of ranks and with any batch size.

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
        self._position = int(state["position"])
        self._at[1] = self._position

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
        """Return a loader like this one that takes the `index`-th of `parts` equal shares of this one's cells, in as many batches together."""
        other = copy.copy(self)
        other._pipeline, other._pid, other._at = None, os.getpid(), self._at.clone()
        other._part = index, parts
        return other

    def _iterate(self, form: str) -> Iterator[dict[str, Any]]:
        start = int(self._at[1])
        self._position = start
        self._at[1] = 0
        span, epoch, steps = self.batch_size * self.world_size, self.epoch, self._steps(start)
        if steps.n_mine == 0:
            return
        self._report_inexact(form)
        batches = self._running().run(steps, self.order, form)
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

    def _report_inexact(self, form: str) -> None:
        """Say once that counts of the store are too large for single precision, where they are given in it."""
        if self._inexact and (form == "csr" or self.binning is None):
            self._inexact = False
            warn_user(
                f"{self.store.path} has counts above {EXACT_FLOAT32} (the largest is {int(self.store.max_value)}); float32 rounds them to a relative 6e-8. "
                "Tokens and CellStore.read_rows have them as they are."
            )

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


CellLoader.__doc__ = with_meanings(CellLoader.__doc__, *_GROUPS)
