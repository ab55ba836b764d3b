"""The cells' table of an input, read column by column and in blocks of rows, so that none of it need be in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sedd.errors import UserError

if TYPE_CHECKING:
    import pandas as pd  # which is imported where tables are read: the matrix can be converted meanwhile


class CellTable:
    """The cells' table of an input that has it in memory; `LazyCells` is one that has not.

    Parameters
    ----------
    frame : the table

    Attributes
    ----------
    n_rows : cells
    columns : names of the columns
    index_name : of the names of the cells
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frame = frame
        self.n_rows, self.columns, self.index_name = len(frame), list(frame.columns), frame.index.name

    def column(self, name: Any, lo: int, hi: int) -> pd.Series:
        """Return rows `lo:hi` of a column."""
        return self._frame[name].iloc[lo:hi]

    def names(self, lo: int, hi: int) -> pd.Index:
        """Names of cells `lo:hi`."""
        return self._frame.index[lo:hi]


class LazyCells(CellTable):
    """A cells' table on disk.

    Parameters
    ----------
    path : of the input, for messages
    columns : names of the columns to read
    index_name : of the names of the cells
    n_rows : cells
    open_column : how a column is read, by its name (None: the names of the cells); returns its length and what reads rows of it
    """

    def __init__(
        self, path: str, columns: list[str], index_name: str | None, n_rows: int,
        open_column: Callable[[str | None], tuple[int, Callable[[int, int], Any]]],
    ) -> None:  # fmt: skip
        self.path, self.columns, self.index_name, self.n_rows = path, columns, index_name, n_rows
        self._open_column = open_column
        self._opened: tuple[str | None, Callable[[int, int], Any]] | None = None

    def column(self, name: str, lo: int, hi: int) -> pd.Series:
        """Return rows `lo:hi` of a column."""
        import pandas as pd

        return pd.Series(self._read(name, lo, hi))

    def names(self, lo: int, hi: int) -> pd.Index:
        """Names of cells `lo:hi`."""
        import pandas as pd

        return pd.Index(self._read(None, lo, hi)).astype(str)

    def _read(self, name: str | None, lo: int, hi: int) -> Any:
        if self._opened is None or self._opened[0] != name:  # one is read to its end before the next
            length, read = self._open_column(name)
            if length != self.n_rows:
                where = "the names of obs" if name is None else f"obs/{name}"
                raise UserError(f"{self.path}: {where} has {length} rows, obs has {self.n_rows}. The file is damaged: copy or write it again.")
            self._opened = name, read
        return self._opened[1](lo, hi)
