"""A loader behind PyTorch's `DataLoader`, for programs that were written against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from sedd.io.loading.batch import Batch


class Loader(Protocol):
    """What the dataset needs of a loader."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""

    def part(self, index: int, parts: int) -> AbstractContextManager[Loader]:
        """Return the loader that takes the `index`-th of `parts` shares of this one's cells, which are as many batches together."""

    def share_position(self) -> None:
        """Let copies of the loader in other processes follow its epoch."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class TorchDataset(IterableDataset[Any]):
    """A loader as a dataset of whole batches: give it to `DataLoader(dataset, batch_size=None)`.

    The loader has threads of its own, so `num_workers=0` is the fast way. With workers, each takes a share: together
    they give every cell of this rank once, in as many batches as without, in an order that depends on their number. Workers that persist have a copy of the
    loader from before the first epoch; its position is in memory that they share, so `set_epoch` reaches them.

    Parameters
    ----------
    loader : CellLoader
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        loader.share_position()

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
