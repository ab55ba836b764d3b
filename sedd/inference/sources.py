"""Where the cells are that a model is applied to: an AnnData in memory, backed or lazy, or a file of any format that is read."""

from __future__ import annotations

import contextlib
import copy
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from sedd.errors import UserError, counted, warn_user
from sedd.inference.matrices import Rows
from sedd.inference.reading import AS_IT_IS, Reading
from sedd.io.conversion.explain import are_counts, first_values, is_of_result
from sedd.io.format.lacking import Lacking
from sedd.io.format.plain import native_table, read_element
from sedd.io.input.base import Input, Naming, check_drop, own_layer, renamed
from sedd.io.input.faults import READ_ERRORS
from sedd.io.input.matrix import Matrix
from sedd.io.input.opening import input_fingerprint, lacking_of
from sedd.io.input.slices import is_array
from sedd.io.remote import is_remote

STORE_KEYS = ("meta", "cells", "genes", "histogram", "lacking")
"""What `uns["sedd"]` has of a store; the rest of it tells which task made a result."""


class Source(ABC):
    """Cells by genes, whose matrices are read by rows.

    Attributes
    ----------
    name
        What messages call it.
    obs
        The cells' table.
    layers
        Names of the layers.
    has_x, has_raw
        Whether there is a matrix at `X` and at `.raw`.
    naming
        Where the names of genes come from.
    copyable
        Whether a copy of the file is the same data.
    is_store
        Whether it is a store that `sedd convert` made, or an AnnData read from one: the matrix that it was made from is its X.
    """

    name: str
    naming: Naming
    obs: pd.DataFrame
    layers: list[str]
    has_x: bool
    has_raw: bool
    is_store: bool
    copyable: bool = False

    @abstractmethod
    def var(self, raw: bool = False) -> pd.DataFrame:
        """Return the genes' table, or that of `.raw`."""

    @abstractmethod
    def obsm(self) -> dict[str, Any]:
        """Return what there is of each cell beside the matrix, by name."""

    @abstractmethod
    def uns(self) -> dict[str, Any]:
        """Return what there is of all cells, but for what sedd put there."""

    @abstractmethod
    def record(self) -> Any:
        """Return what `uns["sedd"]` tells of an earlier task, or what a user has there; None if nothing."""

    @abstractmethod
    def lacking(self) -> Lacking | None:
        """Return which genes the files lack that a store was made of, if some do; its cells and genes may be chosen ones."""

    @abstractmethod
    def obsm_names(self) -> list[str]:
        """Names of what is in obsm."""

    def check_unchanged(self) -> None:  # noqa: B027, in memory nothing changes unless its owner means it
        """Refuse data that were changed since they were opened: what was read is of both.

        Raises
        ------
        UserError
            If they were.
        """

    @abstractmethod
    def whole(self) -> ad.AnnData:
        """Return a copy of everything, in memory."""

    def same_values(self, one: tuple[str | None, bool], other: tuple[str | None, bool]) -> bool:
        """Whether two matrices, each a layer and whether it is `.raw`, seem the same: the first values of both are."""
        try:
            return np.array_equal(self._first_values(*one), self._first_values(*other))
        except UserError:  # one that cannot be read
            return False

    def rows(self, layer: str | None = None, raw: bool = False) -> Rows:
        """Open `X`, a layer or `.raw.X`.

        Raises
        ------
        UserError
            If it is not there; the message lists what is.
        """
        layer = own_layer(layer, self.layers)
        if raw and not self.has_raw:
            raise UserError(f"{self.name}: has no .raw; there are: {self.ways_out() or 'none'}.")
        if layer is not None and layer not in self.layers:
            raise UserError(f"{self.name}: no layer {layer!r}; there are: {self.ways_out() or 'none'}.")
        if layer is None and not raw and not self.has_x:
            raise UserError(f"{self.name}: has no X; there are: {self.ways_out() or 'none'}.")
        return self._rows(layer, raw)

    @abstractmethod
    def _rows(self, layer: str | None, raw: bool) -> Rows: ...

    def ways_out(self, but: tuple[str | None, bool] | None = None, *, counts: bool = False) -> str:
        """How each matrix that there is can be asked for, but the one that was; or each that seems to hold counts."""
        found: list[tuple[str, tuple[str | None, bool]]] = [("--layer X", (None, False))] if self.has_x else []
        found += [(f"--layer {shlex.quote(name)}", (name, False)) for name in self.layers] + (
            [("--raw", (None, True))] if self.has_raw else []
        )
        return ", ".join(how for how, place in found if place != but and not (counts and not self._seems_counts(*place)))

    def _seems_counts(self, layer: str | None, raw: bool) -> bool:
        try:
            return not is_of_result(layer) and are_counts(self._first_values(layer, raw))
        except UserError:  # one that cannot be read is no way out
            return False

    @abstractmethod
    def _first_values(self, layer: str | None, raw: bool) -> np.ndarray:
        """Return values of the first cells in a matrix."""


