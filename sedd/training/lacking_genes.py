"""Genes that the files of some training cells lack: hidden in these cells, and of no part in what they teach."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sedd.errors import warn_user
from sedd.io.format.lacking import Lacking
from sedd.io.loading.batch import Batch
from sedd.io.loading.selection import encode_label
from sedd.io.plan import CellList, Split
from sedd.io.store import CellStore


class LackingGenes:
    """Which genes of the panel nobody counted in which cells of a store.

    Parameters
    ----------
    store
        The training data.
    lacking
        What it says of them.
    genes
        The panel.

    Attributes
    ----------
    column
        Of obs: a loader that is asked for its labels gives batches of which `of` knows what they lack.
    """

    def __init__(self, store: CellStore, lacking: Lacking, genes: list[str] | np.ndarray) -> None:
        self.column = lacking.column
        self._codes, labels = encode_label(store, self.column)
        # By the loader's codes of labels, plus 1: it has -1 for cells without a label.
        self._table = lacking.rows(genes)[[-1, *lacking.codes(labels)]]
        self._on: dict[torch.device, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._table[np.unique(self._codes) + 1].any())

    def of(self, batch: Batch) -> Tensor:
        """Which genes each cell of a batch lacks, (B, n_vars) bool on its device."""
        device = batch.cell.device
        if device not in self._on:
            self._on[device] = torch.from_numpy(self._table).to(device)
        return self._on[device][batch.labels[self.column] + 1]

    def cells_without(self, cells: Split | CellList) -> np.ndarray:
        """In how many of the cells nobody counted each gene, (n_vars,) int64."""
        numbers = np.bincount(self._codes[cells.cells()] + 1, minlength=len(self._table))
        return np.asarray(numbers @ self._table.astype(np.int64))

    def say(self, named: str, n_vars: int) -> None:
        """Say what becomes of them."""
        some = int(self._table.any(0).sum())
        warn_user(
            f"{named}: not all of its files have {some} of the {n_vars} genes of the panel. In cells of a file that lacks a gene the gene is unknown: it is "
            "hidden there, and training takes no zero for it."
        )


def find(store: CellStore, genes: list[str] | np.ndarray) -> LackingGenes | None:
    """Return which of the genes nobody counted in which cells; None where all were counted in all cells."""
    if store.lacking is None or store.lacking.column not in store.obs_columns:
        return None
    found = LackingGenes(store, store.lacking, genes)
    return found if found else None
