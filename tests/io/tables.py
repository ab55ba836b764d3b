"""Random tables of every type that files hold, with missing values and names of any characters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from hypothesis import strategies as st

NAMES = [
    "G1/S",
    "CD4+/CD8-",
    "a/b/c",
    "_index",
    "source",
    "sedd_cell",
    "barcode",
    "index",
    " ",
    "ünï",
    "..",
    "x\\y",
    "zarr.json",
    "c",
    "0",
    "G1",
]
TEXTS = ["B", "T cell", "nan", "", "ünï", "a/b"]
KINDS: dict[str, Any] = {
    "text": lambda rng, n: rng.choice(TEXTS, n).astype(object),
    "category": lambda rng, n: pd.Categorical(
        rng.choice(["x", "y"], n), categories=["unused", "y", "x"], ordered=bool(rng.integers(2))
    ),
    "number labels": lambda rng, n: pd.Categorical(rng.integers(3, 5, n), categories=[4, 3, 9]),
    "string": lambda rng, n: pd.array(rng.choice(TEXTS, n), dtype="string"),
    "Int64": lambda rng, n: pd.array(rng.integers(-9, 9, n), dtype="Int64"),
    "boolean": lambda rng, n: pd.array(rng.integers(0, 2, n).astype(bool), dtype="boolean"),
    "float32": lambda rng, n: rng.normal(size=n).astype(np.float32),
    "float64": lambda rng, n: rng.normal(size=n),
    "int8": lambda rng, n: rng.integers(-9, 9, n).astype(np.int8),
    "uint64": lambda rng, n: rng.integers(0, 9, n).astype(np.uint64),
    "bool": lambda rng, n: rng.integers(0, 2, n).astype(bool),
}
HOLDS_MISSING = {
    "category": None,
    "number labels": None,
    "string": pd.NA,
    "Int64": pd.NA,
    "boolean": pd.NA,
    "float32": np.nan,
    "float64": np.nan,
}


def column(kind: str, n: int, missing: bool, seed: int) -> pd.Series:
    """One column; about a third of its values are missing where its type can hold that."""
    rng = np.random.default_rng(seed)
    values = pd.Series(KINDS[kind](rng, n))
    if missing and kind in HOLDS_MISSING:
        values[rng.random(n) < 0.3] = HOLDS_MISSING[kind]
    return values


def tables(index: list[str], names: list[str] | None = None) -> st.SearchStrategy[pd.DataFrame]:
    """Tables with these rows and some columns of any type."""
    own = st.tuples(st.sampled_from(sorted(KINDS)), st.booleans(), st.integers(0, 999))
    columns = st.dictionaries(st.sampled_from(names or NAMES), own, max_size=6)
    return st.builds(
        lambda columns, name: _table(index, columns, name), columns, st.sampled_from([None, "barcode", "cell", "q/r"])
    )


def _table(index: list[str], columns: dict[str, tuple[str, bool, int]], name: str | None) -> pd.DataFrame:
    made = {key: column(kind, len(index), missing, seed).array for key, (kind, missing, seed) in columns.items()}
    return pd.DataFrame(made, index=pd.Index(index, name=name))