class AnnDataSource(Source):
    """An AnnData: in memory, backed, lazy, a view, with matrices of any kind."""

    def __init__(self, adata: ad.AnnData, name: str = "the AnnData", reading: Reading = AS_IT_IS) -> None:
        self.name, self._adata = name, adata
        if reading.asked.modality is not None:
            raise UserError(f"{name}: has no modalities; leave --modality {reading.asked.modality} out.")
        self.naming = reading.naming(name, self._genes())
        self._drop = reading.asked.drop
        obs = native_table(_in_memory(adata.obs))
        _check_named(name, obs.index, "cell")
        there = [f"{group}/{key}" for group, of in (("obs", obs), ("var", adata.var), ("obsm", adata.obsm), ("uns", adata.uns)) for key in of]
        check_drop(name, there, self._drop)
        self.obs = obs.drop(columns=[column for column in obs if f"obs/{column}" in self._drop])
        self.layers = [layer for layer in adata.layers if layer is not None]  # anndata 0.13 lists X, as None
        self.has_x, self.has_raw = adata.X is not None, adata.raw is not None
        own = adata.uns.get("sedd")
        self.is_store = isinstance(own, Mapping) and "meta" in own

    def var(self, raw: bool = False) -> pd.DataFrame:
        """Return the genes' table, or that of `.raw`."""
        table = self._genes(raw)
        return renamed(table.drop(columns=[column for column in table if f"var/{column}" in self._drop]), self.naming)

    def _genes(self, raw: bool = False) -> pd.DataFrame:
        table = native_table(_in_memory(self._adata.raw.var if raw else self._adata.var))
        _check_named(f"{self.name}: .raw" if raw else self.name, table.index, "gene")
        return table

    def obsm(self) -> dict[str, Any]:
        """Return obsm."""
        return {name: _in_memory(value) for name, value in self._adata.obsm.items() if self._kept("obsm", name)}  # rows are taken of it, which copies

    def uns(self) -> dict[str, Any]:
        """Return a copy of uns."""
        return {
            name: copy.deepcopy(_in_memory(value)) for name, value in self._adata.uns.items() if name != "sedd" and self._kept("uns", name)
        }

    def record(self) -> Any:
        """Return what `uns["sedd"]` tells of an earlier task."""
        found = self._adata.uns.get("sedd") if self._kept("uns", "sedd") else None
        if isinstance(found, Mapping):
            found = {name: value for name, value in found.items() if name not in STORE_KEYS or not self.is_store} or None
        return copy.deepcopy(_in_memory(found))

    def lacking(self) -> Lacking | None:
        """Return which genes the files lack that the AnnData was made of."""
        return Lacking.read(_in_memory(self._adata.uns["sedd"].get("lacking"))) if self.is_store else None

    def obsm_names(self) -> list[str]:
        """Names of what is in obsm."""
        return [str(name) for name in self._adata.obsm if self._kept("obsm", name)]

    def _kept(self, group: str, name: str) -> bool:
        return group not in self._drop and f"{group}/{name}" not in self._drop

    def _rows(self, layer: str | None, raw: bool) -> Rows:
        adata = self._adata
        return Rows(adata.raw.X if raw else adata.X if layer is None else adata.layers[layer], self.name)

    def _first_values(self, layer: str | None, raw: bool) -> np.ndarray:
        return self._rows(layer, raw).take(np.arange(min(len(self.obs), 64))).data

    def whole(self) -> ad.AnnData:
        """Return a copy of everything, in memory."""
        adata = self._adata
        lazy = not isinstance(adata.obs, pd.DataFrame)
        whole = adata.to_memory() if adata.isbacked or lazy else adata.copy()
        whole.obs, whole.var = native_table(whole.obs), native_table(whole.var)
        if self.naming != Naming() or self._drop:
            whole.obs, whole.var = self.obs, self.var()
        for group in ("obsm", "uns"):
            for name in [name for name in getattr(whole, group) if not self._kept(group, name)]:
                del getattr(whole, group)[name]
        return whole


