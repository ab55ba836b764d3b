"""Write a table column by column and block by block, as `write_elements` would write the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import zarr

from sedd.io.format.elements import (
    ROWS,
    TEXT_ROWS,
    array_of,
    text_index,
    writable_table,
    writable_values,
    write_elements,
)
from sedd.io.format.plain import ARRAY, CATEGORICAL, STRINGS, TABLE, Kind, encoding, kind_of, parts_of


def write_blocks(
    group: zarr.Group, key: str, *, sample: pd.DataFrame, n_rows: int, column: Callable[[Any], Iterator[pd.Series]],
    names: Callable[[], Iterator[pd.Index]],
) -> list[str]:  # fmt: skip
    """Write a table into a group of a Zarr store.

    A column is held in memory as a whole only where its type depends on all of its values, as of text some of which is missing.

    Parameters
    ----------
    sample : rows with the columns, their types and the name of the index
    n_rows : of the table
    column : returns the blocks of a column, by its name in the sample
    names : returns the blocks of the index

    Returns
    -------
    notes : what is not quite as it was, a line each
    """

    def is_index(name: Any) -> bool:
        pairs = zip(column(name), names(), strict=True)
        return all((values.astype(str).to_numpy() == index.astype(str).to_numpy()).all() for values, index in pairs)

    written, notes = writable_table(sample, is_index=is_index)
    index = str(written.index.name or "_index")
    more = {"column-order": written.columns.tolist(), "_index": index}
    made = group.create_group(key, attributes=more | encoding(TABLE), overwrite=True)
    _write_column(_place(made, index), index.rpartition("/")[2], lambda: map(_series_of, names()), n_rows)
    for name, new in zip(sample.columns, written.columns, strict=True):
        _write_column(_place(made, new), new.rpartition("/")[2], lambda name=name: column(name), n_rows)  # type: ignore[misc]
    return [f"{key} {note}" for note in notes]


def _place(table: zarr.Group, name: str) -> zarr.Group:
    parent = name.rpartition("/")[0]
    return table.require_group(parent) if parent else table


def _series_of(names: pd.Index) -> pd.Series:
    return pd.Series(text_index(names))


def _element(values: pd.Series) -> Any:
    return array_of(pd.Series(writable_values(values)))


def _write_column(parent: zarr.Group, key: str, blocks: Callable[[], Iterator[pd.Series]], n_rows: int) -> None:
    growing: _Growing | None = None
    for block in blocks():
        element = _element(block)
        kind = kind_of(element)
        settled = kind is not None and (kind != CATEGORICAL or isinstance(block.dtype, pd.CategoricalDtype))
        if not settled or (growing is not None and not growing.fits(kind, element)):
            del growing
            whole = pd.concat(list(blocks()), ignore_index=True)
            write_elements(parent, {key: _element(whole)})
            return
        growing = growing or _Growing(parent, key, kind, element, n_rows)  # type: ignore[arg-type]
        growing.add(element)
    assert growing is not None
    growing.finish()


class _Growing:
    """A column on disk that is not complete yet.

    Parameters
    ----------
    parent, key : where it is to be
    kind, element : of its first rows
    n_rows : it is to have
    """

    def __init__(self, parent: zarr.Group, key: str, kind: Kind, element: Any, n_rows: int) -> None:
        self.kind, self.dtype, self.n_rows = kind, element.dtype, n_rows
        self.arrays: dict[str, _GrowingArray] = {}
        if kind in (ARRAY, STRINGS):
            self.arrays[""] = _GrowingArray(parent, key, np.asarray(element), n_rows)
            return
        attributes, parts = parts_of(kind, element)
        made = parent.create_group(key, attributes=attributes | encoding(kind), overwrite=True)
        for name, part in parts.items():
            if name == "categories":
                write_elements(made, {name: part})
            else:
                self.arrays[name] = _GrowingArray(made, name, part, n_rows)

    def fits(self, kind: Kind | None, element: Any) -> bool:
        """Whether these rows are of the same type as those before them."""
        return kind == self.kind and (kind == STRINGS or bool(element.dtype == self.dtype))

    def add(self, element: Any) -> None:
        """Take rows."""
        parts = {"": element} if "" in self.arrays else parts_of(self.kind, element)[1]
        for name, array in self.arrays.items():
            array.add(np.asarray(parts[name]))

    def finish(self) -> None:
        """Write what is left."""
        for array in self.arrays.values():
            array.finish()


class _GrowingArray:
    """An array that is written chunk by chunk, as its values come."""

    def __init__(self, group: zarr.Group, key: str, values: np.ndarray, n_rows: int) -> None:
        is_text = values.dtype.kind in "OU"
        self.chunk, self.at, self.number = min(TEXT_ROWS if is_text else ROWS, n_rows), 0, 0
        self.waiting: list[np.ndarray] = []
        self.array: Any = group.create_array(
            key, shape=(n_rows,), dtype=str if is_text else values.dtype, chunks=(self.chunk,), overwrite=True,
            attributes=encoding(STRINGS if is_text else ARRAY),
        )  # fmt: skip

    def add(self, values: np.ndarray) -> None:
        self.waiting.append(values)
        self.number += values.size
        if self.number >= self.chunk:
            whole = np.concatenate(self.waiting)
            full = whole.size // self.chunk * self.chunk
            self._write(whole[:full])
            self.waiting, self.number = [whole[full:].copy()], whole.size - full

    def finish(self) -> None:
        if self.number:
            self._write(np.concatenate(self.waiting))
        assert self.at == self.array.shape[0]

    def _write(self, values: np.ndarray) -> None:
        self.array[self.at : self.at + values.size] = values
        self.at += values.size
