"""Blocks of cells become an AnnData in memory, or a file that grows block by block.

A file is written in the folder of its parts and moved to its name when it is complete; it is an ordinary `.h5ad` or an ordinary
AnnData Zarr store, and at no time more than a block of cells is in memory, but for the table of cells.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from sedd.errors import UserError, warn_user
from sedd.inference.output_parts import Parts, is_mostly_full
from sedd.inference.sources import STORE_KEYS, Source
from sedd.io.format.elements import ROWS, free_names, write_elements
from sedd.io.format.shards import consolidate
from sedd.io.outputs import move_into_place, partial_folder

_BLOCK = 1 << 22  # values that are gathered before they are written
_CHUNK = 1 << 16  # values in a chunk of a sparse matrix
_DENSE = 1 << 20  # values in a chunk of an array
_MAPPINGS = ("obsm", "varm", "obsp", "varp", "layers")


def assemble(output: str | Path | None, tables: dict[str, Any], parts: Parts) -> ad.AnnData:
    """Put blocks of successive cells together.

    Parameters
    ----------
    output
        An .h5ad or a .zarr, replaced when the new one is complete, or None for memory.
    tables
        `obs`, `var`, `obsm` and `uns` of all cells and genes.
    parts
        Blocks of `X` and layers by name, each (B, n_vars).

    Returns
    -------
    result
        Whole in memory; its `tables` if the rest is in a file.
    """
    parts.complete()
    if output is not None:
        if parts.writes:
            with _GrowingFile(Path(output), tables) as file:
                for block in parts.all():
                    file.add(**block)
                file.finish()
        return ad.AnnData(**tables)
    gathered: dict[str, list[sp.csr_matrix]] = {}
    for block in parts.all():
        for name, part in block.items():
            gathered.setdefault(name, []).append(sp.csr_matrix(part))
    layers: dict[str, Any] = {}
    for name in list(gathered):
        matrix = sp.vstack(gathered.pop(name), format="csr")
        layers[name] = matrix.toarray() if is_mostly_full(matrix) else matrix
    return ad.AnnData(layers.pop("X"), layers=layers, **tables)


@dataclass(frozen=True)
class Beside:
    """What is put beside cells, by its names there.

    Attributes
    ----------
    obsm
        Arrays, (n_obs, m).
    obs
        Columns, (n_obs,).
    """

    obsm: dict[str, np.ndarray] = field(default_factory=dict)
    obs: dict[str, Any] = field(default_factory=dict)


def attach(
    output: str | Path | None,
    data: ad.AnnData | str | Path,
    source: Source,
    chosen: np.ndarray | None,
    parts: Parts,
    done: dict[str, Any],
    beside: Callable[[dict[str, np.ndarray], np.ndarray], Beside],
) -> ad.AnnData:
    """Put what was made of each cell beside it, in a copy of the data.

    Parameters
    ----------
    output
        As in `assemble`.
    data
        A file of the same kind as `output` is copied without being read; a copy of a store is a store.
    source
        The data, open.
    chosen
        Which cells; all if None.
    parts
        Blocks of arrays by name.
    done
        What `uns["sedd"]` says of it.
    beside
        Makes of a block of these arrays, and of the numbers of its cells, what is put beside the cells.

    Returns
    -------
    result
        Whole in memory; in a copy of a file only numbers in `obs` are gathered, and arrays are written block by block.
    """
    parts.complete()
    if not parts.writes:
        return ad.AnnData(uns={"sedd": done})
    found = _blocks(parts, np.arange(len(source.obs)) if chosen is None else chosen, beside)
    first = next(found)
    there = {"obs": list(source.obs.columns), "obsm": source.obsm_names() if first.obsm else []}
    replaced = [f"{group}[{name!r}]" for group, names in (("obs", first.obs), ("obsm", first.obsm)) for name in names if name in there[group]]
    if replaced:
        warn_user(f"{source.name}: has {', '.join(replaced)} already; the result has what was made now in place of it, and the data stay as they are.")
    found = itertools.chain([first], found)
    if (
        output is not None
        and chosen is None
        and not isinstance(data, ad.AnnData)
        and source.copyable
        and _can_be_copied(Path(data), Path(output))
    ):
        obs = _attach_to_copy(Path(data), Path(output), source, found, done)
        return ad.AnnData(obs=obs, var=source.var(), uns=source.uns() | {"sedd": done})
    gathered = list(found)
    with ad.settings.override(remove_unused_categories=False):
        result = source.whole() if chosen is None else source.whole()[chosen].copy()
    result.obsm.update({name: _joined([block.obsm[name] for block in gathered]) for name in first.obsm})
    if first.obs:
        result.obs = result.obs.assign(**{name: _joined([block.obs[name] for block in gathered]) for name in first.obs})
    result.uns["sedd"] = done
    if output is None:
        return result
    part = Path(partial_folder(output), Path(output).name)
    with _created(part) as root:
        _write_whole(root, result, str(output))
    move_into_place(part, Path(output))
    return ad.AnnData(obs=result.obs, var=result.var, uns=result.uns)


def _blocks(parts: Parts, numbers: np.ndarray, beside: Callable[[dict[str, np.ndarray], np.ndarray], Beside]) -> Iterator[Beside]:
    """Return what is put beside successive cells, whose numbers in the data these are."""
    lo = 0
    for block in parts.all():
        made = {name: part.toarray() if sp.issparse(part) else part for name, part in block.items()}
        hi = lo + len(next(iter(made.values())))
        yield beside(made, numbers[lo:hi])
        lo = hi


def _joined(blocks: Sequence[Any]) -> Any:
    """Return successive parts of an array, or of a column of the same categories, as one."""
    if isinstance(blocks[0], pd.Categorical):
        return pd.Categorical.from_codes(np.concatenate([block.codes for block in blocks]), dtype=blocks[0].dtype)
    return np.concatenate(blocks)


def check_tables(name: str, tables: dict[str, Any]) -> None:
    """Check that a file can hold the tables of an AnnData in memory, before any work is done.

    Parameters
    ----------
    name
        What messages call the data.
    tables
        As in `assemble`.

    Raises
    ------
    UserError
        If it cannot; the message says what and why.
    """
    with h5py.File("nowhere", "w", driver="core", backing_store=False) as file:
        for table in ("obsm", "uns"):
            for key, element in tables[table].items():
                try:
                    write_elements(file.require_group(table), {"element": element}, rows=None)
                except Exception as error:  # anndata and h5py raise a dozen types
                    kind = type(element).__name__
                    raise UserError(
                        f"{name}: {table}[{key!r}] is or holds a {kind} that no file of AnnData can hold ({' '.join(str(error).split())[:120]}). "
                        f"Delete it, as in `del adata.{table}[{key!r}]`, or turn it into arrays, text and numbers."
                    ) from error


def _can_be_copied(data: Path, output: Path) -> bool:
    """Whether a file is of the kind of the output, and of a layout in which elements can be replaced."""
    if data.is_dir() != (output.suffix == ".zarr"):
        return False
    with _opened(data, "r") as root:
        groups = [root.get(name) for name in ("obs", "obsm", "uns")]
        return root.attrs.get("encoding-type") == "anndata" and not any(hasattr(group, "shape") for group in groups)


def _attach_to_copy(data: Path, output: Path, source: Source, blocks: Iterator[Beside], done: dict[str, Any]) -> pd.DataFrame:
    """Copy a file and write into the copy, block by block; return the table of its cells."""
    part = Path(partial_folder(output), output.name)
    if data.is_dir():
        shutil.copytree(data, part, dirs_exist_ok=True)
    else:
        shutil.copyfile(data, part)
    arrays: dict[str, _GrowingArray] = {}
    columns: dict[str, list[Any]] = {}
    obs = source.obs
    with _opened(part, "r+") as root:
        for name in ("obsm", "uns"):
            if name not in root:
                _write(root, {name: {}}, str(output))
        for block in blocks:
            for name, array in block.obsm.items():
                if name not in arrays:
                    kept = free_names([name], nested=False)[name]
                    if kept != name:
                        warn_user(f"{output}: obsm {name!r} is kept as {kept!r}.")
                    arrays[name] = _GrowingArray(root["obsm"], kept, (len(obs), *array.shape[1:]), array.dtype)
                arrays[name].add(array)
            for name, values in block.obs.items():
                columns.setdefault(name, []).append(values)
        for growing in arrays.values():
            growing.finish()
        if columns:
            obs = obs.assign(**{name: _joined(values) for name, values in columns.items()})
            del root["obs"]
            _write(root, {"obs": obs}, str(output))
        if source.is_store:  # what makes it one stays
            for name in [name for name in root["uns/sedd"] if name not in STORE_KEYS]:
                del root["uns/sedd"][name]
            _write(root["uns/sedd"], done, str(output))
        else:
            _write(root["uns"], {"sedd": done}, str(output))
    source.check_unchanged()  # while it was copied
    move_into_place(part, output)
    return obs


class _GrowingArray:
    """An array in an open file, to which successive rows are written, a chunk at a time.

    Parameters
    ----------
    group, name
        Where it is put; what is there is replaced.
    shape, dtype
        Of the whole array.
    **storage
        What h5py or zarr is told beside that.
    """

    def __init__(self, group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], **storage: Any) -> None:
        if name in group:
            del group[name]
        self._rows = max(1, min(shape[0], _DENSE // max(1, math.prod(shape[1:]))))
        create = group.create_array if isinstance(group, zarr.Group) else group.create_dataset
        self._node = create(name, shape=shape, dtype=dtype, chunks=(self._rows, *shape[1:]), **storage)
        self._node.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        self._waiting: list[np.ndarray] = []
        self._written = 0

    def add(self, block: np.ndarray) -> None:
        """Take in the next rows, and write the chunks that are complete."""
        self._waiting.append(block)
        if (n_rows := sum(map(len, self._waiting))) >= self._rows:
            rows, whole = np.concatenate(self._waiting), n_rows - n_rows % self._rows
            self._write(rows[:whole])
            self._waiting = [rows[whole:]]

    def _write(self, rows: np.ndarray) -> None:
        self._node[self._written : self._written + len(rows)] = rows
        self._written += len(rows)

    def finish(self) -> None:
        """Write what is left."""
        if any(map(len, self._waiting)):
            self._write(np.concatenate(self._waiting))


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[Any]:
    """Open a file or a store; metadata of one that was written are consolidated at the end."""
    if not path.is_dir():
        with h5py.File(path, mode) as file:
            yield file
        return
    root = zarr.open_group(path, mode=mode, use_consolidated=False)
    yield root
    if mode != "r":
        consolidate(root)
    root.store.close()


@contextlib.contextmanager
def _created(path: Path) -> Iterator[Any]:
    """Make a file or a store of an AnnData."""
    is_zarr = path.suffix == ".zarr"
    with contextlib.ExitStack() as stack:
        root = zarr.open_group(path, mode="w", zarr_format=3) if is_zarr else stack.enter_context(h5py.File(path, "w"))
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        yield root
        if is_zarr:
            consolidate(root)


def _write(group: Any, elements: dict[str, Any], output: str) -> None:
    """Write tables and mappings; say what had to be renamed."""
    for note in write_elements(group, elements, rows=ROWS if isinstance(group, zarr.Group) else None):
        warn_user(f"{output}: {note}.")


def _write_whole(root: Any, adata: ad.AnnData, output: str) -> None:
    """Write an AnnData: matrices compressed, everything else as `write_elements` does."""
    mappings = {name: dict(getattr(adata, name)) for name in ("obsm", "varm", "uns")}
    _write(root, {"obs": adata.obs, "var": adata.var, **mappings, "layers": {}, "obsp": {}, "varp": {}}, output)
    if adata.X is not None:
        _write_matrix(root, "X", adata.X)
    for group in ("layers", "obsp", "varp"):
        matrices = {name: matrix for name, matrix in getattr(adata, group).items() if name is not None}
        for name, kept in free_names(matrices, nested=False).items():
            if name != kept:
                warn_user(f"{output}: {group} {name!r} is kept as {kept!r}.")
            _write_matrix(root[group], kept, matrices[name])
    if adata.raw is not None:
        raw = root.create_group("raw")
        raw.attrs.update({"encoding-type": "raw", "encoding-version": "0.1.0"})
        _write_matrix(raw, "X", adata.raw.X)
        _write(raw, {"var": adata.raw.var, "varm": dict(adata.raw.varm)}, output)


def _write_matrix(group: Any, name: str, matrix: Any, **storage: Any) -> None:
    storage |= {} if isinstance(group, zarr.Group) else {"compression": "gzip"}
    with ad.settings.override(auto_shard_zarr_v3=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what anndata says of coming versions
        ad.io.write_elem(group, name, matrix, dataset_kwargs=storage)


class _GrowingFile:
    """Appends blocks to a file; what a layer is kept as is decided by its first block."""

    def __init__(self, path: Path, tables: dict[str, Any]) -> None:
        self._path, self._shape = path, (len(tables["obs"]), len(tables["var"]))
        self._part = Path(partial_folder(path), "whole")
        shutil.rmtree(self._part, ignore_errors=True)  # of a process that was killed here
        self._part.mkdir(parents=True)
        self._is_zarr = path.suffix == ".zarr"
        self._stack = contextlib.ExitStack()
        self._root = self._stack.enter_context(_created(self._part / path.name))
        self._arrays: dict[str, _GrowingArray | None] = {}  # None: a sparse matrix
        self._waiting: dict[str, list[sp.csr_matrix]] = {}
        self._begun: set[str] = set()
        _write(self._root, {**{name: {} for name in _MAPPINGS}, **tables}, str(path))

    def __enter__(self) -> _GrowingFile:
        return self

    def add(self, **blocks: Any) -> None:
        """Take in the next cells, and write what has gathered."""
        for name, block in blocks.items():
            if name not in self._arrays:
                self._arrays[name] = self._array(name, block.dtype) if is_mostly_full(block) else None
            if (array := self._arrays[name]) is not None:
                array.add(block.toarray() if sp.issparse(block) else np.asarray(block))
                continue
            waiting = self._waiting.setdefault(name, [])
            waiting.append(sp.csr_matrix(block))
            if sum(part.size for part in waiting) >= _BLOCK:
                self._flush(name)

    def _where(self, name: str) -> tuple[Any, str]:
        return (self._root, name) if name == "X" else (self._root["layers"], name)

    def _array(self, name: str, dtype: np.dtype[Any]) -> _GrowingArray:
        return _GrowingArray(*self._where(name), self._shape, dtype, **({} if self._is_zarr else {"compression": "gzip"}))

    def _flush(self, name: str) -> None:
        waiting = self._waiting[name]
        if not waiting:
            return
        block, (group, key) = sp.vstack(waiting, format="csr"), self._where(name)
        if name in self._begun:
            ad.io.sparse_dataset(group[key]).append(block)
        else:  # the whole matrix may have more values than the first block says
            _write_matrix(group, key, block, chunks=(_CHUNK,), indptr_dtype=np.int64)
        self._begun.add(name)
        waiting.clear()

    def finish(self) -> None:
        """Complete the file and move it to its name."""
        for name, array in self._arrays.items():
            array.finish() if array is not None else self._flush(name)
        self._stack.close()
        move_into_place(self._part / self._path.name, self._path)

    def __exit__(self, *_: object) -> None:
        """Remove the part, or what is left of it."""
        self._stack.close()
        shutil.rmtree(self._part, ignore_errors=True)
