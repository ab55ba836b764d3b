"""The loader's cells for programs that do not take token batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from torch.utils.data import IterableDataset, get_worker_info

if TYPE_CHECKING:
    from .loader import Batch, CellLoader


@dataclass
class CSRBatch:
    """Cells as a sparse matrix.

    Attributes
    ----------
    x : (B, n_vars) scipy CSR matrix, float32
    cell : (B,) int64
        Row of each cell in the store.
    labels : dict of (B,) int64
        Codes into `CellLoader.label_categories`; -1 where the label is missing.
    """

    x: sp.csr_matrix
    cell: np.ndarray
    labels: dict[str, np.ndarray]


class TorchDataset(IterableDataset[Any]):
    """A loader as a dataset of whole batches: give it to `DataLoader(dataset, batch_size=None)`.

    The loader has threads of its own, so `num_workers=0` is the fast way. With workers, each is a rank of its own: together
    they give every cell of this rank once, in an order that depends on their number.

    Parameters
    ----------
    loader : CellLoader
    """

    def __init__(self, loader: CellLoader) -> None:
        self.loader = loader

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is None:
            yield from self.loader
            return
        with self.loader.part(worker.id, worker.num_workers) as mine:
            yield from mine
