"""Tables come back from files with the same names, types, values and missing values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import HealthCheck, given, settings

from sedd.io.format.elements import free_names, writable_table, writable_values, write_elements
from tests.io.tables import tables

INDEX = [f"c{k}" for k in range(9)]
OPEN: dict[str, Any] = {
    "zarr": lambda folder: zarr.open_group(folder / "t.zarr", mode="w", zarr_format=3),
    "h5ad": lambda folder: h5py.File(folder / "t.h5ad", "w"),
}


@pytest.mark.parametrize("kind", OPEN)
@given(table=tables(INDEX))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_table_reads_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, kind: str, table: pd.DataFrame) -> None:
    group = OPEN[kind](tmp_path_factory.mktemp("t"))
    notes = write_elements(group, {"obs": table})
    read = ad.io.read_elem(group["obs"])
    names = free_names(table.columns, reserved=("_index",))
    assert list(read.columns) == list(names.values())
    for old, new in names.items():
        pd.testing.assert_series_equal(read[new], table[old], check_names=False, check_index=False)
    assert read.index.tolist() == INDEX
    renamed = [old for old, new in names.items() if old != new]
    assert len([note for note in notes if "column" in note and " is kept as " in note]) == len(renamed)
    unnamed = [note for note in notes if "has no name any more" in note]
    assert read.index.name == (None if unnamed else table.index.name)


def test_what_keeps_its_name() -> None:
    kept = ["G1/S", "CD4+/CD8-", "ünï", " ", "a.b", "G2", "G2M/x"]
    assert free_names(kept) == {name: name for name in kept}
    changed = {"..": ".._", "": "_", "a//b": "a__b", "a\\b": "a_b", "zarr.json": "zarr.json_", "/a": "_a"}
    assert free_names(changed) == changed
    assert free_names(["G1", "G1/S", "G1_S"]) == {"G1": "G1", "G1/S": "G1_S_1", "G1_S": "G1_S"}
    assert free_names(["X/pca"], nested=False) == {"X/pca": "X_pca"}
    long = free_names(["x" * 300, "x" * 301])
    assert len(set(long.values())) == 2
    assert max(map(len, long.values())) < 255


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["a", None, np.nan], "category", ["a", None, None]),
        ([True, None, False], "boolean", [True, None, False]),
        ([3, None, 4], "Int64", [3, None, 4]),
        ([1, "a", None], "category", ["1", "a", None]),
        ([None, None, None], "category", [None, None, None]),
        (
            pd.to_datetime(["2020-01-31", None, "2021-01-01"]),
            "category",
            ["2020-01-31 00:00:00", None, "2021-01-01 00:00:00"],
        ),
        (pd.cut([1, 2, np.nan], 2), "category", ["(0.999, 1.5]", "(1.5, 2.0]", None]),
        (pd.arrays.SparseArray([0.0, 1.0, np.nan]), "float64", [0, 1, None]),
        (pd.Categorical([1, "1", None, 2.5, b"x"]), "category", ["1", "1", None, "2.5", "x"]),
        (pd.array([1.5, None], "Float64"), "float64", [1.5, None]),
        (pd.array([1.5, None], "Float32"), "float32", [1.5, None]),
        (np.array([1.5, 2], np.longdouble), "float64", [1.5, 2]),
        (np.array([1.5, 2j], np.clongdouble), "complex128", [1.5, 2j]),
    ],
    ids=str,
)
def test_values_that_files_cannot_hold_keep_what_is_missing(
    tmp_path: Path, values: Any, kind: str, expected: list[Any]
) -> None:
    frame = pd.DataFrame({"v": pd.Series(values, dtype=object if isinstance(values, list) else None)})
    assert pd.Series(writable_values(frame["v"])).dtype == kind
    group = OPEN["zarr"](tmp_path)
    write_elements(group, {"obs": frame})
    read = ad.io.read_elem(group["obs"])["v"]
    assert [None if pd.isna(value) else value for value in read] == expected


def test_an_ordered_category_of_mixed_labels_keeps_its_order() -> None:
    mixed = pd.Categorical([2, "a", "2", None], categories=["2", "a", 2, (1, 2)], ordered=True)
    written = pd.Series(writable_values(pd.Series(mixed))).array
    assert list(written.categories) == ["2", "a", "(1, 2)"] and written.ordered
    assert written.codes.tolist() == [0, 1, 0, -1]


def test_long_doubles_in_mappings_are_stored_as_doubles(tmp_path: Path) -> None:
    group = OPEN["zarr"](tmp_path)
    write_elements(group, {"obsm": {"X": np.ones((3, 2), np.longdouble)}, "uns": {"deep": {"x": np.ones(2, np.clongdouble)}}})
    assert ad.io.read_elem(group["obsm"])["X"].dtype == np.float64
    assert ad.io.read_elem(group["uns"])["deep"]["x"].dtype == np.complex128


def test_an_index_that_differs_from_the_column_of_its_name_gives_the_name_up() -> None:
    frame = pd.DataFrame({"barcode": ["a", "b"]}, index=pd.Index(["a", "b-1"], name="barcode"))
    table, notes = writable_table(frame)
    assert table.index.name is None
    assert table["barcode"].tolist() == ["a", "b"]
    assert "has no name any more" in notes[0]


def test_names_inside_uns_are_made_ones_a_store_can_hold(tmp_path: Path) -> None:
    group = OPEN["zarr"](tmp_path)
    notes = write_elements(group, {"uns": {"a/b": {"..": np.arange(3)}, "kept": "x"}})
    read = ad.io.read_elem(group["uns"])
    np.testing.assert_array_equal(read["a_b"][".._"], np.arange(3))
    assert read["kept"] == "x"
    assert len(notes) == 2


def test_writing_changes_no_name_of_the_callers_index(tmp_path: Path) -> None:
    table = pd.DataFrame({"barcode": ["x", "y"]}, index=pd.Index(["a", "b"], name="barcode", dtype="string"))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        assert "has no name any more" in write_elements(file, {"obs": table}, rows=None)[0]
    assert table.index.name == "barcode"
