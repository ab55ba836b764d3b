"""A table as JSON has it: with its types, categories and missing values, and without anything that a file could run."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sedd.io.format.elements import writable_values


def packed_table(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return the columns of a table by name; dates and mixed values become text, as in files."""
    packed: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(table.columns):
        values = pd.Series(writable_values(table.iloc[:, k]))
        if isinstance(values.dtype, pd.CategoricalDtype):
            labels = values.cat.categories
            packed[str(name)] = {
                "codes": values.cat.codes.tolist(),
                "categories": labels.tolist(),
                "dtype": str(labels.dtype),
                "ordered": bool(values.cat.ordered),
            }
        else:
            missing = values.isna().tolist()
            plain = [None if absent else value for value, absent in zip(values.tolist(), missing, strict=True)]
            packed[str(name)] = {"values": plain, "dtype": str(values.dtype)}
    return packed


def unpacked_table(packed: dict[str, dict[str, Any]], index: pd.Index) -> pd.DataFrame:
    """Return the table that `packed_table` was given."""
    columns: dict[str, Any] = {}
    for name, column in packed.items():
        if "codes" in column:
            labels = pd.Index(column["categories"], dtype=column["dtype"])
            columns[name] = pd.Categorical.from_codes(column["codes"], labels, ordered=column["ordered"])
        else:
            columns[name] = pd.Series(column["values"], dtype=column["dtype"]).array
    return pd.DataFrame(columns, index=index)
