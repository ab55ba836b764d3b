"""Where the cells go that a task makes: an AnnData in memory, or a file that grows block by block.

A file is written beside its name and moved there when it is complete; it is an ordinary `.h5ad` or an ordinary AnnData
Zarr store, and at no time more than a block of cells is in memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from sedd.errors import UserError

_BLOCK = 1 << 22  # values that are gathered before they are written
_CHUNK = 1 << 16  # values in a chunk of a sparse matrix
_EMPTY = ("obsm", "varm", "obsp", "varp", "layers", "uns")


class Result(ABC):
    """Cells by genes, taken in block by block: a context manager.

    Parameters
    ----------
    obs, var
        The tables of all cells and genes.
    """

    def __init__(self, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        self.obs, self.var = obs, var

    @abstractmethod
    def add(self, **blocks: Any) -> None:
        """Take in the next cells: `X` and any layers by name, each (B, n_vars), dense or sparse, of equal B."""

    @abstractmethod
    def finish(self, uns: dict[str, Any]) -> ad.AnnData:
        """Write the rest and return the result: whole if it is in memory, else its `obs`, `var` and `uns`."""

    def __enter__(self) -> Result:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Drop what was not finished."""


def open_result(output: str | Path | None, obs: pd.DataFrame, var: pd.DataFrame) -> Result:
    """A result in memory, or in the file `output`, an .h5ad or a .zarr.

    Raises
    ------
    UserError
        If the name ends otherwise.
    """
    if output is None:
        return MemoryResult(obs, var)
    path = Path(output)
    if path.suffix not in (".h5ad", ".zarr"):
        raise UserError(f"{output}: a result is an .h5ad file or a .zarr store; expected a name that ends so.")
    return FileResult(path, obs, var)


def _is_dense(block: Any) -> bool:
    """Whether a matrix of which this is a part is kept dense: where most entries are not zero that is smaller."""
    nnz = block.nnz if sp.issparse(block) else np.count_nonzero(block)
    return nnz > 0.5 * np.prod(block.shape)


class MemoryResult(Result):
    """Keeps all blocks; a layer is dense where most of its entries are not zero, else CSR."""

    def __init__(self, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        super().__init__(obs, var)
        self._blocks: dict[str, list[sp.csr_matrix]] = {}

    def add(self, **blocks: Any) -> None:
        """Take in the next cells."""
        for name, block in blocks.items():
            self._blocks.setdefault(name, []).append(sp.csr_matrix(block))

    def finish(self, uns: dict[str, Any]) -> ad.AnnData:
        """Return all cells."""
        layers: dict[str, Any] = {}
        for name, blocks in self._blocks.items():
            matrix = sp.vstack(blocks, format="csr")
            layers[name] = matrix.toarray() if _is_dense(matrix) else matrix
        return ad.AnnData(layers.pop("X"), obs=self.obs, var=self.var, layers=layers, uns=uns)

    def __exit__(self, *_: object) -> None:
        """Let the blocks go."""
        self._blocks.clear()


class FileResult(Result):
    """Appends blocks to a file; what a layer is kept as is decided by its first block."""

    def __init__(self, path: Path, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        super().__init__(obs, var)
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        self._is_zarr = path.suffix == ".zarr"
        inside = self._part / path.name
        self._root: Any = zarr.open_group(inside, mode="w", zarr_format=3) if self._is_zarr else h5py.File(inside, "w")
        self._root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        self._waiting: dict[str, list[Any]] = {}
        self._kept_dense: dict[str, bool] = {}
        self._written: dict[str, int] = {}
        tables: dict[str, Any] = {"obs": obs, "var": var, **{name: {} for name in _EMPTY}}
        for name, table in tables.items():
            self._write(name, table)

    def _write(self, key: str, element: Any, **storage: Any) -> None:
        with ad.settings.override(auto_shard_zarr_v3=False, allow_write_nullable_strings=True):
            ad.io.write_elem(self._root, key, element, dataset_kwargs=storage)

    def add(self, **blocks: Any) -> None:
        """Take in the next cells, and write what has gathered."""
        for name, block in blocks.items():
            dense = self._kept_dense.setdefault(name, _is_dense(block))
            kept = block if not dense else block.toarray() if sp.issparse(block) else np.asarray(block)
            waiting = self._waiting.setdefault(name, [])
            waiting.append(kept if dense else sp.csr_matrix(block))
            if sum(part.size for part in waiting) >= _BLOCK:
                self._flush(name)

    def _flush(self, name: str) -> None:
        waiting = self._waiting[name]
        if not waiting:
            return
        key = name if name == "X" else f"layers/{name}"
        lo = self._written.get(name, 0)
        if self._kept_dense[name]:
            block = np.concatenate(waiting)
            if not lo:
                self._create_dense(key, block.dtype)
            self._root[key][lo : lo + len(block)] = block
        else:
            block = sp.vstack(waiting, format="csr")
            if lo:
                ad.io.sparse_dataset(self._root[key]).append(block)
            else:
                storage: dict[str, Any] = {"chunks": (_CHUNK,)}
                storage |= {} if self._is_zarr else {"compression": "gzip"}
                storage["indptr_dtype"] = np.int64  # the whole matrix may have more values than the first block says
                self._write(key, block, **storage)
        self._written[name] = lo + block.shape[0]
        waiting.clear()

    def _create_dense(self, key: str, dtype: np.dtype[Any]) -> None:
        shape = (len(self.obs), len(self.var))
        rows = max(1, min(shape[0], (1 << 20) // max(1, shape[1])))
        storage: dict[str, Any] = {"shape": shape, "dtype": dtype, "chunks": (rows, shape[1])}
        if self._is_zarr:
            node = self._root.create_array(key, **storage)
        else:
            node = self._root.create_dataset(key, **storage, compression="gzip")
        node.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def finish(self, uns: dict[str, Any]) -> ad.AnnData:
        """Complete the file and move it to its name."""
        for name in self._waiting:
            self._flush(name)
        del self._root["uns"]
        self._write("uns", uns)
        inside = self._part / self._path.name
        if self._is_zarr:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that consolidated metadata extend Zarr v3; anndata writes them too
                zarr.consolidate_metadata(self._root.store)
            if self._path.is_dir():  # a directory cannot be replaced in one step as a file can
                os.replace(self._path, self._part / "replaced")
        else:
            self._root.close()
        os.replace(inside, self._path)
        return ad.AnnData(obs=self.obs, var=self.var, uns=uns)

    def __exit__(self, *_: object) -> None:
        """Remove the part, or what is left of it."""
        if not self._is_zarr:
            self._root.close()
        shutil.rmtree(self._part, ignore_errors=True)
