"""Write tables and mappings, with any names and missing values, so that every anndata reads them back.

anndata writes what an AnnData usually holds; here is what it refuses or changes. A column `G1/S` lies in a group `G1`, where anndata
looks for it; what no Zarr store can hold under its name gets another; text with missing values is kept as categories.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import zarr

from sedd.io.format.plain import kind_of, made_unique, native_table, write_plain

ROWS = 1 << 20
"""Rows of a column in one chunk of a Zarr store: few files."""

TEXT_ROWS = 1 << 18
"""Those of a column of text, which takes ten times the memory."""

_RESERVED = {"", ".", "..", "zarr.json", ".zarray", ".zgroup", ".zattrs"}
"""What no part of a path in a Zarr store can be."""

_LONGEST = 200
"""Bytes of a part of a path; file systems take 255, and there may be more to it."""


def write_elements(group: Any, elements: Mapping[str, Any], *, rows: int | None = ROWS) -> list[str]:
    """Write tables, mappings and arrays into a group of a Zarr store or of an HDF5 file.

    Parameters
    ----------
    group : open for writing
    elements : by their names in the group
    rows : of an array in one chunk; None leaves the choice to anndata

    Returns
    -------
    notes : what is not quite as it was, a line each
    """
    notes: list[str] = []

    def write(func: Any, store: Any, key: str, element: Any, dataset_kwargs: Any, iospec: Any) -> None:
        if isinstance(element, pd.DataFrame):
            table, renamed = writable_table(element)
            notes.extend(f"{key.strip('/')} {note}" for note in renamed)
            _write_table(func, store, key, table, put)
            return
        if isinstance(element, Mapping):
            names = free_names(element, nested=False)
            notes.extend(
                f"{key.strip('/')}: {_shown(old)} is kept as {_shown(new)}" for old, new in names.items() if old != new
            )
            element = {names[name]: value for name, value in element.items()}
        if isinstance(element, np.ndarray) and element.dtype in _LONG:
            element = element.astype(_LONG[element.dtype])
        shape: tuple[int, ...] = getattr(element, "shape", ())
        if rows is not None and iospec.encoding_type in ("array", "string-array") and len(shape) and 0 not in shape:
            most = rows if iospec.encoding_type == "array" else min(rows, TEXT_ROWS)
            dataset_kwargs = {**dataset_kwargs, "chunks": (min(most, shape[0]), *shape[1:])}
        func(store, key, element, dataset_kwargs=dataset_kwargs)

    def put(group: Any, key: str, element: Any) -> None:
        if isinstance(group, zarr.Group) and (kind := kind_of(element)):
            write(partial(write_plain, put=put), group, key, element, {}, kind)
            return
        import anndata as ad  # imported only if it is needed, as it takes long

        with (
            ad.settings.override(auto_shard_zarr_v3=False, allow_write_nullable_strings=True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            ad.experimental.write_dispatched(group, key, element, callback=write)

    for key, element in elements.items():
        put(group, key, element)
    return notes


def _write_table(func: Any, store: Any, key: str, table: pd.DataFrame, put: Any) -> None:
    """Write a table by `func`, but for the columns that lie in groups, as their names have slashes."""
    columns: list[str] = table.columns.tolist()
    nested = [name for name in columns if "/" in name]
    index: Any = table.index.name
    plain = table.drop(columns=nested)
    if index is not None and "/" in index:
        plain = plain.rename_axis(None)
    func(store, key, plain, dataset_kwargs={})
    inside = store[key]
    deep: dict[str, Any] = {name: array_of(table[name]) for name in nested}
    if index is not None and "/" in index:
        deep[index] = array_of(table.index)
        del inside["_index"]
        inside.attrs["_index"] = index
    for name, values in deep.items():
        parent, _, own = name.rpartition("/")
        put(inside.require_group(parent), own, values)
    if nested:
        inside.attrs["column-order"] = columns


def array_of(values: Any) -> Any:
    """Return the array of a column or an index, as what it is to anndata."""
    array = values.array
    return array.to_numpy() if type(array) is pd.arrays.NumpyExtensionArray else array  # StringArray is a kind of it


def writable_table(table: pd.DataFrame, *, is_index: Callable[[Any], bool] | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Return a table that files can hold with every value and every missing value, and what had to be renamed.

    Repeated names of columns get numbers, as AnnData gives them to names of cells.

    Parameters
    ----------
    is_index : whether a column has the values of the index, where `table` has not all rows
    """

    def is_own_index(name: Any) -> bool:
        return bool((table[name].astype(str) == table.index.astype(str)).all())

    table = native_table(table)
    names = free_names([str(name) for name in table.columns], reserved=("_index",))
    columns = [names.get(str(name), "") for name in table.columns]
    if len(set(columns)) < len(columns):
        columns = made_unique(columns)
    notes = [
        f"column {_shown(old)} is kept as {_shown(new)}"
        for old, new in zip(table.columns, columns, strict=True)
        if str(old) != new
    ]
    written = pd.DataFrame(
        {new: writable_values(table.iloc[:, k]) for k, new in enumerate(columns)},
        index=table.index,
        columns=columns or None,
    )
    index = table.index
    written.index = text_index(index)
    name = None if index.name is None else str(index.name)
    if name is not None and name != "_index":
        free = free_names([name])[name]
        if free != name:
            notes.append(f"index {name!r} is kept as {free!r}")
        if free in columns and not (is_index or is_own_index)(table.columns[columns.index(free)]):
            notes.append(
                f"column {free!r} is kept; the index of that name, which differs from it, has no name any more"
            )
            free = ""
        elif any(free != other and (_inside(free, other) or _inside(other, free)) for other in columns):
            free = ""
        name = free or None
    written.index = written.index.rename(name)  # a new one: the index is the caller's
    return written, notes


