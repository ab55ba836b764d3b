"""Columns of obs that a model is conditioned on: their labels, and how frequent these are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd

from sedd.errors import UserError, counted, warn_user
from sedd.io.loading.selection import encode_label, label_text
from sedd.io.plan import Split
from sedd.io.store import CellStore
from sedd.training.first_look import check_column

_MAX_CATEGORIES = 1000


def labels_of(store: CellStore, column: str) -> list[str]:
    """Return the labels of an obs column that a model can be conditioned on."""
    check_column(column, store.obs_columns)
    values = store.obs_column(column)
    there = values.dropna()
    if pd.api.types.is_float_dtype(values) and not (there == there.round()).all():  # numbers of clusters are labels
        raise UserError(f"--condition {column}: is continuous ({values.dtype}); expected labels such as cell types.")
    labels = [label_text(label) for label in encode_label(store, column)[1]]  # the loader's order: its codes index these
    if not 2 <= len(labels) <= _MAX_CATEGORIES:
        raise UserError(
            f"--condition {column}: has {len(labels)} different labels; expected between 2 and {_MAX_CATEGORIES} to tell cells apart."
        )
    if len(labels) * 2 > len(there):
        warn_user(
            f"--condition {column}: has {len(labels)} different labels for {counted(len(there), 'cell')}, as names of cells have; a model "
            "learns nothing from a label that hardly two cells have in common. Leave it out, or take one that groups cells."
        )
    for label in [label for label in labels if label.strip() in _NO_LABEL][:1]:
        warn_user(
            f"--condition {column}: {label!r} is learned as a label like any other. If it means that a cell has none, leave it missing: "
            f"adata.obs[{column!r}] = adata.obs[{column!r}].where(adata.obs[{column!r}] != {label!r})."
        )
    alike = [label for label, n in Counter(" ".join(label.split()).casefold() for label in labels).items() if n > 1]
    if alike:
        pair = [label for label in labels if " ".join(label.split()).casefold() == alike[0]][:2]
        warn_user(
            f"--condition {column}: {pair[0]!r} and {pair[1]!r} are learned as two labels. If they are one, give them one name: "
            f"adata.obs[{column!r}] = adata.obs[{column!r}].replace({{{pair[1]!r}: {pair[0]!r}}})."
        )
    return labels


_NO_LABEL = {"", "nan", "NaN", "NA", "N/A", "None", "<NA>"}
"""What missing labels become as text."""


def shares_of(store: CellStore, train: Split, column: str) -> np.ndarray:
    """Return how often each label occurs among the training cells that have one, with a pseudo-count each."""
    codes, labels = encode_label(store, column)
    here = np.asarray(codes)[train.cells()]
    counted = np.bincount(here[here >= 0], minlength=len(labels)) + 1.0
    return np.asarray(counted / counted.sum())