def _check_named(where: str, names: pd.Index, noun: str) -> None:
    """Refuse cells or genes without a name, which no file can hold and which are no genes of a model."""
    missing = np.asarray(names.isna())
    if missing.any():
        table = "obs" if noun == "cell" else "var"
        raise UserError(
            f"{where}: {counted(int(missing.sum()), noun)} of {len(names)} {'has' if missing.sum() == 1 else 'have'} no name (first: number "
            f"{int(np.argmax(missing))}, counted from 0); expected one each. Name them, for instance by "
            f"`adata.{table}_names = adata.{table}_names.fillna('unknown')` and `adata.{table}_names_make_unique()`."
        )


def _in_memory(element: Any) -> Any:
    """Return an element of a lazy AnnData as it would be in memory; others as they are."""
    for way in ("to_memory", "compute"):  # of anndata, of Dask
        if hasattr(element, way):
            return getattr(element, way)()
    return {name: _in_memory(value) for name, value in element.items()} if isinstance(element, Mapping) else element


class FileSource(Source):
    """An open file or store.

    Parameters
    ----------
    file
        The file.
    reading
        How it is read.
    fingerprint
        Of the file from before it was opened; None where nobody is to look whether it changes.
    """

    def __init__(self, file: Input, reading: Reading = AS_IT_IS, fingerprint: str | None = None) -> None:
        self.name, self._file = file.path, file
        self._drop = reading.asked.drop
        check_drop(file.path, file.elements() if any("/" in name for name in self._drop) else [], self._drop)
        file.naming = self.naming = reading.naming(file.path, file.var())
        self.layers, self.has_x, self.has_raw = file.layers, file.has_x, file.has_raw
        root = getattr(file, "root", None)
        self.is_store = root is not None and "uns/sedd/meta" in root
        whole = root is not None and root.name == "/"
        self.copyable = whole and self.naming == Naming() and not self._drop
        self._fingerprint = fingerprint

    def check_unchanged(self) -> None:
        """Refuse a file that is another one by now."""
        if self._fingerprint is not None and not (os.path.exists(self.name) and input_fingerprint(self.name) == self._fingerprint):
            raise UserError(f"{self.name}: changed while it was read, so the result would be of two versions of it. Repeat the command when it is complete.")

    @cached_property
    def obs(self) -> pd.DataFrame:  # type: ignore[override]
        """The cells' table."""
        return self._file.obs(drop=self._drop)

    def var(self, raw: bool = False) -> pd.DataFrame:
        """Return the genes' table, or that of `.raw`."""
        frame, kept = self._file.var(raw, self._drop), self._file.kept_genes(raw)
        return frame if kept is None else frame[kept]

    def obsm(self) -> dict[str, Any]:
        """Read obsm."""
        return {name: value for name, value in self._mapping("obsm").items() if np.shape(value)[:1] == (len(self.obs),)}

    def uns(self) -> dict[str, Any]:
        """Read uns."""
        return self._mapping("uns", "uns/sedd")

    def record(self) -> Any:
        """Return what `uns["sedd"]` tells of an earlier task."""
        root = getattr(self._file, "root", None)
        node = None if root is None or {"uns", "uns/sedd"}.intersection(self._drop) or "uns/sedd" not in root else root["uns/sedd"]
        if node is None:
            return None
        with contextlib.suppress(*READ_ERRORS):
            if is_array(node) or not self.is_store:
                return read_element(node)
            return {name: read_element(node[name]) for name in node if name not in STORE_KEYS} or None
        return None

    def lacking(self) -> Lacking | None:
        """Return which genes the files lack that the store was made of."""
        return lacking_of(self._file)

    def obsm_names(self) -> list[str]:
        """Names of what is in obsm."""
        if "obsm" in self._drop:
            return []
        return [name.removeprefix("obsm/") for name in self._file.elements() if name.startswith("obsm/") and name not in self._drop]

    def _mapping(self, group: str, *drop: str) -> dict[str, Any]:
        """Read obsm or uns; an element that cannot be read is left out, and that is said: no task needs it."""
        drop = (*drop, *self._drop)
        with contextlib.suppress(UserError):
            return self._file.mapping(group, drop)
        names = [name for name in self._file.elements() if name.startswith(f"{group}/") and name not in drop]
        found, left = {}, []
        for name in names:
            try:
                found.update(self._file.mapping(group, (*drop, *(other for other in names if other != name))))
            except UserError:
                left.append(name)
        warn_user(
            f"{self.name}: {', '.join(left)} cannot be read by the anndata that is installed, so the result is without."
        )
        return found

    def _rows(self, layer: str | None, raw: bool) -> Rows:
        return Rows(self._file.matrix(layer, raw), self.name, self._file.kept_genes(raw))

    def _first_values(self, layer: str | None, raw: bool) -> np.ndarray:
        return first_values(self._file.matrix(layer, raw))

    def whole(self) -> ad.AnnData:
        """Read everything."""
        file, kept = self._file, self._file.kept_genes()
        columns = slice(None) if kept is None else np.flatnonzero(kept)
        own = (
            file.mapping("uns", tuple(n for n in file.elements() if n.startswith("uns/") and n != "uns/sedd"))
            if self.is_store
            else {}
        )
        adata = ad.AnnData(
            _matrix(file.matrix())[:, columns] if self.has_x else None,
            obs=self.obs,
            var=self.var(),
            obsm=self.obsm(),
            uns=self.uns() | own,
            layers={name: _matrix(file.matrix(name))[:, columns] for name in self.layers},
            **{name: self._mapping(name) for name in ("varm", "obsp", "varp") if kept is None},
        )
        if self.has_raw:
            adata.raw = ad.AnnData(_matrix(file.matrix(raw=True)), obs=self.obs[[]], var=file.var(True))
        return adata


