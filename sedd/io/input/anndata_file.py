"""AnnData as it lies in an HDF5 file or a Zarr store, of any age: `.h5ad`, `.zarr`, and the modalities of MuData.

Tables and mappings (`obs`, `var`, `obsm`, `uns`) are read by anndata, those of anndata 0.6 (compound datasets) here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from sedd.errors import UserError
from sedd.io.input.base import Input, Naming
from sedd.io.input.cells import CellTable, LazyCells
from sedd.io.input.faults import READ_ERRORS, reading
from sedd.io.input.matrix import Matrix
from sedd.io.input.slices import is_array

if TYPE_CHECKING:
    import pandas as pd  # which is imported where tables are read: the matrix can be converted meanwhile


class AnnDataFile(Input):
    """AnnData in a group of an HDF5 file or a Zarr store.

    Parameters
    ----------
    root : the group that holds `X`, `obs`, `var`, ...
    close : called when it is let go
    remote : whether each read costs a round trip over a network
    """

    kind = "AnnData"

    def __init__(
        self, path: str, root: Any, naming: Naming, close: Callable[[], None], *, remote: bool = False, kind: str = ""
    ) -> None:
        super().__init__(path, naming)
        self.root, self._close, self._remote = root, close, remote
        self.kind = kind or self.kind  # type: ignore[misc]

    def close(self) -> None:
        """Close the file."""
        self._close()

    @property
    def has_x(self) -> bool:
        """Whether there is a main matrix."""
        return "X" in self.root

    @property
    def layers(self) -> list[str]:
        """Names of the layers; those with a slash lie in groups."""
        group = self.root.get("layers")
        return [] if group is None or is_array(group) else _matrices_in(group)

    @property
    def has_raw(self) -> bool:
        """Whether the file keeps a `.raw` matrix."""
        return "raw/X" in self.root or "raw.X" in self.root

    def _matrix(self, layer: str | None, raw: bool) -> Matrix:
        name = f"layers/{layer}" if layer is not None else "X"
        if raw:
            name = "raw/X" if "raw/X" in self.root else "raw.X"
        with reading(self.path, name):
            node = self.root.get(name)
            if node is None:
                raise self._no_matrix(name)
            return Matrix(self.path, node, name, remote=self._remote)

    @property
    def n_obs(self) -> int:
        """Rows of `obs`."""
        return self._length("obs")

    def n_vars(self, raw: bool = False) -> int:
        """Rows of `var` (of `.raw.var`)."""
        return self._length(self._var_name(raw))

    def _var_name(self, raw: bool) -> str:
        return ("raw/var" if "raw/var" in self.root else "raw.var") if raw else "var"

    def _length(self, name: str) -> int:
        with reading(self.path, name):
            if name not in self.root:
                return self._width(name)
            index = self._index(name)
            if not is_array(index):
                index = index["codes" if "codes" in index else "values"]
            return int(index.shape[0])

    def _index(self, table: str) -> Any:
        """Find what holds the names of a table: itself if it is a compound dataset, else an array or an encoded group."""
        node = self.root[table]
        return node if is_array(node) else node[_text(node.attrs.get("_index", "_index"))]

    def _width(self, name: str) -> int:
        """Rows that a table which is not there would have, from the shape of its matrix."""
        matrix = self.root["raw/X" if name.startswith("raw") else "X"]
        shape = matrix.shape if is_array(matrix) else matrix.attrs["shape"]
        return int(shape[0 if name == "obs" else 1])

    def name(self, table: str, row: int, raw: bool = False) -> str:
        """Name of row `row` of "obs" or "var", for messages."""
        place = "obs" if table == "obs" else self._var_name(raw)
        try:
            if table == "var" and self.naming != Naming():
                return repr(self.var_names(raw)[row])
            index = self._index(place)
            value = (index if isinstance(index, h5py.Dataset) else _read_quietly(index))[row]
            if index.name == f"/{place}":  # a row of a compound dataset
                value = value[0]
            return repr(value.decode() if isinstance(value, bytes) else str(value))
        except (*READ_ERRORS, UserError):  # the message matters more than the name in it
            return "?"

    @property
    def obs_names(self) -> list[str]:
        """Names of the cells."""
        return self._names("obs")

    def var_names(self, raw: bool = False, drop: tuple[str, ...] = ()) -> list[str]:
        """Names of the genes; they may repeat."""
        if self.naming != Naming():
            return super().var_names(raw, drop)
        return self._names(self._var_name(raw))

    def _names(self, table: str) -> list[str]:
        with reading(self.path, table):
            node = self.root.get(table)
            if node is not None and not is_array(node):
                index = self._index(table)
                if not isinstance(index, h5py.Dataset):
                    return [str(name) for name in _read_quietly(index)]
                if h5py.check_string_dtype(index.dtype):
                    return [str(name) for name in index.asstr()[:]]
            return [str(name) for name in self._frame(table).index]

    def _obs(self, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        return self._frame("obs", drop)

    def cells(self, columns: list[str] | None = None, drop: tuple[str, ...] = ()) -> CellTable:
        """Return what `obs` returns, to be read in blocks of rows; tables from before anndata 0.8 are read whole."""
        node = self.root.get("obs")
        if node is None or is_array(node):
            return super().cells(columns, drop)
        with reading(self.path, "obs"):
            there = [_text(name) for name in node.attrs["column-order"] if f"obs/{_text(name)}" not in drop]
            index, n_rows = _text(node.attrs.get("_index", "_index")), self.n_obs
            if any(name in node and "categories" in node[name].attrs for name in there):  # codes that only their table can tell from numbers
                return super().cells(columns, drop)

        def open_column(name: str | None) -> tuple[int, Callable[[int, int], Any]]:
            place = "obs" if name is None else f"obs/{name}"
            with reading(self.path, place, _leave_out(place) if name is not None else ""):
                length, read = _rows_of(node[index if name is None else name])

            def read_there(lo: int, hi: int) -> Any:
                with reading(self.path, place, _leave_out(place) if name is not None else ""):
                    return read(lo, hi)

            return length, read_there

        name = None if index == "_index" else index
        return LazyCells(self.path, self._wanted(columns, there), name, n_rows, open_column)

    def _var(self, raw: bool = False, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        return self._frame(self._var_name(raw), drop)

    def _frame(self, name: str, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        import pandas as pd

        from sedd.io.format.plain import native_table

        group = "obs" if name == "obs" else "var"
        unwanted = {own.removeprefix(f"{group}/") for own in drop if own.startswith(f"{group}/")}
        with reading(self.path, name):
            if name not in self.root:
                return pd.DataFrame(index=np.arange(self._length(name)).astype(str))
            node = self.root[name]
            if is_array(node):
                frame = native_table(_compound_frame(node, self.root.get("uns")))
                return frame.drop(columns=[column for column in frame if column in unwanted])
            if unwanted:
                frame = self._by_columns(name, node, group, unwanted)
            else:
                try:
                    frame = _read_quietly(node)
                except READ_ERRORS:
                    frame = self._by_columns(name, node, group, unwanted)  # which names the one that cannot be read
            frame = native_table(frame)
            frame.index = frame.index.astype(str)
            return frame

    def _by_columns(self, name: str, node: Any, group: str, unwanted: set[str]) -> pd.DataFrame:
        """Read a table column by column."""
        import pandas as pd

        columns = [_text(column) for column in node.attrs["column-order"] if _text(column) not in unwanted]
        index = _text(node.attrs.get("_index", "_index"))
        found = {}
        for column in columns:
            with reading(self.path, f"{name}/{column}", _leave_out(f"{group}/{column}")):
                found[column] = _read_quietly(node[column])
        frame = pd.DataFrame(found, index=pd.Index(_read_quietly(node[index])), columns=columns or None)
        frame.index.name = None if index == "_index" else index
        return frame

    def mapping(self, name: str, drop: tuple[str, ...] = ()) -> dict[str, Any]:
        """`obsm`, `varm` or `uns` as a dict, without the elements in `drop`; empty when absent."""
        if name not in self.root or name in drop:
            return {}
        with reading(self.path, name, _leave_out(name)):
            node = self.root[name]
            if is_array(node):  # anndata 0.6: one compound column per array
                rows = node[:]
                return {key: np.asarray(rows[key]) for key in rows.dtype.names if f"{name}/{key}" not in drop}
            found: dict[str, Any] = {}
            categories = self._categories() if name == "uns" else set()
            for key in (key for key in node if key not in categories and f"{name}/{key}" not in drop):
                with reading(self.path, f"{name}/{key}", _leave_out(f"{name}/{key}")):
                    found[key] = _read_quietly(node[key])
            return found

    def _categories(self) -> set[str]:
        """Return what anndata 0.6 kept in `uns` of the tables: the categories of their columns."""
        tables = [self.root.get(name) for name in ("obs", "var", "raw.var")]
        types = [table.dtype for table in tables if table is not None and is_array(table)]
        return {f"{name}_categories" for dtype in types for name in dtype.names or () if dtype[name].kind in "iu"}

    def elements(self) -> list[str]:
        """Names of what `drop` can leave out."""
        found: list[str] = []
        for name in ("obs", "var", "obsm", "uns"):
            node = self.root.get(name)
            if node is None:
                continue
            if is_array(node):
                keys = list(node.dtype.names or ())
            else:
                with reading(self.path, name):
                    keys = [_text(key) for key in node.attrs.get("column-order", node)] if name in ("obs", "var") else list(node)
            found += [f"{name}/{key}" for key in keys]
        return found


def _leave_out(element: str) -> str:
    return f"The anndata that is installed does not read it; leave it out with --drop {element}."


def _matrices_in(group: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name in group:
        node = group[name]
        plain = is_array(node) or "data" in node or "encoding-type" in node.attrs
        found += [prefix + name] if plain else _matrices_in(node, f"{prefix}{name}/")
    return found


def _read_quietly(node: Any) -> Any:
    """Return an element of any age; that it is old is no news to the user."""
    from sedd.io.format.plain import read_element  # imports pandas, which is needed for tables alone

    if is_array(node) and node.dtype.kind == "S":  # text of old files and other writers, which anndata takes for ASCII
        return _decoded(node[()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read_element(node)
        except READ_ERRORS:
            raise
        except Exception as error:  # anndata has types of its own for what a damaged attribute makes of an element
            raise ValueError(str(error)) from error


def _rows_of(node: Any) -> tuple[int, Callable[[int, int], Any]]:
    """Return how long a column is and what reads rows of it; one of an uncommon encoding is read whole, once."""
    from sedd.io.format.plain import rows_of

    found = None if is_array(node) and node.dtype.kind == "S" else rows_of(node)
    if found is not None:
        return found
    whole = _read_quietly(node)
    return len(whole), lambda lo, hi: whole[lo:hi]


def _decoded(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else np.char.decode(value, "utf-8", "replace")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _compound_frame(node: h5py.Dataset, uns: Any) -> pd.DataFrame:
    """Return a table of anndata 0.6: a compound dataset, with the categories of column `c` in `uns["c_categories"]`."""
    import pandas as pd

    rows = node[:]
    names = list(rows.dtype.names)
    columns: dict[str, Any] = {}
    for name in names:
        values = rows[name]
        if values.dtype.kind in "SO":
            values = np.array([v.decode() if isinstance(v, bytes) else str(v) for v in values], dtype=object)
        key = f"{name}_categories"
        if uns is not None and not is_array(uns) and key in uns and values.dtype.kind in "iu":
            categories = [c.decode() if isinstance(c, bytes) else c for c in np.atleast_1d(uns[key][()])]
            columns[name] = pd.Categorical.from_codes(values.astype(np.int64), pd.Index(categories))
        else:
            columns[name] = values
    index = "index" if "index" in names else "_index" if "_index" in names else names[0]
    frame = pd.DataFrame(columns)
    frame.index = pd.Index(frame.pop(index).astype(str), name=None)
    return frame
