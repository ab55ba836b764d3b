"""What a user chooses of a store: cells, genes, labels, weights, memory; each checked against what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sedd.errors import UserError
from sedd.io.plan import CellList, Split
from sedd.io.store import CellStore


def make_split(store: CellStore, split: Any, val_fraction: float, seed: int, limit: int | None) -> Split | CellList:
    """Describe the cells that `split` (a name, a Split, or cell numbers) means, at most `limit` of them."""
    if isinstance(split, str):
        return Split(store.n_obs, val_fraction, seed, split, limit)
    if isinstance(split, Split):
        if split.n_obs != store.n_obs:
            raise UserError(f"the split is of {split.n_obs} cells, {store.path} has {store.n_obs}; make it anew")
        return split if limit is None else Split(split.n_obs, split.val_fraction, split.seed, split.part, limit)
    numbers = np.unique(np.asarray(split.numbers if isinstance(split, CellList) else split, dtype=np.int64))
    if numbers.size and (numbers[0] < 0 or numbers[-1] >= store.n_obs):
        raise UserError(f"split names cells {numbers[0]} to {numbers[-1]}; {store.path} has {store.n_obs} cells")
    if limit is not None and limit < numbers.size:
        numbers = numbers[np.arange(limit) * numbers.size // limit]
    return CellList(numbers)


def find_genes(store: CellStore, genes: Sequence[str] | None) -> np.ndarray | None:
    """Columns of the named genes, None for all of them.

    Raises
    ------
    ValueError
        If a gene is not in the store.
    """
    if genes is None:
        return None
    places = pd.Index(store.var_names).get_indexer(pd.Index([str(gene) for gene in genes]))
    missing = [gene for gene, place in zip(genes, places, strict=True) if place < 0]
    if missing:
        raise UserError(
            f"{store.path}: {len(missing)} of {len(places)} genes are not in the store (first: '{missing[0]}'; "
            f"the store's look like '{store.var_names[0]}'); leave them out or fix their names"
        )
    return places.astype(np.int64)


def label_text(label: object) -> str:
    """Return a label as text: 7, 7.0 and "7" are one; of bytes the text that files keep of them."""
    text = label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label)
    whole = text.removesuffix(".0")
    return whole if whole.lstrip("-").isdigit() else text


def encode_label(store: CellStore, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n_obs,) int64 of a column of `obs`, -1 where it is missing, and the labels behind them.

    Labels that say the same are one; categories that no cell has are none.
    """
    if name not in store.obs_columns:
        there = ", ".join(store.obs_columns) or "none"
        raise UserError(f"{store.path}: no label '{name}' in obs; it has {there}")
    column = store.obs_column(name)
    categorical = column if isinstance(column.dtype, pd.CategoricalDtype) else column.astype("category")
    codes, categories = categorical.cat.codes.to_numpy().astype(np.int64), categorical.cat.categories.to_numpy()
    firsts: dict[str, int] = {}
    for code in np.unique(codes[codes >= 0]).tolist():
        firsts.setdefault(label_text(categories[code]), code)
    number = {text: k for k, text in enumerate(firsts)}
    new = np.array([*(number.get(label_text(label), -1) for label in categories), -1], np.int64)  # the last one for -1
    return new[codes], categories[list(firsts.values())]


def cumulative_weights(store: CellStore, cells: Split | CellList, weights: Any) -> np.ndarray | None:
    """Return the running sum of the weights of the split's cells.

    Parameters
    ----------
    store, cells
    weights : None, (n_obs,) array, or {column: {label: weight}}
        A label that is not named, or missing in a cell, weighs nothing; weights of several columns are multiplied.
    """
    if weights is None:
        return None
    if isinstance(weights, dict):
        per_cell = np.ones(store.n_obs)
        for name, of_label in weights.items():
            codes, categories = encode_label(store, name)
            wanted = {label_text(label): weight for label, weight in of_label.items()}
            labels = [label_text(label) for label in categories]
            unknown = sorted(wanted.keys() - set(labels))
            if unknown:
                raise UserError(
                    f"{store.path}: weights name {unknown[0]!r}, which is no {name} there; there are: {', '.join(labels[:20])}"
                )
            table = np.array([float(wanted.get(label, 0.0)) for label in labels] + [0.0])
            per_cell *= table[codes]
    else:
        per_cell = np.asarray(weights, dtype=np.float64)
    if per_cell.shape != (store.n_obs,):
        raise UserError(f"weights has shape {per_cell.shape}; expected one for each of the store's {store.n_obs} cells")
    mine = per_cell[cells.cells()]
    if not (np.isfinite(mine).all() and bool(np.all(mine >= 0)) and mine.sum() > 0):
        raise UserError("weights must be finite, not negative, and not all zero over the cells of the split")
    return np.cumsum(mine)
