"""The usual elements of an AnnData file, read and written without anndata.

Importing anndata, which imports Dask, takes longer than converting 10,000 cells. So what nearly all files hold is read and written here, as
anndata does; everything else, and every older layout, is left to anndata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse


class Kind(NamedTuple):
    """How an element is encoded, and in which version of that encoding."""

    encoding_type: str
    encoding_version: str


ARRAY, STRINGS = Kind("array", "0.2.0"), Kind("string-array", "0.2.0")
NUMBER, STRING = Kind("numeric-scalar", "0.2.0"), Kind("string", "0.2.0")
CATEGORICAL, TABLE, MAPPING = Kind("categorical", "0.2.0"), Kind("dataframe", "0.2.0"), Kind("dict", "0.1.0")
INTEGERS, BOOLEANS = Kind("nullable-integer", "0.1.0"), Kind("nullable-boolean", "0.1.0")
NULLABLE_STRINGS = Kind("nullable-string-array", "0.1.0")
CSR = Kind("csr_matrix", "0.1.0")


def made_unique(names: list[str]) -> list[str]:
    """Return names of which none repeats: as AnnData does, the second of them has `-1`, or the next number that makes it new."""
    taken, numbers = set(names), Counter[str]()
    found: dict[str, None] = {}
    for name in names:
        new = name
        while new in found or (new != name and new in taken):
            numbers[name] += 1
            new = f"{name}-{numbers[name]}"
        found[new] = None
    return list(found)


def native(array: Any) -> Any:
    """Return an array with bytes in the order of this machine, which is all that pandas works with; anything else as it is."""
    return array.astype(array.dtype.newbyteorder("=")) if isinstance(array, np.ndarray) and not array.dtype.isnative else array


def native_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose columns have bytes in the order of this machine."""
    foreign = [k for k, dtype in enumerate(table.dtypes) if isinstance(dtype, np.dtype) and not dtype.isnative]
    if not foreign:
        return table
    columns = {k: native(table.iloc[:, k].to_numpy()) if k in foreign else table.iloc[:, k].array for k in range(table.shape[1])}
    return pd.DataFrame(columns, index=table.index).set_axis(table.columns, axis=1)


def column_called(table: pd.DataFrame, name: str) -> pd.Series | None:
    """Return the column of that name, which in memory may be a number or another object that says so; None if there is none."""
    if name in table:
        return table[name]
    return next((table.iloc[:, k] for k, own in enumerate(table.columns) if str(own) == name), None)


def read_element(node: Any) -> Any:
    """Return an element of an HDF5 file or of a Zarr store, as `anndata.io.read_elem` does."""
    found = node.attrs.get("encoding-type"), node.attrs.get("encoding-version")
    read = _READERS.get(Kind(*found)) if all(isinstance(word, str) for word in found) else None
    if found == (None, None) and bool(getattr(node, "shape", ())) and node.dtype.kind in "biuf":  # before anndata 0.8 nothing was said
        read = _READERS[ARRAY]
    value = NotImplemented if read is None else read(node)
    if value is NotImplemented:
        import anndata as ad

        return ad.io.read_elem(node)
    return value


def _read_text(node: Any) -> Any:
    return node.asstr()[()] if hasattr(node, "asstr") else node[()]


def _read_categorical(node: Any) -> pd.Categorical:
    codes, categories = read_element(node["codes"]), read_element(node["categories"])
    return pd.Categorical.from_codes(codes, categories, ordered=bool(node.attrs["ordered"]))


def _read_table(node: Any) -> Any:
    names, index = list(node.attrs["column-order"]), node.attrs["_index"]
    if not all(isinstance(name, str) for name in [*names, index]):
        return NotImplemented  # other writers than anndata have bytes there
    columns = {name: read_element(node[name]) for name in names}
    frame = pd.DataFrame(columns, index=read_element(node[index]), columns=names or None)
    if index != "_index":
        frame.index.name = index
    return frame


def _nullable_strings(node: Any) -> Callable[..., Any]:
    """Return what makes an array of a group of nullable strings from its `values` and `mask`."""
    text: Any = pd.Index(["a"]).dtype  # a type of its own since pandas 3, in which a missing value is NaN
    is_text = isinstance(text, pd.StringDtype) and node.attrs.get("na-value") == "NaN"

    def make(values: np.ndarray, *, mask: np.ndarray) -> Any:
        array: Any = pd.array(values.astype(object), dtype=text if is_text else pd.StringDtype())
        array[mask] = array.dtype.na_value
        return array

    return make


def _read_nullable_strings(node: Any) -> Any:
    return _nullable_strings(node)(read_element(node["values"]), mask=read_element(node["mask"]))


def _read_csr(node: Any) -> sparse.csr_matrix:
    data, indices, indptr = (node[name][()] for name in ("data", "indices", "indptr"))
    return sparse.csr_matrix((data, indices, indptr), shape=tuple(node.attrs["shape"]))


def _reader_of_masked(array: Any) -> Callable[[Any], Any]:
    return lambda node: array(read_element(node["values"]), mask=read_element(node["mask"]))


