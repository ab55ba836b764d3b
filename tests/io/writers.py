"""The same cells as every program writes them: the fixture `written` runs a test once for each.

Files of anndata are real ones (`make_writers.py`); those of other programs are laid out here as these do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy import sparse

from tests.io.make_writers import CELLS, COLORS, GENES, LATER, N_OBS, N_VARS, SYMBOLS, TABLE, TYPES, embedding, numbers

FOLDER = Path(__file__).parent / "written"
VERSIONS = ["0.6", "0.7", "0.8", "0.10", "0.12", "0.13"]


@dataclass
class Written:
    """A file and what must be found in it.

    Attributes
    ----------
    table, genes : columns of obs and var; None is a missing value
    categories : those of columns of obs, in order, used or not
    places : matrices by the flags of `convert` that choose them
    obsm, uns : what is there
    """

    path: Path
    table: dict[str, list[Any]]
    genes: dict[str, list[Any]] = field(default_factory=lambda: {"symbol": SYMBOLS[:N_VARS]})
    categories: dict[str, list[str]] = field(default_factory=lambda: {"cell_type": TYPES, "stage": ["early", "late"]})
    ordered: bool = True
    places: dict[str, tuple[dict[str, Any], np.ndarray]] = field(default_factory=lambda: {"X": ({}, numbers())})
    obsm: dict[str, np.ndarray] = field(default_factory=lambda: {"X_pca": embedding()})
    uns: dict[str, Any] = field(default_factory=lambda: {"cell_type_colors": COLORS, "title": "ünï"})


def of_anndata(version: str) -> Callable[[Path], Written]:
    """The file that a version of anndata wrote."""

    def written(_: Path) -> Written:
        later = LATER if version not in ("0.6", "0.7") else {}
        places: dict[str, tuple[dict[str, Any], np.ndarray]] = {
            "X": ({}, numbers()),
            "CSC": ({"layer": "by_gene"}, numbers(1)),
            "dense": ({"layer": "dense"}, numbers(2)),
            "raw": ({"raw": True}, numbers(3, len(GENES))),
        }
        genes = {"symbol": SYMBOLS[:N_VARS], "variable": [j % 2 == 0 for j in range(N_VARS)]}
        made = Written(FOLDER / f"anndata-{version}.h5ad", TABLE | later, genes, places=places)
        if version == "0.6":  # which kept no order of categories, and a text as an array of one
            made.ordered, made.uns["title"] = False, ["ünï"]
        return made

    return written


def fixed(text: str) -> np.bytes_:
    """Text of fixed length, as an attribute that is no Python string."""
    return np.bytes_(text.encode())


def fixed_texts(texts: list[str]) -> np.ndarray:
    """Texts of fixed length in UTF-8, as R's and Julia's HDF5 libraries write them."""
    encoded = [text.encode() for text in texts]
    return np.array(encoded, h5py.string_dtype("utf-8", max(map(len, encoded))))


def group_of(parent: h5py.Group, name: str, kind: str, version: str, **attributes: Any) -> h5py.Group:
    """A group with attributes of fixed length."""
    group = parent.create_group(name)
    for key, value in {"encoding-type": fixed(kind), "encoding-version": fixed(version), **attributes}.items():
        group.attrs[key.replace("_of_", "-")] = value
    return group


def array_of(parent: h5py.Group, name: str, values: Any) -> None:
    """An array, of texts if it is a list."""
    texts = isinstance(values, list)
    parent[name] = fixed_texts(values) if texts else values
    parent[name].attrs["encoding-type"] = fixed("string-array" if texts else "array")
    parent[name].attrs["encoding-version"] = fixed("0.2.0")


def matrix_of(parent: h5py.Group, name: str, matrix: Any) -> None:
    """A sparse matrix with indices of 64 bits."""
    group = group_of(parent, name, f"{matrix.format}_matrix", "0.1.0", shape=np.array(matrix.shape, np.int64))
    group["data"], group["indices"], group["indptr"] = (
        matrix.data,
        matrix.indices.astype(np.int64),
        matrix.indptr.astype(np.int64),
    )


def codes(values: list[Any], categories: list[str]) -> np.ndarray:
    """Places in the categories, -1 for what is missing."""
    return np.array([-1 if value is None else categories.index(value) for value in values], np.int8)


def real(values: list[Any]) -> np.ndarray:
    """Numbers, NaN for what is missing."""
    return np.array([np.nan if value is None else value for value in values])


def table_of(
    parent: h5py.Group, name: str, index: list[str], columns: dict[str, Any], index_name: str = "_index"
) -> h5py.Group:
    """A table; its columns are put in by who calls."""
    names = np.array([fixed(column) for column in columns])
    group = group_of(parent, name, "dataframe", "0.2.0", _index=fixed(index_name), column_of_order=names)
    array_of(group, index_name, index)
    return group


def by_r(folder: Path) -> Written:
    """As anndataR: attributes and texts of fixed length, whole numbers of 32 bits, a matrix by columns."""
    path = folder / "r.h5ad"
    with h5py.File(path, "w") as file:
        for key, value in {"encoding-type": "anndata", "encoding-version": "0.1.0"}.items():
            file.attrs[key] = fixed(value)
        matrix_of(file, "X", sparse.csc_matrix(numbers().astype(np.float64)))
        obs = table_of(file, "obs", CELLS, TABLE)
        for name, categories in (("cell_type", TYPES), ("stage", ["early", "late"])):
            column = group_of(obs, name, "categorical", "0.2.0", ordered=np.int8(name == "stage"))
            array_of(column, "codes", codes(TABLE[name], categories))
            array_of(column, "categories", categories)
        for name in ("donor", "library"):
            array_of(obs, name, TABLE[name])
        array_of(obs, "passed", np.array(TABLE["passed"]))
        array_of(obs, "plate", np.array(TABLE["plate"], np.int32))
        array_of(obs, "depth", real(TABLE["depth"]))
        array_of(table_of(file, "var", GENES[:N_VARS], {"symbol": 0}), "symbol", SYMBOLS[:N_VARS])
        array_of(group_of(file, "obsm", "dict", "0.1.0"), "X_pca", embedding())
        uns = group_of(file, "uns", "dict", "0.1.0")
        array_of(uns, "cell_type_colors", COLORS)
        uns["title"] = "ünï"
        uns["title"].attrs["encoding-type"], uns["title"].attrs["encoding-version"] = fixed("string"), fixed("0.2.0")
    return Written(path, TABLE)


def by_seurat(folder: Path) -> Written:
    """As SeuratDisk: a column `_index` beside the index, categories of 0.7 in `__categories`, no encoding of small parts."""
    path = folder / "seurat.h5ad"
    named = {"_index": np.array([name.encode() for name in GENES[:N_VARS]])}
    with h5py.File(path, "w") as file:
        matrix_of(file, "X", sparse.csr_matrix(numbers().astype(np.float64)))
        file["layers/dense"] = numbers(2).astype(np.float64)
        obs = group_of(
            file,
            "obs",
            "dataframe",
            "0.1.0",
            _index=fixed("_index"),
            column_of_order=np.array([b"cell_type", b"plate", b"depth"]),
        )
        obs["_index"] = fixed_texts(CELLS)
        obs["__categories/cell_type"] = fixed_texts(TYPES)
        obs["cell_type"] = codes(TABLE["cell_type"], TYPES)
        obs["cell_type"].attrs["categories"] = obs["__categories/cell_type"].ref
        obs["plate"], obs["depth"] = np.array(TABLE["plate"], np.int32), real(TABLE["depth"])
        var = group_of(
            file,
            "var",
            "dataframe",
            "0.1.0",
            _index=fixed("features"),
            column_of_order=np.array([b"_index", b"symbol"]),
        )
        var["features"], var["_index"], var["symbol"] = named["_index"], named["_index"], fixed_texts(SYMBOLS[:N_VARS])
        file["obsm/X_pca"] = embedding().astype(np.float64)
        file["uns/cell_type_colors"], file["uns/sites"] = fixed_texts(COLORS), np.array([b"\xc3\xbc", b"b"])
    return Written(
        path,
        {name: TABLE[name] for name in ("cell_type", "plate", "depth")},
        {"symbol": SYMBOLS[:N_VARS], "_index_": GENES[:N_VARS]},
        {"cell_type": TYPES},
        ordered=False,
        places={"X": ({}, numbers()), "dense": ({"layer": "dense"}, numbers(2))},
        uns={"cell_type_colors": COLORS, "sites": ["ü", "b"]},
    )


def by_julia(folder: Path) -> Written:
    """As Muon.jl: attributes of fixed length, everything in 64 bits, nullable columns."""
    path = folder / "julia.h5ad"
    own = {name: TABLE[name] for name in ("cell_type", "library", "passed", "depth")} | LATER
    with h5py.File(path, "w") as file:
        matrix_of(file, "X", sparse.csr_matrix(numbers().astype(np.int64)))
        matrix_of(group_of(file, "layers", "dict", "0.1.0"), "by_gene", sparse.csc_matrix(numbers(1).astype(np.int64)))
        obs = table_of(file, "obs", CELLS, own, "barcode")
        column = group_of(obs, "cell_type", "categorical", "0.2.0", ordered=False)
        array_of(column, "codes", codes(TABLE["cell_type"], TYPES))
        array_of(column, "categories", TYPES)
        array_of(obs, "library", TABLE["library"])
        array_of(obs, "passed", np.array(TABLE["passed"]))
        array_of(obs, "depth", real(TABLE["depth"]))
        for name, kind in (("batch", "integer"), ("doublet", "boolean")):
            column = group_of(obs, name, f"nullable-{kind}", "0.1.0")
            array_of(
                column,
                "values",
                np.array([value or 0 for value in LATER[name]], np.int64 if kind == "integer" else bool),
            )
            array_of(column, "mask", np.array([value is None for value in LATER[name]]))
        array_of(table_of(file, "var", GENES[:N_VARS], {"symbol": 0}), "symbol", SYMBOLS[:N_VARS])
        array_of(group_of(file, "obsm", "dict", "0.1.0"), "X_pca", embedding().astype(np.float64))
    return Written(
        path,
        own,
        categories={"cell_type": TYPES},
        ordered=False,
        places={"X": ({}, numbers()), "CSC": ({"layer": "by_gene"}, numbers(1))},
        uns={},
    )


def by_loompy(folder: Path) -> Written:
    """As loompy: genes x cells, attributes as plain arrays, a missing label an empty text."""
    path = folder / "cells.loom"
    own = {name: TABLE[name] for name in ("donor", "library", "plate", "depth")}
    text = h5py.string_dtype("utf-8")
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=numbers().T, chunks=(8, 8), compression="gzip")
        file.create_dataset("layers/spliced", data=numbers(1).T, chunks=(8, 8), compression="gzip")
        file["col_attrs/CellID"], file["row_attrs/Gene"] = np.array(CELLS, text), np.array(GENES[:N_VARS], text)
        for name in ("donor", "library"):
            file[f"col_attrs/{name}"] = np.array(own[name], text)
        file["col_attrs/plate"], file["col_attrs/depth"] = np.array(own["plate"]), real(own["depth"])
        file["col_attrs/X_pca"] = embedding()
        file["row_attrs/symbol"] = np.array(SYMBOLS[:N_VARS], text)
        for name in ("row_graphs", "col_graphs"):
            file.create_group(name)
        file["attrs/LOOM_SPEC_VERSION"] = "3.0.0"
    places: dict[str, tuple[dict[str, Any], np.ndarray]] = {
        "X": ({}, numbers()),
        "layer": ({"layer": "spliced"}, numbers(1)),
    }
    return Written(path, own, categories={}, places=places, uns={})


WRITERS: dict[str, Callable[[Path], Written]] = {
    **{f"anndata {version}": of_anndata(version) for version in VERSIONS},
    "R": by_r,
    "Seurat": by_seurat,
    "Julia": by_julia,
    "loompy": by_loompy,
}


@pytest.fixture(params=WRITERS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    """The file of one writer."""
    made = WRITERS[request.param](tmp_path)
    assert len(made.table) and all(len(values) == N_OBS for values in made.table.values())
    return made
