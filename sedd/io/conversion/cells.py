"""The cells of all inputs of a conversion as one table, of which a block of one column is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from sedd.io.conversion.joins import concatenated, source_column
from sedd.io.input.cells import CellTable

ROWS = 1 << 18
"""Rows of a column that are in memory at once, at most."""

CELL = "sedd_cell"
"""The column that says where a cell was, where the store has another order."""

_STAND_INS = {"f": 0.0, "i": 0, "u": 0, "b": False}
"""Values by the kind of a column: pandas forgets the type of a column all of whose values are missing when it joins it to another."""


class JoinedCells:
    """Tables of cells one after the other, as `anndata.concat` would have them.

    Categories are united, what a table lacks is missing, and names of cells that repeat are made unique where there are several inputs.
    Of all this no more than a block is held, but for 8 bytes a cell while names are compared.

    Parameters
    ----------
    tables : of the inputs
    labels : names of the inputs, for a column that says which one a cell is from; None for one input alone
    n_obs : cells to take, the first ones
    order : (n_obs,) numbers of the cells in the order of the store; None for the order of the inputs

    Attributes
    ----------
    first : a row with the columns and types of the first input
    sample : a row of each input, with those of the whole
    news : what is to be said of it
    """

    def __init__(self, tables: list[CellTable], labels: list[str] | None, n_obs: int, order: np.ndarray | None = None) -> None:
        self.tables, self.n_obs, self.order = tables, n_obs, order
        self._labels, self._source = labels, ""
        self.news: list[str] = []
        frames = [_types_of(table) for table in tables]
        self.first = frames[0]
        if labels is not None:
            self._source, self.news = source_column(frames)
            frames = [frame.assign(**{self._source: pd.Categorical([label], [label])}) for frame, label in zip(frames, labels, strict=True)]
        self.sample = frames[0] if labels is None else concatenated(frames, [{}] * len(frames))[0]
        if order is not None:
            self.sample = self.sample.assign(**{CELL: np.zeros(len(self.sample), order.dtype)})
        self._repeated = self._find_repeated()

    def column(self, name: Any) -> Iterator[pd.Series]:
        """Return a column of the store, in blocks, all in one type; `CELL` is where each cell was."""
        if name == CELL and self.order is not None:
            return iter([pd.Series(self.order)])
        return self._ordered(self._blocks(name))

    def names(self) -> Iterator[pd.Index]:
        """Return the names of the cells of the store, in blocks."""
        if self._labels is None or not self._repeated.size:
            return self._ordered(self._own_names())
        return self._ordered(self._made_unique())

    def what_repeats(self) -> str | None:
        """Return what is to be said of names that repeat and are kept; None if none does."""
        if self._labels is not None or not self._repeated.size:
            return None
        number, seen = 0, np.zeros(self._repeated.size, bool)
        first = ""
        for names in self._own_names():
            at, known = self._among_repeated(_hashes(names))
            again = known & (seen[at] | pd.Series(at).where(known).duplicated().to_numpy())
            if again.any() and not number:
                first = str(names[int(np.argmax(again))])
            number += int(again.sum())
            seen[at[known]] = True
        return f"{number} cell names repeat (first: {first!r}); kept as they are."

    # -- blocks --------------------------------------------------------------------------------------------------

    def _ordered(self, blocks: Iterator[Any]) -> Iterator[Any]:
        """Put what comes in blocks into the order of the store, for which all of it is needed."""
        if self.order is None:
            return blocks
        parts = list(blocks)
        whole = pd.concat(parts, ignore_index=True) if isinstance(parts[0], pd.Series) else parts[0].append(parts[1:])
        del parts
        return iter([whole.take(self.order)])

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """Blocks of rows of each input: its number, and from where to where."""
        left = self.n_obs
        for number, table in enumerate(self.tables):
            n = min(left, table.n_rows)
            yield from ((number, lo, min(lo + ROWS, n)) for lo in range(0, n, ROWS))
            left -= n

    def _blocks(self, name: Any) -> Iterator[pd.Series]:
        dtype = self.sample[name].dtype
        for number, lo, hi in self._spans():
            table = self.tables[number]
            if self._labels is not None and name == self._source:
                yield pd.Series(pd.Categorical([self._labels[number]], categories=dtype.categories).repeat(hi - lo))
            elif name in table.columns:
                yield table.column(name, lo, hi).astype(dtype)
            else:
                yield pd.Series(index=range(hi - lo), dtype=dtype)

    # -- names ---------------------------------------------------------------------------------------------------

    def _own_names(self) -> Iterator[pd.Index]:
        return (self.tables[number].names(lo, hi) for number, lo, hi in self._spans())

    def _find_repeated(self) -> np.ndarray:
        """Return the hashes of names that occur more than once, in order; what two of 10 million cells share by chance has odds of 1 to 400,000."""
        hashes, at = np.empty(self.n_obs, np.uint64), 0
        for names in self._own_names():
            hashes[at : at + len(names)] = _hashes(names)
            at += len(names)
        hashes.sort()
        again = hashes[1:] == hashes[:-1]
        self._hashes = hashes if again.any() and self._labels is not None else None
        return np.unique(hashes[1:][again])

    def _among_repeated(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of hashes among those of repeated names, and whether they are there."""
        at = np.searchsorted(self._repeated, hashes)
        at[at == self._repeated.size] = 0
        return at, self._repeated[at] == hashes

    def _made_unique(self) -> Iterator[pd.Index]:
        """Give each name but the first of those that are the same the next number that makes it new, as anndata does."""
        assert self._hashes is not None
        numbers = np.full(self._repeated.size, -1, np.int64)  # that were used, by name; the first has none
        for names in self._own_names():
            at, known = self._among_repeated(_hashes(names))
            rows = np.flatnonzero(known)
            at = at[rows]
            order = np.argsort(at, kind="stable")
            rows, at = rows[order], at[order]  # those of one name together, in their order
            begins = np.flatnonzero(np.diff(at, prepend=-1))
            sizes = np.diff(begins, append=at.size)
            own = numbers[at] + 1 + np.arange(at.size) - np.repeat(begins, sizes)
            texts = names.to_numpy(object)[rows]
            while True:
                new = np.array([f"{text}-{number}" if number else text for text, number in zip(texts, own, strict=True)], object)
                taken = np.flatnonzero((own > 0) & self._is_known(new))
                if not taken.size:
                    break
                taken = taken[np.diff(at[taken], prepend=-1) > 0]  # the first of each name; those after it are numbered on from there
                for k in taken:
                    own[k : begins[np.searchsorted(begins, k, side="right")] if k < begins[-1] else None] += 1
            numbers[at[begins]] = own[np.append(begins[1:], at.size) - 1] if at.size else 0
            whole = names.to_numpy(object).copy()
            whole[rows] = new
            yield pd.Index(whole, dtype=names.dtype)

    def _is_known(self, names: np.ndarray) -> np.ndarray:
        """Whether an input has a cell of this name."""
        assert self._hashes is not None
        hashes = _hashes(pd.Index(names, dtype=object))
        at = np.searchsorted(self._hashes, hashes)
        at[at == self._hashes.size] = 0
        found: np.ndarray = self._hashes[at] == hashes
        return found


def _hashes(names: pd.Index) -> np.ndarray:
    """64 bits of each name."""
    return pd.util.hash_array(names.to_numpy(object), categorize=False)


def _types_of(table: CellTable) -> pd.DataFrame:
    """Return one row with the types of the columns of a table."""
    columns = {}
    for name in table.columns:
        first = table.column(name, 0, 1)
        if first.dtype.kind in _STAND_INS:
            first = pd.Series([_STAND_INS[first.dtype.kind]], dtype=first.dtype)
        elif first.dtype == object or isinstance(first.dtype, pd.StringDtype):
            first = pd.Series([""], dtype=first.dtype)
        columns[name] = first.array
    return pd.DataFrame(columns, index=table.names(0, 1).rename(table.index_name), columns=table.columns or None)