def text_index(index: pd.Index) -> pd.Index:
    """Return an index as text, unless it is."""
    is_text = index.dtype != object and not isinstance(index, pd.CategoricalIndex) and pd.api.types.is_string_dtype(index.dtype)
    return index if is_text else index.astype(str)


def _shown(name: Any) -> str:
    text = repr(str(name))
    return text if len(text) < 60 else f"{text[:50]}...'"


def _inside(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/")


def free_names(names: Iterable[Any], *, reserved: Iterable[str] = (), nested: bool = True) -> dict[str, str]:
    """Return the names under which a Zarr store can hold what is called so: the same wherever it can.

    Parameters
    ----------
    names : that are wanted
    reserved : names that are not free
    nested : whether a name may have slashes
    """
    names = list(dict.fromkeys(str(name) for name in names))
    taken = set(reserved)
    found = {}
    for name in sorted(
        names, key=lambda name: (not _fits(name, nested), name.count("/"))
    ):  # those that can keep theirs first
        new = name if _fits(name, nested) and name not in taken and not _crosses(name, taken) else _similar(name)
        number = 1
        while new in taken or (new != name and (new in names or _crosses(new, taken))):
            new, number = f"{_similar(name)}_{number}", number + 1
        taken.add(new)
        found[name] = new
    return {name: found[name] for name in names}


def _fits(name: str, nested: bool) -> bool:
    parts = name.split("/") if nested else [name]
    return not any(part in _RESERVED or "\\" in part or "/" in part or len(_bytes(part)) > _LONGEST for part in parts)


def _bytes(part: str) -> bytes:
    return part.encode("utf-8", "surrogatepass")


def _crosses(name: str, taken: set[str]) -> bool:
    """Whether the place of `name` is in, or around, that of another."""
    return any(_inside(name, other) or _inside(other, name) for other in taken)


def _similar(name: str) -> str:
    plain = _bytes(name.replace("/", "_").replace("\\", "_"))[: _LONGEST - 10].decode("utf-8", "ignore")
    return f"{plain}_" if plain in _RESERVED or plain in (name, "_index") else plain


def writable_values(values: pd.Series) -> Any:
    """Return a column with the same values, and the same ones missing, in a type that files of AnnData have.

    Text with missing values becomes categories, as in every file that anndata writes; dates and mixed values become text.
    """
    values = values.reset_index(drop=True)
    dtype = values.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        kind = pd.api.types.infer_dtype(dtype.categories, skipna=False)
        if kind in ("string", "integer", "floating", "boolean", "empty"):
            return values.array
        labels = np.array([*map(_as_text, dtype.categories), None], object)  # the last one for -1
        texts = pd.Index(dict.fromkeys(labels[:-1]))  # 1 and "1" are one text
        return pd.Categorical(labels[values.cat.codes.to_numpy()], categories=texts, ordered=bool(dtype.ordered))
    if isinstance(dtype, pd.SparseDtype):
        return values.to_numpy()
    if isinstance(dtype, pd.ArrowDtype):
        return writable_values(values.convert_dtypes(dtype_backend="numpy_nullable"))
    if isinstance(dtype, pd.Float32Dtype | pd.Float64Dtype):  # files have NaN for what is missing among floats
        return pd.Series(values.to_numpy(np.float32 if dtype == pd.Float32Dtype() else np.float64, na_value=np.nan)).array
    if isinstance(dtype, np.dtype) and dtype in _LONG:
        return pd.Series(values.to_numpy().astype(_LONG[dtype])).array
    if isinstance(dtype, pd.StringDtype) or pd.api.types.is_bool_dtype(dtype) or pd.api.types.is_numeric_dtype(dtype):
        return values.array
    there = values[values.notna()]
    kind = pd.api.types.infer_dtype(there, skipna=True) if pd.api.types.is_object_dtype(dtype) else "dates"
    if kind == "floating":
        return values.astype("float64").array
    if kind == "boolean" or (kind == "integer" and all(-(1 << 63) <= int(value) < 1 << 63 for value in there)):
        names = ("boolean", "bool") if kind == "boolean" else ("Int64", "int64")
        own: Any = names[len(there) == len(values)]
        return values.astype(own).array
    text = pd.Series([_as_text(value) for value in there], there.index, object)
    return text.array if len(there) == len(values) else pd.Categorical(text.reindex(values.index))


_LONG: dict[Any, Any] = {np.dtype(np.longdouble): np.dtype(np.float64), np.dtype(np.clongdouble): np.dtype(np.complex128)}
"""Types of which a Zarr store knows the half alone."""


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
