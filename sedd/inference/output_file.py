"""Blocks of cells become an AnnData in memory, or a file that grows block by block.

A file is written in the folder of its parts and moved to its name when it is complete; it is an ordinary `.h5ad` or an ordinary
AnnData Zarr store, and at no time more than a block of cells is in memory.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from sedd.inference.cells import read_anndata
from sedd.inference.output_parts import Parts, is_mostly_full
from sedd.io.format.shards import consolidate
from sedd.io.outputs import move_into_place, partial_folder

_BLOCK = 1 << 22  # values that are gathered before they are written
_CHUNK = 1 << 16  # values in a chunk of a sparse matrix
_EMPTY = ("obsm", "varm", "obsp", "varp", "layers")


def assemble(
    output: str | Path | None, obs: pd.DataFrame, var: pd.DataFrame, parts: Parts, uns: dict[str, Any]
) -> ad.AnnData:
    """Put blocks of successive cells together.

    Parameters
    ----------
    output
        An .h5ad or a .zarr, replaced when the new one is complete, or None for memory.
    obs, var
        The tables of all cells and genes.
    parts
        Blocks of `X` and layers by name, each (B, n_vars).

    Returns
    -------
    result
        Whole in memory; its `obs`, `var` and `uns` if the rest is in a file.
    """
    parts.complete()
    if output is not None:
        if parts.writes:
            with _GrowingFile(Path(output), obs, var, uns) as file:
                for block in parts.all():
                    file.add(**block)
                file.finish()
        return ad.AnnData(obs=obs, var=var, uns=uns)
    gathered: dict[str, list[sp.csr_matrix]] = {}
    for block in parts.all():
        for name, part in block.items():
            gathered.setdefault(name, []).append(sp.csr_matrix(part))
    layers: dict[str, Any] = {}
    for name in list(gathered):
        matrix = sp.vstack(gathered.pop(name), format="csr")
        layers[name] = matrix.toarray() if is_mostly_full(matrix) else matrix
    return ad.AnnData(layers.pop("X"), obs=obs, var=var, layers=layers, uns=uns)


def attach(
    output: str | Path | None,
    data: ad.AnnData | str | Path,
    chosen: np.ndarray | None,
    parts: Parts,
    uns: dict[str, Any],
) -> ad.AnnData:
    """Put what was made of each cell into the obsm of a copy of the data.

    Parameters
    ----------
    output
        As in `assemble`.
    data
        A file of the same kind as `output` is copied without being read.
    chosen
        Which cells; all if None.
    parts
        Blocks of arrays for obsm by name.
    """
    parts.complete()
    if not parts.writes:
        return ad.AnnData(uns=uns)
    whole: dict[str, list[np.ndarray]] = {}
    for block in parts.all():
        for name, part in block.items():
            whole.setdefault(name, []).append(part.toarray() if sp.issparse(part) else part)
    obsm = {name: np.concatenate(parts) for name, parts in whole.items()}
    if (
        output is not None
        and chosen is None
        and not isinstance(data, ad.AnnData)
        and _same_kind(Path(data), Path(output))
    ):
        return _attach_to_copy(Path(data), Path(output), obsm, uns)
    adata = data if isinstance(data, ad.AnnData) else read_anndata(data)
    result = adata.copy() if chosen is None else adata[chosen].copy()
    result.obsm.update(obsm)
    result.uns.update(uns)
    if output is None:
        return result
    path = Path(output)
    part = Path(partial_folder(path), path.name)
    with _written_plainly():
        if path.suffix == ".zarr":
            root = zarr.open_group(part, mode="w", zarr_format=3)
            ad.io.write_elem(root, "/", result)
            consolidate(root)
        else:
            with h5py.File(part, "w") as file:
                ad.io.write_elem(file, "/", result, dataset_kwargs={"compression": "gzip"})
    move_into_place(part, path)
    return ad.AnnData(obs=result.obs, var=result.var, uns=uns)


def _same_kind(data: Path, output: Path) -> bool:
    return data.is_dir() == (output.suffix == ".zarr")


def _attach_to_copy(data: Path, output: Path, obsm: dict[str, np.ndarray], uns: dict[str, Any]) -> ad.AnnData:
    part = Path(partial_folder(output), output.name)
    if data.is_dir():
        shutil.copytree(data, part, dirs_exist_ok=True)
    else:
        shutil.copyfile(data, part)
    root: Any = zarr.open_group(part, mode="r+", use_consolidated=False) if data.is_dir() else h5py.File(part, "r+")
    with contextlib.closing(root.store if data.is_dir() else root), _written_plainly():
        for group, elements in (("obsm", obsm), ("uns", uns)):
            if group not in root:
                ad.io.write_elem(root, group, {})
            for name, element in elements.items():
                if name in root[group]:
                    del root[group][name]
                ad.io.write_elem(root[group], name, element)
        obs, var = (ad.io.read_elem(root[name]) for name in ("obs", "var"))
        if data.is_dir():
            consolidate(root)
    move_into_place(part, output)
    return ad.AnnData(obs=obs, var=var, uns=uns)


@contextlib.contextmanager
def _written_plainly() -> Iterator[None]:
    """Whatever pandas makes of strings, in the format that every anndata reads, without its warnings about coming versions."""
    with (
        ad.settings.override(auto_shard_zarr_v3=False, allow_write_nullable_strings=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


class _GrowingFile:
    """Appends blocks to a file; what a layer is kept as is decided by its first block."""

    def __init__(self, path: Path, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> None:
        self._path, self._shape = path, (len(obs), len(var))
        self._part = Path(partial_folder(path), "whole")
        shutil.rmtree(self._part, ignore_errors=True)  # of a process that was killed here
        self._part.mkdir(parents=True)
        self._is_zarr = path.suffix == ".zarr"
        inside = self._part / path.name
        self._root: Any = zarr.open_group(inside, mode="w", zarr_format=3) if self._is_zarr else h5py.File(inside, "w")
        self._root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        self._waiting: dict[str, list[Any]] = {}
        self._kept_dense: dict[str, bool] = {}
        self._written: dict[str, int] = {}
        tables: dict[str, Any] = {"obs": obs, "var": var, "uns": uns, **{name: {} for name in _EMPTY}}
        for name, table in tables.items():
            self._write(name, table)

    def __enter__(self) -> _GrowingFile:
        return self

    def _write(self, key: str, element: Any, **storage: Any) -> None:
        group, _, name = key.rpartition("/")
        with _written_plainly():
            ad.io.write_elem(self._root.require_group(group) if group else self._root, name, element, dataset_kwargs=storage)

    def add(self, **blocks: Any) -> None:
        """Take in the next cells, and write what has gathered."""
        for name, block in blocks.items():
            dense = self._kept_dense.setdefault(name, is_mostly_full(block))
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
        shape = self._shape
        rows = max(1, min(shape[0], (1 << 20) // max(1, shape[1])))
        storage: dict[str, Any] = {"shape": shape, "dtype": dtype, "chunks": (rows, shape[1])}
        if self._is_zarr:
            node = self._root.create_array(key, **storage)
        else:
            node = self._root.create_dataset(key, **storage, compression="gzip")
        node.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def finish(self) -> None:
        """Complete the file and move it to its name."""
        for name in self._waiting:
            self._flush(name)
        if self._is_zarr:
            consolidate(self._root)
        else:
            self._root.close()
        move_into_place(self._part / self._path.name, self._path)

    def __exit__(self, *_: object) -> None:
        """Remove the part, or what is left of it."""
        if not self._is_zarr:
            self._root.close()
        shutil.rmtree(self._part, ignore_errors=True)
