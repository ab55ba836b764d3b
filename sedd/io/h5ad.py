"""Read an `.h5ad` of any age and layout, a block of rows (or columns) at a time.

`H5ad(path)` opens the file and finds its matrices; `Matrix` reads blocks of one of them. Frames and mappings (`obs`, `var`,
`obsm`, `uns`) are read by anndata, those of anndata 0.6 (compound datasets) here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from sedd.errors import UserError
from sedd.io.conversion.hdf5 import Reader
from sedd.io.remote import filesystem

if TYPE_CHECKING:
    import pandas as pd  # which is imported where tables are read: the matrix can be converted meanwhile

HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
"""What h5py raises when the file is damaged."""


@contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """Turn whatever a damaged file makes h5py raise into one line that names the file and the place."""
    try:
        yield
    except UserError:
        raise
    except HDF5_ERRORS as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot read {what} ({detail}). Is the file complete? Copy it again.") from error


class Matrix:
    """One matrix of an h5ad: `layout` is "csr", "csc" or "dense"; `shape` is (cells, genes).

    Attributes
    ----------
    name : where it is, `X`, `layers/counts` or `raw/X`
    dtype : of the values as stored
    nnz : stored values, None when dense
    """

    def __init__(self, path: str, node: h5py.Group | h5py.Dataset, name: str, *, remote: bool = False) -> None:
        self.path, self.name, self._remote = path, name, remote
        self.data: Reader
        self.nnz: int | None
        if isinstance(node, h5py.Dataset):
            self._open_dense(node)
        else:
            self._open_sparse(node)

    def _open_dense(self, node: h5py.Dataset) -> None:
        if node.ndim != 2:
            raise UserError(f"{self.path}: {self.name} has {node.ndim} dimensions, expected 2 (cells x genes).")
        self.layout, self.nnz = "dense", None
        self.shape = (int(node.shape[0]), int(node.shape[1]))
        self.data = self._reader(node)
        self.dtype = self.data.dtype

    def _open_sparse(self, node: h5py.Group) -> None:
        encoding = _text(node.attrs.get("encoding-type", b"")) or _text(node.attrs.get("h5sparse_format", b"")) + "_matrix"
        shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
        missing = [key for key in ("data", "indices", "indptr") if not isinstance(node.get(key), h5py.Dataset)]
        if encoding not in ("csr_matrix", "csc_matrix") or shape is None or missing:
            found = f"encoding {encoding!r}" + (f" without {', '.join(missing)}" if missing else "")
            raise UserError(f"{self.path}: {self.name} is not a matrix ({found}); expected csr, csc or a dense array.")
        self.layout = encoding[:3]
        if np.size(shape) != 2 or min(int(n) for n in shape) < 0:
            raise UserError(f"{self.path}: {self.name} has the shape {shape}, expected (cells, genes).")
        self.shape = (int(shape[0]), int(shape[1]))
        self.data, self.indices = self._reader(node["data"]), self._reader(node["indices"])
        self._indptr = self._reader(node["indptr"])
        self.dtype = self.data.dtype
        if any(array.dtype.kind not in "iu" for array in (self.indices, self._indptr)):
            raise UserError(f"{self.path}: {self.name} has indices that are not integers.")
        if any(len(array.shape) != 1 for array in (self.data, self.indices, self._indptr)):
            raise UserError(f"{self.path}: the arrays of {self.name} are not one-dimensional.")
        self.nnz = self.data.shape[0]
        if self.indices.shape[0] != self.nnz:
            raise UserError(
                f"{self.path}: {self.name} has {self.nnz} values but {self.indices.shape[0]} indices. Copy it again."
            )

    def _reader(self, node: h5py.Dataset) -> Reader:
        if node.dtype.kind not in "iufb":
            raise UserError(f"{self.path}: {self.name} holds {node.dtype}, expected numbers.")
        return Reader(node, remote=self._remote)

    @property
    def n_major(self) -> int:
        """Rows of CSR and dense, columns of CSC: what `read_major` counts in."""
        return self.shape[1] if self.layout == "csc" else self.shape[0]

    @cached_property
    def indptr(self) -> np.ndarray:
        """Row (CSR) or column (CSC) pointers, int64, checked to increase from 0 to the number of values."""
        with reading(self.path, f"{self.name}/indptr"):
            raw = self._indptr.read(0, self._indptr.shape[0])
        indptr = raw.astype(np.int64)
        axis = "genes" if self.layout == "csc" else "cells"
        if indptr.size != self.n_major + 1:
            raise UserError(
                f"{self.path}: {self.name} has {self.n_major} {axis} but {indptr.size} row pointers. Copy it again."
            )
        steps = np.diff(indptr)
        if indptr[0] != 0 or indptr[-1] != self.nnz or (steps < 0).any():
            at = int(np.argmax(steps < 0)) if (steps < 0).any() else 0 if indptr[0] else indptr.size - 1
            raise UserError(
                f"{self.path}: {self.name}/indptr does not increase from 0 to {self.nnz} (see position {at}). Copy it again."
            )
        return indptr

    def read_major(self, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of CSR, or columns of CSC, `lo:hi` as `(indptr, indices, data)`, dtypes as stored, `indptr` from 0."""
        start, stop = int(self.indptr[lo]), int(self.indptr[hi])
        with reading(self.path, f"{self.name}/indices [{start}:{stop}]"):
            indices = self.indices.read(start, stop)
        with reading(self.path, f"{self.name}/data [{start}:{stop}]"):
            data = self.data.read(start, stop)
        return self.indptr[lo : hi + 1] - start, indices, data

    def slices(self, name: str, start: int, stop: int, at_most: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Entries `start:stop` of `indices` or `data` slice by slice, as `(place after start, values)`."""
        reader = self.indices if name == "indices" else self.data
        with reading(self.path, f"{self.name}/{name} [{start}:{stop}]"):
            yield from reader.slices(start, stop, at_most or stop - start)

    def entries(self, start: int, stop: int, at_most: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Entries `start:stop` slice by slice, as `(place, indices, data)`; hardly more than `at_most` in memory."""
        both = [self.slices(name, start, stop, at_most) for name in ("indices", "data")]
        indices = data = np.empty(0)
        while start < stop:
            indices, data = (own if own.size else next(more)[1] for own, more in zip((indices, data), both, strict=True))
            n = min(indices.size, data.size)  # chunks of the two may differ
            yield start, indices[:n], data[:n]
            start, indices, data = start + n, indices[n:], data[n:]

    def read_dense(self, lo: int, hi: int) -> np.ndarray:
        """Rows `lo:hi` of a dense matrix."""
        with reading(self.path, f"{self.name} rows [{lo}:{hi}]"):
            return self.data.read(lo, hi)

    def read_rows(self, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows `lo:hi` of any layout as CSR. For CSC this reads the whole matrix, in bounded steps."""
        if self.layout == "csr":
            return self.read_major(lo, hi)
        if self.layout == "dense":
            block = self.read_dense(lo, hi)
            rows, cols = np.nonzero(block)
            indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=hi - lo))])
            return indptr.astype(np.int64), cols, block[rows, cols]
        blocks = [self._rows_of_columns(lo, hi, *span) for span in self.spans(1 << 22)]
        rows, cols, data = (np.concatenate(part) for part in zip(*blocks, strict=True))
        order = np.argsort(rows, kind="stable")
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=hi - lo))])
        return indptr.astype(np.int64), cols[order], data[order]

    def _rows_of_columns(self, lo: int, hi: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        indptr, rows, data = self.read_major(first, last)
        wanted = (rows >= lo) & (rows < hi)
        cols = np.repeat(np.arange(first, last), np.diff(indptr))
        return rows[wanted].astype(np.int64) - lo, cols[wanted], data[wanted]

    def spans(self, n_values: int) -> list[tuple[int, int]]:
        """Cut the rows (columns for CSC) into spans of about `n_values` stored values, at least one row each."""
        if self.layout == "dense":
            step = max(1, n_values // max(1, self.shape[1]))
            edges = np.arange(0, self.n_major, step)
        else:
            marks = np.arange(0, max(1, self.nnz or 0), max(1, n_values))
            edges = np.unique(np.searchsorted(self.indptr[:-1], marks, side="right") - 1)
            edges[:1] = 0
        stops = np.append(edges[1:], self.n_major)
        return [(int(lo), int(hi)) for lo, hi in zip(edges, stops, strict=True) if hi > lo]


class H5ad:
    """An open `.h5ad`; a context manager.

    Parameters
    ----------
    path : a local path, or a URL that fsspec opens (`s3://bucket/file.h5ad`)

    Raises
    ------
    UserError
        If there is no such file, it is not HDF5, is cut short, or holds no matrix.
    """

    def __init__(self, path: str) -> None:
        self.path = path = str(path)
        self._remote: Any = None
        if "://" in path:
            self._remote = _open_remote(path)
        elif not os.path.exists(path):
            raise UserError(f"{path}: there is no such file.")
        elif os.path.isdir(path):
            raise UserError(f"{path}: is a directory, expected an .h5ad file.")
        try:
            self.h5 = h5py.File(self._remote or path, "r")
        except OSError as error:
            raise UserError(_why_not_hdf5(path, error)) from error
        with reading(path, "its table of contents"):
            found = list(self.h5)
        if not {"X", "layers", "obs", "raw"} & set(found):
            self.close()
            hint = " It may be a 10x file: read it with scanpy.read_10x_h5 and write_h5ad it." if "matrix" in found else ""
            raise UserError(
                f"{path}: is HDF5 but not an h5ad (found {', '.join(found[:8]) or 'nothing'}; expected X, obs and var).{hint}"
            )

    def close(self) -> None:
        """Close the file."""
        self.h5.close()
        if self._remote is not None:
            self._remote.close()

    def __enter__(self) -> H5ad:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        group = self.h5.get("layers")
        return list(group) if isinstance(group, h5py.Group) else []

    @property
    def has_raw(self) -> bool:
        """Whether the file keeps a `.raw` matrix."""
        return "raw/X" in self.h5 or "raw.X" in self.h5

    def matrix(self, layer: str | None = None, raw: bool = False) -> Matrix:
        """Open `X`, a layer or `.raw.X`.

        Raises
        ------
        UserError
            If it is not there (the message lists what is), or its shape disagrees with `obs` and `var`.
        """
        if layer is not None and raw:
            raise UserError("give --layer or --raw, not both.")
        name = f"layers/{layer}" if layer is not None else "X"
        if raw:
            name = "raw/X" if "raw/X" in self.h5 else "raw.X"
        with reading(self.path, name):
            node = self.h5.get(name)
        if node is None:
            raise UserError(f"{self.path}: has no {name}; {self.ways_out()}")
        with reading(self.path, name):
            matrix = Matrix(self.path, node, name, remote=self._remote is not None)
        n_obs, n_vars = self.n_obs, self.n_vars(raw)
        if matrix.shape != (n_obs, n_vars):
            raise UserError(
                f"{self.path}: {name} is {matrix.shape[0]} x {matrix.shape[1]} but obs has {n_obs} rows and var {n_vars}."
            )
        return matrix

    def ways_out(self) -> str:
        """Which matrices there are, as the end of an error message."""
        places = ["X"] if "X" in self.h5 else []
        places += [f"--layer {name}" for name in self.layers] + (["--raw"] if self.has_raw else [])
        return f"it has {', '.join(places) or 'no matrix at all'}."

    @property
    def n_obs(self) -> int:
        """Rows of `obs`."""
        return self._length("obs")

    def n_vars(self, raw: bool = False) -> int:
        """Rows of `var` (of `.raw.var`)."""
        return self._length(self._var_name(raw))

    def _var_name(self, raw: bool) -> str:
        return ("raw/var" if "raw/var" in self.h5 else "raw.var") if raw else "var"

    def _length(self, name: str) -> int:
        with reading(self.path, name):
            if name not in self.h5:
                return self._width(name)
            index = self._index(name)
            if isinstance(index, h5py.Group):
                index = index["codes" if "codes" in index else "values"]
            return int(index.shape[0])

    def _index(self, table: str) -> h5py.Dataset | h5py.Group:
        """Find what holds the names of a table: itself if it is a compound dataset, else an array or an encoded group."""
        node = self.h5[table]
        return node if isinstance(node, h5py.Dataset) else node[_text(node.attrs.get("_index", "_index"))]

    def _width(self, name: str) -> int:
        """Rows that a table which is not there would have, from the shape of its matrix."""
        matrix = self.h5["raw/X" if name.startswith("raw") else "X"]
        shape = matrix.shape if isinstance(matrix, h5py.Dataset) else matrix.attrs["shape"]
        return int(shape[0 if name == "obs" else 1])

    def name(self, table: str, row: int) -> str:
        """Name of row `row` of `obs` or of a `var`, for messages."""
        try:
            index = self._index(table)
            value = (index if isinstance(index, h5py.Dataset) else _read_quietly(index))[row]
            if index.name == f"/{table}":  # a row of a compound dataset
                value = value[0]
            return repr(value.decode() if isinstance(value, bytes) else str(value))
        except HDF5_ERRORS:  # the message matters more than the name in it
            return "?"

    def gene_name(self, matrix: Matrix, column: int) -> str:
        """Name of a column of one of the matrices, for messages."""
        return self.name(self._var_name(matrix.name.startswith("raw")), column)

    @property
    def obs_names(self) -> list[str]:
        """Names of the cells."""
        return self._names("obs")

    def var_names(self, raw: bool = False) -> list[str]:
        """Names of the genes; they may repeat."""
        return self._names(self._var_name(raw))

    def _names(self, table: str) -> list[str]:
        with reading(self.path, table):
            if isinstance(self.h5.get(table), h5py.Group):
                index = self._index(table)
                if isinstance(index, h5py.Group):
                    return [str(name) for name in _read_quietly(index)]
                if h5py.check_string_dtype(index.dtype):
                    return [str(name) for name in index.asstr()[:]]
            return [str(name) for name in self._frame(table).index]

    def obs(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Return the cells' table, or only some `columns` of it."""
        frame = self._frame("obs")
        if columns is None:
            return frame
        missing = [name for name in columns if name not in frame]
        if missing:
            raise UserError(f"{self.path}: obs has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}.")
        return frame[columns]

    def var(self, raw: bool = False) -> pd.DataFrame:
        """Return the genes' table; its index may hold duplicates."""
        return self._frame(self._var_name(raw))

    def _frame(self, name: str) -> pd.DataFrame:
        import pandas as pd

        with reading(self.path, name):
            if name not in self.h5:
                return pd.DataFrame(index=np.arange(self._length(name)).astype(str))
            node = self.h5[name]
            if isinstance(node, h5py.Dataset):
                return _compound_frame(node, self.h5.get("uns"))
            frame = _read_quietly(node)
            frame.index = frame.index.astype(str)
            return frame

    def mapping(self, name: str) -> dict[str, Any]:
        """`obsm`, `varm` or `uns` as a dict; empty when absent."""
        if name not in self.h5:
            return {}
        with reading(self.path, name):
            node = self.h5[name]
            if isinstance(node, h5py.Dataset):  # anndata 0.6: one compound column per array
                rows = node[:]
                return {key: np.asarray(rows[key]) for key in rows.dtype.names}
            if "encoding-type" in node.attrs:
                return dict(_read_quietly(node))
            return {key: _decoded(_read_quietly(node[key])) for key in node}


def _read_quietly(node: Any) -> Any:
    """Return an element of any age; that it is old is no news to the user."""
    from sedd.io.format.plain import read_element  # imports pandas, which is needed for tables alone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read_element(node)
        except HDF5_ERRORS:
            raise
        except Exception as error:  # anndata has types of its own for what a damaged attribute makes of an element
            raise ValueError(str(error)) from error


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _decoded(value: Any) -> Any:
    """Byte strings of old files as text."""
    return value.astype(str) if isinstance(value, np.ndarray) and value.dtype.kind == "S" else value


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
        if isinstance(uns, h5py.Group) and key in uns and values.dtype.kind in "iu":
            categories = [c.decode() if isinstance(c, bytes) else c for c in np.atleast_1d(uns[key][()])]
            columns[name] = pd.Categorical.from_codes(values.astype(np.int64), pd.Index(categories))
        else:
            columns[name] = values
    index = "index" if "index" in names else "_index" if "_index" in names else names[0]
    frame = pd.DataFrame(columns)
    frame.index = pd.Index(frame.pop(index).astype(str), name=None)
    return frame


def _open_remote(path: str) -> Any:
    fs, name = filesystem(path)
    try:
        return fs.open(name, "rb", block_size=8 << 20)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file.") from error
    except Exception as error:  # every storage service raises errors of its own
        raise UserError(f"{path}: cannot be opened ({' '.join(str(error).split())[:200]}).") from error


def _why_not_hdf5(path: str, error: OSError) -> str:
    text = str(error)
    if "truncated file" in text:
        return f"{path}: the file is cut short ({os.path.getsize(path)} bytes are there). Copy it again."
    if isinstance(error, PermissionError):
        return f"{path}: may not be read (permission denied)."
    return f"{path}: is not an .h5ad (HDF5) file. Expected AnnData as written by `adata.write_h5ad(...)`."
