"""The store: an AnnData Zarr v3 store whose X is CSR in narrow types, in few sharded files, each chunk with its checksum.

`X/{indptr,indices,data}` are as in any AnnData store; what sedd adds is under `uns["sedd"]`: `meta` (JSON: format, inputs, codec, ...),
`cells` and `genes` (statistics), `histogram` (how often each gene has each count) and `lacking` (genes that inputs do not have).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pandas as pd
import zarr
from scipy import sparse

from sedd.errors import (
    DamagedFileError,
    MissingFileError,
    UserError,
    WrongFileError,
    check_permitted,
    counted,
    without_secrets,
)
from sedd.io.format.lacking import Lacking
from sedd.io.format.plain import read_element
from sedd.io.format.reader import ChunkReader, side_by_side
from sedd.io.format.tally import cell_hashes
from sedd.io.format.untrusted import check_zarr
from sedd.io.remote import file_sizes
from sedd.kernels.gather import take_rows

_NAMES = 1 << 18  # of cells that are read at once

FORMAT = 1
"""Version of what is under `uns["sedd"]`."""


class CellStore:
    """A store on disk, opened lazily; a context manager, picklable by its path.

    Parameters
    ----------
    path : directory (or fsspec URL) written by `sedd.io.convert`

    Raises
    ------
    UserError
        If there is no store, it is not finished, or it was not made by sedd.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path).rstrip("/")
        self._group = _open_group(self.path)
        self._stamp = _stamp(self.path)
        try:
            meta = json.loads(str(self._group["uns/sedd/meta"][()]))
            _check_meta(self.path, meta)
        except UserError:
            raise
        except (LookupError, ValueError, TypeError, RecursionError) as error:
            raise WrongFileError(
                f"{self.path}: is a Zarr store, but sedd did not make it. Convert it, by `sedd convert`."
            ) from error
        self.uns_sedd: dict[str, Any] = meta
        self.n_obs: int = meta["n_obs"]
        self.n_vars: int = meta["n_vars"]
        self.nnz: int = meta["nnz"]
        self.is_counts: bool = meta["values"] == "counts"
        self.max_value: int | float = meta["max_value"]
        self.fingerprint: str = meta["fingerprint"]

        self._earlier = False

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (_as_of, (self.path, self.fingerprint)) if self._earlier else (CellStore, (self.path,))

    def as_of(self, fingerprint: str) -> CellStore | None:
        """Return the store as it was when it had this fingerprint, before cells were appended; None if it never had."""
        then = next((then for then in self.grown if then["fingerprint"] == fingerprint), None)
        if then is None:
            return None
        earlier = CellStore(self.path)
        earlier.n_obs, earlier.nnz, earlier.max_value = then["n_obs"], then["nnz"], then["max_value"]
        earlier.fingerprint, earlier._earlier = fingerprint, True
        return earlier

    def __enter__(self) -> CellStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was cached."""
        for name in ("indptr", "obs", "var", "var_names", "lacking"):
            self.__dict__.pop(name, None)

    def __repr__(self) -> str:
        return f"CellStore({self.path!r}: {counted(self.n_obs, 'cell')} x {counted(self.n_vars, 'gene')}, {counted(self.nnz, 'non-zero')}, {self.dtype})"

    @property
    def grown(self) -> list[dict[str, Any]]:
        """What the store was each time before cells were appended: `n_obs`, `nnz`, `max_value`, `fingerprint`, number of `inputs`."""
        found: list[dict[str, Any]] = self.uns_sedd.get("grown", [])
        return found

    @property
    def is_reordered(self) -> bool:
        """Whether its cells have another order than in its inputs: where they were is in `obs["sedd_cell"]`."""
        settings = self.uns_sedd["settings"]
        return bool(settings["shuffle"] or settings.get("group_by"))

    @cached_property
    def x_arrays(self) -> dict[str, zarr.Array]:
        """The arrays of X: `indptr`, `indices`, `data`."""
        found = {name: self._group[f"X/{name}"] for name in ("indptr", "indices", "data")}
        for name, array in found.items():
            length = self.uns_sedd["n_obs"] + 1 if name == "indptr" else self.uns_sedd["nnz"]
            if len(array.shape) != 1 or array.shape[0] < length or array.dtype.kind not in ("iu" if name != "data" else "iuf"):
                raise DamagedFileError(
                    f"{self.path}: X/{name} is {array.dtype} of shape {array.shape}, expected {length} numbers. Convert the input again."
                )
        return found

    @property
    def layer_arrays(self) -> dict[str, dict[str, zarr.Array]]:
        """The arrays of each layer that was kept."""
        layers = self._group["layers"]
        return {key: {name: layers[f"{key}/{name}"] for name in ("indptr", "indices", "data")} for key in sorted(layers)}

    @cached_property
    def _readers(self) -> dict[str, ChunkReader]:
        return {name: ChunkReader(array, name=f"{self.path}/X/{name}") for name, array in self.x_arrays.items()}

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values: uint8, uint16 or uint32 for counts, float32 for real values."""
        return np.dtype(self.x_arrays["data"].dtype)

    @cached_property
    def indptr(self) -> np.ndarray:
        """Row pointers, `(n_obs + 1,)` int64."""
        found = self._read("indptr", 0, self.n_obs + 1)
        if found[0] != 0 or found[-1] != self.nnz or (np.diff(found) < 0).any():  # compiled code would read past the end
            raise DamagedFileError(f"{self.path}: X/indptr does not increase from 0 to {self.nnz}. Convert the input again.")
        return found

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The cells' table."""
        table: pd.DataFrame = self.element("obs")
        return table.iloc[: self.n_obs].copy() if self._earlier else table

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of `obs`; none of these is read for it."""
        return list(map(str, self.obs.columns)) if "obs" in self.__dict__ else list(map(str, self._group["obs"].attrs["column-order"]))

    def obs_column(self, name: str) -> pd.Series:
        """Return one column of `obs`, numbered instead of named: the names of many cells take more memory than all else of a loader."""
        values = self.obs[name]._values if "obs" in self.__dict__ else self.element(f"obs/{name}")
        return pd.Series(values)[: self.n_obs]

    def obs_names(self) -> Iterator[Any]:
        """Names of the cells, a block of them in memory at a time."""
        group = self._group["obs"]
        index = group[str(group.attrs["_index"])]
        if not isinstance(index, zarr.Array):  # strings of which some may be missing
            if np.any(index["mask"][:]):
                yield from self.obs.index
                return
            index = index["values"]
        for lo in range(0, self.n_obs, _NAMES):
            yield from index[lo : min(lo + _NAMES, self.n_obs)]

    @cached_property
    def var(self) -> pd.DataFrame:
        """The genes' table."""
        return self.element("var")

    @cached_property
    def var_names(self) -> np.ndarray:
        """Names of the genes, unique."""
        return self.var.index.to_numpy().astype(str)

    @cached_property
    def lacking(self) -> Lacking | None:
        """Which genes the inputs of its cells lack, so that their zeros are none; None where each has all."""
        return Lacking.read(self.element("uns/sedd/lacking")) if "lacking" in self.keys("uns/sedd") else None

    def keys(self, name: str = "") -> list[str]:
        """Names of what is in a group of the store, none if there is no such group."""
        try:
            return sorted(self._group[name] if name else self._group)
        except KeyError:
            return []

    def element(self, name: str) -> Any:
        """Read a table, array or mapping of the store, such as `obs` or `uns/title`."""
        try:
            return read_element(self._group[name])
        except Exception as error:  # whatever a damaged store makes the readers raise
            if _stamp(self.path) != self._stamp:
                raise UserError(f"{self.path}: changed since it was opened, so {name} cannot be read any more. Open it again.") from error
            raise DamagedFileError(f"{self.path}: cannot read {name} ({' '.join(str(error).split())[:200]}).") from error

    def _read(self, name: str, lo: int, hi: int) -> np.ndarray:
        """Entries `lo:hi` of one array of X; a damaged chunk is named."""
        return self._readers[name].read_range(lo, hi)

    def read_rows(self, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cells `lo:hi` as `(indptr from 0, indices, data)`, in the types of the store.

        Raises
        ------
        UserError
            If the rows are not there, or a checksum is wrong: the message names array, chunk and file.
        """
        if not 0 <= lo <= hi <= self.n_obs:
            raise UserError(f"{self.path}: has no cells {lo}:{hi}; it has {self.n_obs}.")
        indptr = self.indptr[lo : hi + 1]
        start, stop = int(indptr[0]), int(indptr[-1])
        indices = self._read("indices", start, stop)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.n_vars:
            raise DamagedFileError(f"{self.path}: a gene index is outside its {self.n_vars} genes. Convert the input again.")
        return indptr - start, indices, self._read("data", start, stop)

    def read_cells(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Chosen cells as `(indptr from 0, indices, data)`; only the chunks that hold some are read.

        Parameters
        ----------
        cells : (k,) int64 in [0, n_obs)
        """
        starts, stops = self.indptr[cells], self.indptr[cells + 1]
        chunk = self._readers["data"].chunk
        chunks, starts, stops = side_by_side(starts, stops, chunk)
        soup = {name: np.empty(chunks.size * chunk, self.x_arrays[name].dtype) for name in ("indices", "data")}
        for name, values in soup.items():
            self._readers[name].read(chunks, values, np.arange(chunks.size, dtype=np.int64) * chunk)
        return take_rows(starts, stops, soup["indices"], soup["data"])

    def spans(self, n_values: int) -> list[tuple[int, int]]:
        """Cut the cells into runs of about `n_values` non-zeros, at least one cell each."""
        marks = np.arange(0, max(1, self.nnz), max(1, n_values))
        edges = np.unique(np.searchsorted(self.indptr[:-1], marks, side="right") - 1)
        edges[:1] = 0
        stops = np.append(edges[1:], self.n_obs)
        return [(int(lo), int(hi)) for lo, hi in zip(edges, stops, strict=True) if hi > lo]

    def to_dask(self, block_values: int = 1 << 24) -> Any:
        """X as a dask array of CSR blocks of about `block_values` non-zeros each."""
        import dask.array as da

        spans = self.spans(block_values)
        name = f"sedd-{self.fingerprint}-{block_values}"
        graph = {(name, k, 0): (read_block, self.path, lo, hi) for k, (lo, hi) in enumerate(spans)}
        chunks = (tuple(hi - lo for lo, hi in spans), (self.n_vars,))
        return da.Array(graph, name, chunks, meta=CsrBlock((0, 0), dtype=self.dtype))

    def gene_histogram(self) -> sparse.csr_array:
        """How many cells have each count of each gene: `(n_vars, max_value + 1)` int64, zeros in column 0."""
        if not self.is_counts:
            raise UserError(f"{self.path}: holds real values, which have no histogram; convert counts.")
        if self._earlier:
            from sedd.io.format.histogram import histogram  # rarely needed, and slow to import

            own = histogram(CellStore(self.path), np.arange(self.n_obs))
            own.resize((self.n_vars, int(self.max_value) + 1))
            return own
        return sparse.csr_array(self.element("uns/sedd/histogram"))

    def cell_stats(self) -> pd.DataFrame:
        """Per cell: `total`, `n_genes` (non-zeros) and `max`."""
        table = self.cell_table()
        return pd.DataFrame({name: table[name] for name in ("total", "n_genes", "max")})

    def gene_stats(self) -> pd.DataFrame:
        """Per gene: `sum`, `sum_sq`, `nnz` and `max`."""
        if self._earlier:
            raise UserError(f"{self.path}: what is kept of its genes is of all cells, not only of the first {self.n_obs}.")
        table = self.element("uns/sedd/genes")
        return pd.DataFrame({name: table[name] for name in ("sum", "sum_sq", "nnz", "max")}, index=self.var_names)

    def cell_hashes(self) -> np.ndarray:
        """Return a hash of each cell's entries, gathered when it was written; what `verify` compares with."""
        return self.cell_table()["hash"]

    def cell_table(self) -> dict[str, np.ndarray]:
        """Statistics of the cells and their hashes, arrays by name."""
        return {name: np.asarray(values)[: self.n_obs] for name, values in self.element("uns/sedd/cells").items()}


class CsrBlock(sparse.csr_matrix):
    """A scipy CSR matrix that Dask can sum: Dask passes `keepdims`, which scipy does not know."""

    def sum(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> Any:
        """Sum over an axis: a scalar, or an array (two-dimensional, as everywhere in scipy's matrices)."""
        axis = axis[0] if isinstance(axis, tuple) and len(axis) == 1 else None if axis == (0, 1) else axis
        total = np.asarray(super().sum(axis=axis, dtype=dtype, out=out))
        if not keepdims:
            return total if axis is not None else total.item()
        return total.reshape([1 if axis is None or k == axis % 2 else n for k, n in enumerate(self.shape)])


def read_block(path: str, lo: int, hi: int) -> CsrBlock:
    """Cells `lo:hi` of the store at `path` as a scipy matrix."""
    store = CellStore(path)
    indptr, indices, data = store.read_rows(lo, hi)
    return CsrBlock((data, indices.astype(np.int32), indptr.astype(np.int32)), shape=(hi - lo, store.n_vars))


def _stamp(path: str) -> tuple[int, int] | None:
    """Return what tells a store from the one that takes its place; None of a remote one, or of none."""
    try:
        found = os.stat(f"{path}/zarr.json")
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _as_of(path: str, fingerprint: str) -> CellStore:
    store = CellStore(path).as_of(fingerprint)
    if store is None:
        raise UserError(f"{path}: changed since the run began on it. Start again.")
    return store


@lru_cache(maxsize=4)
def _opened(path: str, changed: int) -> CellStore:
    return CellStore(path)


def close_stores() -> None:
    """Close the stores that `span_hashes` holds open, so that the next call sees what is on the disk by then."""
    _opened.cache_clear()


def span_hashes(path: str, lo: int, hi: int) -> np.ndarray:
    """Hashes of cells `lo:hi` of the store at `path`, from what is on the disk; a Dask task."""
    changed = 0 if "://" in path else os.stat(f"{path}/zarr.json").st_mtime_ns
    return cell_hashes(*_opened(path, changed).read_rows(lo, hi))


def _open_group(path: str) -> zarr.Group:
    if "://" not in path:
        check_permitted(path)
        if not os.path.exists(path):
            unfinished = os.path.isdir(f"{path}.partial")
            hint = " Its conversion did not finish: run it again with --resume." if unfinished else ""
            raise MissingFileError(f"{path}: there is no such store.{hint}")
        if not os.path.isfile(f"{path}/zarr.json"):
            raise WrongFileError(f"{path}: is not a Zarr v3 store (it has no zarr.json). Make one with `sedd convert`.")
    try:
        group = zarr.open_group(path, mode="r")
        _check_once(path, _stamp(path))
        return group
    except UserError:
        raise
    except Exception as error:  # zarr, fsspec and their backends raise many kinds
        raise UserError(f"{path}: cannot be opened as a Zarr store ({' '.join(str(error).split())[:200]}).") from error


@lru_cache(maxsize=64)
def _check_once(path: str, stamp: tuple[int, int] | None) -> None:
    """Check a store that has this stamp; it is opened again by every block of cells that is read."""
    check_zarr(path, zarr.open_group(path, mode="r"))


def _check_meta(path: str, meta: dict[str, Any]) -> None:
    """Check what is known of a store by what it says of itself; see `CellStore`."""
    if meta["format"] > FORMAT:
        raise WrongFileError(f"{path}: has format {meta['format']}, this sedd reads up to {FORMAT}. Upgrade sedd.")
    numbers = [meta[name] for name in ("n_obs", "n_vars", "nnz")]
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or not isinstance(meta["fingerprint"], str):
        raise ValueError("it has no numbers of cells and genes")
    if not isinstance(meta["max_value"], int | float) or not isinstance(meta["settings"], dict) or not isinstance(meta["inputs"], list):
        raise ValueError("it does not say what it was made of")


def _grouping(store: CellStore) -> str | None:
    """Return what the cells are grouped by, if they are, and which of them."""
    column: str | None = store.uns_sedd["settings"].get("group_by")
    if column is None or column not in store.obs:  # no store can hold some names, which are changed
        return column
    n = store.grown[0]["n_obs"] if store.grown else store.n_obs
    labels = store.obs[column].iloc[:n]
    groups = f"{column}: {labels.nunique()} groups" + (f" and {int(labels.isna().sum())} cells without" if labels.isna().any() else "")
    return groups + (f", of the first {n} cells" if store.grown else "")


def store_facts(path: str) -> dict[str, Any]:
    """Everything worth knowing about a store, as plain values.

    Returns
    -------
    facts : shape, type, bytes and files on disk, codec, chunks, inputs, tables' columns, summary of cells
    """
    store = CellStore(path)
    cells = store.cell_stats()
    sizes = file_sizes(store.path)
    meta = store.uns_sedd
    return {
        "path": without_secrets(store.path),
        "cells": store.n_obs,
        "genes": store.n_vars,
        "nonzeros": store.nnz,
        "values": meta["values"],
        "dtype": str(store.dtype),
        "max": store.max_value,
        "median genes per cell": float(cells["n_genes"].median()),
        "median total per cell": float(cells["total"].median()),
        "bytes": sum(sizes),
        "bytes per cell": round(sum(sizes) / max(1, store.n_obs), 1),
        "files": len(sizes),
        "codec": meta["codec"],
        "chunk": int(store.x_arrays["data"].chunks[0]),
        "shuffled": meta["settings"]["shuffle"] and (f"the first {store.grown[0]['n_obs']} cells" if store.grown else True),
        "grouped by": _grouping(store),
        "genes lacking": [] if store.lacking is None else [f"{name}: {row.sum()}" for name, row in zip(store.lacking.inputs, store.lacking.table, strict=True)],
        "cells when it grew": [then["n_obs"] for then in store.grown],
        "obs": list(map(str, store.obs.columns)),
        "var": list(map(str, store.var.columns)),
        "obsm": sorted(store._group["obsm"].keys()) if "obsm" in store._group else [],
        "inputs": meta["inputs"],
        "settings": meta["settings"],
        "fingerprint": store.fingerprint,
        "sedd": meta["sedd"],
    }
