"""Cells of a store for scvi-tools: batches as its models take them, from the threads of a `CellLoader`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sedd.errors import UserError
from sedd.io.loader import CellLoader
from sedd.io.loading.selection import encode_label
from sedd.io.store import CellStore


def scvi_datamodule(
    store: CellStore | str | os.PathLike[str],
    *,
    batch_key: str | None = None,
    genes: Sequence[str] | None = None,
    batch_size: int = 128,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    seed: int = 0,
    threads: int = 2,
    memory_budget: int | str = "2GiB",
) -> Any:
    """Feed scVI from a store: a `LightningDataModule` for one process, which gives what scVI itself would read of the same cells.

    Parameters
    ----------
    store : CellStore or path
        Of counts.
    batch_key : str, optional
        Column of obs whose labels are scVI's batches; one batch if None. No cell may lack a label.
    genes : list of str, optional
        The genes, in this order; all by default.
    batch_size : int
        Cells per batch.
    val_fraction, split_seed
        Validation cells, as `CellLoader` and `sedd train` choose them; 0 trains on all cells.
    seed
        Of the order, which is another one in each epoch.
    threads, memory_budget
        As in `CellLoader`.

    Returns
    -------
    cells : LightningDataModule
        `registry` makes the model and `train(datamodule=cells)` trains it; `inference_dataloader()` gives all cells in the order of the
        store. Batches are dicts of `X` (B, n_vars) float32 counts, `batch` (B, 1) int64 and `labels` (B, 1) int64, all 0.

    Raises
    ------
    UserError
        If lightning, which scvi-tools needs, is not installed; if the store has no counts; if a cell has no label in `batch_key`.

    Examples
    --------
    >>> cells = sedd.io.scvi_datamodule("atlas.zarr", batch_key="donor")  # doctest: +SKIP
    >>> model = scvi.model.SCVI(registry=cells.registry)  # doctest: +SKIP
    >>> model.train(max_epochs=20, datamodule=cells)  # doctest: +SKIP
    >>> latent = model.get_latent_representation(dataloader=cells.inference_dataloader())  # doctest: +SKIP
    """
    try:
        from lightning.pytorch import LightningDataModule
    except ModuleNotFoundError as error:
        raise UserError("scvi_datamodule needs lightning and scvi-tools, which are not installed: pip install 'sedd[scvi]'.") from error
    store = store if isinstance(store, CellStore) else CellStore(store)
    if not store.is_counts:
        raise UserError(f"{store.path} holds real values; scVI expects counts. Convert the layer or .raw that has them.")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; expected a share from 0 to below 1.")
    if batch_key is not None:
        missing = np.flatnonzero(encode_label(store, batch_key)[0] < 0)
        if len(missing):
            raise UserError(
                f"{store.path}: {len(missing)} of {store.n_obs} cells have no label in {batch_key!r} (first: cell {missing[0]}, counted from 0), and scVI "
                "takes no missing batch. Give them a label, such as 'unknown', and convert again, or name another column."
            )
    common: dict[str, Any] = {
        **{"batch_size": batch_size, "genes": genes, "labels": [batch_key] if batch_key is not None else []},
        **{"dtype": "float32", "mask": None, "seed": seed, "threads": threads, "memory_budget": memory_budget},
    }
    made = type("ScviCells", (ScviCells, LightningDataModule), {"__doc__": ScviCells.__doc__})
    return made(store, batch_key, {"val_fraction": val_fraction, "split_seed": split_seed}, common)


class ScviBatches:
    """Batches of a loader as scvi-tools names their parts; each iteration is an epoch."""

    def __init__(self, loader: CellLoader, batch_key: str | None) -> None:
        self.loader, self.batch_key, self._epoch = loader, batch_key, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.loader.set_epoch(self._epoch)
        self._epoch += 1
        for batch in self.loader:
            zeros = torch.zeros((len(batch), 1), dtype=torch.int64)
            of = zeros if self.batch_key is None else batch.labels[self.batch_key][:, None]
            yield {"X": batch.tokens, "batch": of, "labels": zeros}


class ScviCells:
    """Training, validation and all cells of a store, with what scvi-tools asks of a data module."""

    def __init__(self, store: CellStore, batch_key: str | None, split: dict[str, Any], common: dict[str, Any]) -> None:
        super().__init__()
        self.store, self.batch_key, self._split, self._common = store, batch_key, split, common
        part = "train" if split["val_fraction"] else "all"
        self._train = ScviBatches(self._loader(split=part, shuffle=True), batch_key)
        self.n_vars, self.n_obs = self._train.loader.n_vars, store.n_obs
        self.batch_labels = np.array([0]) if batch_key is None else self._train.loader.label_categories[batch_key]
        self.n_batch, self.n_labels = len(self.batch_labels), 1

    def _loader(self, **which: Any) -> CellLoader:
        return CellLoader(self.store, **self._common, **self._split, **which)

    def train_dataloader(self) -> ScviBatches:
        """Return the training cells, in another order each time."""
        return self._train

    def val_dataloader(self) -> ScviBatches | list[Any]:
        """Return the validation cells; none where all are trained on."""
        return ScviBatches(self._loader(split="val", shuffle=False), self.batch_key) if self._split["val_fraction"] else []

    def inference_dataloader(self) -> ScviBatches:
        """Return all cells in the order of the store."""
        return ScviBatches(self._loader(split="all", shuffle=False), self.batch_key)

    @property
    def registry(self) -> dict[str, Any]:
        """What `SCVI(registry=...)` wants to know of the data."""
        from scvi import __version__

        def field(name: str | None, key: str | None, state: dict[str, Any], stats: dict[str, int]) -> dict[str, Any]:
            return {"data_registry": {"attr_name": name, "attr_key": key} if name else {}, "state_registry": state, "summary_stats": stats}

        names = self.store.var_names if self._common["genes"] is None else np.array(self._common["genes"], dtype=str)
        x = {"n_obs": self.n_obs, "n_vars": self.n_vars, "column_names": names}
        batch = {"categorical_mapping": self.batch_labels, "original_key": self.batch_key}
        labels = {"categorical_mapping": np.array([0]), "original_key": None, "unlabeled_category": None}
        none = field(None, None, {}, {})
        return {
            "scvi_version": __version__,
            "model_name": "SCVI",
            "setup_args": {
                **{"layer": None, "batch_key": self.batch_key, "labels_key": None, "size_factor_key": None},
                **{"categorical_covariate_keys": None, "continuous_covariate_keys": None},
            },
            "field_registries": {
                "X": field("X", None, x, {"n_vars": self.n_vars, "n_cells": self.n_obs}),
                "batch": field("obs", "_scvi_batch", batch, {"n_batch": self.n_batch}),
                "labels": field("obs", "_scvi_labels", labels, {"n_labels": 1}),
                **dict.fromkeys(("size_factor", "extra_categorical_covs", "extra_continuous_covs"), none),
            },
            "setup_method_name": "setup_datamodule",
        }