def rows_of(node: Any) -> tuple[int, Callable[[int, int], Any]] | None:
    """Return how long a column of a table is and what reads rows `lo:hi` of it, as `read_element` would; None for an uncommon encoding."""
    found = node.attrs.get("encoding-type"), node.attrs.get("encoding-version")
    kind = Kind(*found) if all(isinstance(word, str) for word in found) else None
    if kind in (ARRAY, STRINGS) or found == (None, None):  # before anndata 0.8 nothing was said
        is_text = hasattr(node, "asstr") and node.dtype.kind == "O"
        if len(getattr(node, "shape", ())) != 1 or (node.dtype.kind not in "biuf" and not is_text and kind != STRINGS):
            return None
        rows = node.asstr() if is_text else node
        return int(node.shape[0]), lambda lo, hi: native(rows[lo:hi])
    if kind == CATEGORICAL:
        codes, ordered = node["codes"], bool(node.attrs["ordered"])
        dtype = pd.CategoricalDtype(read_element(node["categories"]), ordered=ordered)
        return int(codes.shape[0]), lambda lo, hi: pd.Categorical.from_codes(codes[lo:hi], dtype=dtype)
    masked: dict[Kind | None, Callable[..., Any]] = {
        INTEGERS: pd.arrays.IntegerArray, BOOLEANS: pd.arrays.BooleanArray, NULLABLE_STRINGS: _nullable_strings(node),
    }  # fmt: skip
    if kind not in masked:
        return None
    values = rows_of(node["values"])
    if values is None:
        return None
    return values[0], lambda lo, hi: masked[kind](values[1](lo, hi), mask=node["mask"][lo:hi])


_READERS: dict[Kind, Callable[[Any], Any]] = {
    ARRAY: lambda node: native(node[()]),
    STRINGS: _read_text,
    NUMBER: lambda node: node[()].item(),
    STRING: lambda node: str(_read_text(node)),
    MAPPING: lambda node: {name: read_element(inside) for name, inside in dict(node).items()},
    CATEGORICAL: _read_categorical,
    TABLE: _read_table,
    INTEGERS: _reader_of_masked(pd.arrays.IntegerArray),
    BOOLEANS: _reader_of_masked(pd.arrays.BooleanArray),
    NULLABLE_STRINGS: _read_nullable_strings,
    CSR: _read_csr,
}


def kind_of(element: Any) -> Kind | None:
    """How `write_plain` encodes an element; None for what is left to anndata."""
    kind = type(element)
    if kind is np.ndarray and element.ndim:
        if element.dtype.kind in "OU":
            return STRINGS if pd.api.types.infer_dtype(element.reshape(-1), skipna=False) == "string" else None
        return ARRAY if element.dtype.kind in "biuf" else None
    if isinstance(element, pd.arrays.StringArray | pd.arrays.ArrowStringArray):
        return None if element.dtype.na_value is pd.NA else NULLABLE_STRINGS  # all text, since pandas 3
    if kind in (bool, int, float) or isinstance(element, np.number | np.bool_):
        return NUMBER if np.asarray(element).dtype.kind in "biuf" else None
    return _KINDS.get(kind)


_KINDS: dict[type, Kind] = {
    str: STRING, dict: MAPPING, pd.DataFrame: TABLE, pd.Categorical: CATEGORICAL,
    pd.arrays.IntegerArray: INTEGERS, pd.arrays.BooleanArray: BOOLEANS, sparse.csr_array: CSR, sparse.csr_matrix: CSR,
}  # fmt: skip


def write_plain(
    group: Any, key: str, element: Any, *, put: Callable[[Any, str, Any], None], dataset_kwargs: Mapping[str, Any]
) -> None:
    """Write an element that has a `kind_of` into a group of a Zarr v3 store, in the place of one of that name.

    Parameters
    ----------
    group : of zarr
    key, element : what to write
    put : writes what is inside a table, mapping or matrix; takes group, key and element
    dataset_kwargs : for the array, such as its chunks
    """
    kind = kind_of(element)
    assert kind is not None
    if kind in (ARRAY, STRINGS, NUMBER, STRING):
        _write_array(group, key, np.asarray(element), attributes=encoding(kind), **dataset_kwargs)
        return
    more, inside = parts_of(kind, element)
    made = group.create_group(key, attributes=more | encoding(kind), overwrite=True)
    for name, part in inside.items():
        put(made, name, part)
    for name in ("data", "indices", "indptr") if kind == CSR else ():
        _write_array(made, name, getattr(element, name))


def encoding(kind: Kind) -> dict[str, str]:
    """Return the attributes that say how an element is encoded."""
    return dict(zip(("encoding-type", "encoding-version"), kind, strict=True))


def parts_of(kind: Kind, element: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what else the attributes of an element's group say, and the elements in it but for those of a matrix."""
    if kind == MAPPING:
        return {}, element
    if kind == TABLE:
        index = "_index" if element.index.name is None else element.index.name
        columns = {index: element.index._values} | {name: column._values for name, column in element.items()}
        return {"column-order": element.columns.tolist(), "_index": index}, columns
    if kind == CATEGORICAL:
        return {"ordered": bool(element.ordered)}, {"codes": element.codes, "categories": element.categories.to_numpy()}
    if kind == CSR:
        return {"shape": list(map(int, element.shape))}, {}
    if kind == NULLABLE_STRINGS:
        return {"na-value": "NaN"}, {"values": element.to_numpy(object, na_value=""), "mask": element.isna()}
    return {}, {"values": element.to_numpy(na_value=0, dtype=element.dtype.numpy_dtype), "mask": element.isna()}


def _write_array(group: Any, key: str, values: np.ndarray, **how: Any) -> None:
    dtype: Any = str if values.dtype.kind in "OU" else values.dtype
    group.create_array(key, shape=values.shape, dtype=dtype, overwrite=True, **how)[...] = values