def _matrix(matrix: Matrix) -> Any:
    """Return a whole matrix as NumPy or SciPy have it, entries that are stored twice as they are."""
    if matrix.layout == "dense":
        return matrix.read_dense(0, matrix.shape[0])
    indptr, indices, data = matrix.read_major(0, matrix.n_major)
    kind = sp.csr_matrix if matrix.layout == "csr" else sp.csc_matrix
    return kind((data, indices, indptr), shape=matrix.shape)


def as_source(data: Source | ad.AnnData, name: str = "the AnnData") -> Source:
    """Return the source that an AnnData is."""
    return data if isinstance(data, Source) else AnnDataSource(data, name)


def no_data(data: Any) -> UserError:
    """Return what is said of data that are of no kind that is read."""
    return UserError(
        f"the data are a {type(data).__name__}; expected an AnnData, or the path of a file or store. anndata.AnnData(cells) makes one of a "
        "table or an array of cells by genes."
    )


@contextlib.contextmanager
def opened(data: ad.AnnData | str | Path, name: str = "the AnnData", *, reading: Reading = AS_IT_IS) -> Iterator[Source]:
    """Open what a user gave; of a file the matrices stay where they are, so that it may be larger than memory.

    Parameters
    ----------
    data
        An AnnData, or the path or URL of a file or store.
    name
        What messages call an AnnData.
    reading
        How the data are read.

    Raises
    ------
    UserError
        If there is no such file, or it is of no format that is read.
    """
    if isinstance(data, ad.AnnData):
        yield AnnDataSource(data, name, reading)
    elif not isinstance(data, str | os.PathLike):
        raise no_data(data)
    else:
        before = _fingerprint_of(str(data))
        with reading.open(str(data)) as file:
            source = FileSource(file, reading, before)
            try:
                yield source
            except UserError:
                source.check_unchanged()  # else one that is half rewritten would be called damaged
                raise
            source.check_unchanged()


def _fingerprint_of(path: str) -> str | None:
    """Return the identity of a file or folder; None of what is not there or cannot be read, and over a network, where a look costs more than it tells."""
    if is_remote(path) or not (os.path.isfile(path) or os.path.isdir(path)):
        return None
    with contextlib.suppress(OSError, UserError):
        return input_fingerprint(path)
    return None
