"""The usual elements are read and written as anndata does it; all others are left to anndata."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from sedd.io.format.elements import write_elements
from sedd.io.format.plain import kind_of, made_unique, read_element
from tests.io.h5ads import PBMC

TABLE = pd.DataFrame(
    {
        "text": ["a", "", "ü"],
        "number": np.array([1.5, np.nan, -0.0], np.float32),
        "whole": np.array([1, 2, 1 << 40]),
        "yes": [True, False, True],
        "label": pd.Categorical(["x", None, "z"], ["z", "unused", "x"], ordered=True),
        "code": pd.Categorical([3, 1, 3], [1, 3]),
        "some": pd.array([1, None, 3], "UInt16"),
        "maybe": pd.array([True, None, False], "boolean"),
    },
    index=pd.Index(["c1", "c2", "c3"], name="barcode"),
)
PLAIN = {
    "table": TABLE,
    "no columns": pd.DataFrame(index=["a", "b"]),
    "no rows": TABLE.iloc[:0],
    "array": np.arange(6, dtype=np.float16).reshape(3, 2),
    "empty": np.empty((0, 3), np.uint8),
    "strings": np.array([["a", "b"], ["c", ""]], object),
    "fixed strings": np.array(["a", "longer"]),
    "mapping": {"inner": {"deepest": np.arange(3)}, "none": {}},
    "text": "ü",
    "true": True,
    "whole": 7,
    "number": np.float32(0.5),
    "csr": sparse.csr_array(np.eye(3, 4, dtype=np.int64)),
}
OTHER = {
    "null": None,
    "records": np.array([("a", 1)], [("name", "U4"), ("n", "i4")]),
    "list": [1, 2],
    "csc": sparse.csc_matrix(np.eye(3)),
    "nullable": pd.array(["a", None], "string"),
}


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)  # zarr lists what is in a group in any order
        for name in expected:
            same(found[name], expected[name])
    elif isinstance(expected, pd.api.extensions.ExtensionArray):
        pd.testing.assert_extension_array_equal(found, expected)
    elif sparse.issparse(expected):
        assert type(found) is type(expected) and (found != expected).nnz == 0
    else:
        assert type(found) is type(expected)
        np.testing.assert_array_equal(found, expected)
        assert getattr(found, "dtype", None) == getattr(expected, "dtype", None)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.filterwarnings("ignore:The codec")
def test_what_is_usual_is_written_as_anndata_writes_it(name: str, tmp_path: Path) -> None:
    assert kind_of(PLAIN[name])
    ours, theirs = (zarr.open_group(tmp_path / who, mode="w", zarr_format=3) for who in ("ours", "theirs"))
    write_elements(ours, {"at": {"old": 1}})
    write_elements(ours, {"at": PLAIN[name]}, rows=None)
    with ad.settings.override(auto_shard_zarr_v3=False):
        ad.io.write_elem(theirs, "at", PLAIN[name])
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kind", ["zarr", "h5"])
@pytest.mark.filterwarnings("ignore:The codec")
def test_what_is_usual_is_read_as_anndata_reads_it(name: str, kind: str, tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "z", mode="w") if kind == "zarr" else h5py.File(tmp_path / "h", "w")
    with ad.settings.override(auto_shard_zarr_v3=False):
        ad.io.write_elem(group, "at", PLAIN[name])
    same(read_element(group["at"]), ad.io.read_elem(group["at"]))


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.filterwarnings("ignore:The codec")
def test_what_is_unusual_is_left_to_anndata(name: str, tmp_path: Path) -> None:
    assert kind_of(OTHER[name]) is None
    group = zarr.open_group(tmp_path / "z", mode="w", zarr_format=3)
    write_elements(group, {"at": {"inner": OTHER[name]}})
    same(read_element(group["at"]), ad.io.read_elem(group["at"]))


def test_missing_text_whose_type_is_that_of_pandas_3_is_read_as_missing_by_all(tmp_path: Path) -> None:
    text = pd.array(["a", None, ""], dtype=pd.StringDtype(na_value=np.nan))
    group = zarr.open_group(tmp_path / "z", mode="w", zarr_format=3)
    write_elements(group, {"at": pd.DataFrame({"text": text}, index=pd.Index(["x", "y", "z"], dtype=text.dtype))})
    for read in (read_element, ad.io.read_elem):
        table = read(group["at"])
        assert table["text"].isna().tolist() == [False, True, False]
        assert table["text"].dropna().tolist() == ["a", ""]
        assert table.index.tolist() == ["x", "y", "z"]
    same(read_element(group["at/text"]), ad.io.read_elem(group["at/text"]))


def test_columns_named_in_bytes_are_left_to_anndata(tmp_path: Path) -> None:
    """R's writers have attributes of fixed length."""
    file = h5py.File(tmp_path / "h", "w")
    ad.io.write_elem(file, "at", TABLE[["number"]])
    file["at"].attrs["column-order"] = np.array([b"number"], "S6")
    pd.testing.assert_frame_equal(read_element(file["at"]), TABLE[["number"]])


@given(st.lists(st.sampled_from(["a", "a-1", "a-1-1", "b", "a-2"]), max_size=9))
def test_repeated_names_get_the_numbers_of_anndata(names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that such names may be taken for one another
        expected = list(ad.utils.make_index_unique(pd.Index(names, dtype=object)))
    assert made_unique(names) == expected


@pytest.mark.slow
def test_the_shipped_file_is_converted_described_verified_joined_and_trained_on_without_anndata_and_dask(tmp_path: Path) -> None:
    store, run, both, more = tmp_path / "pbmc.zarr", tmp_path / "run", tmp_path / "both.zarr", tmp_path / "more.h5ad"
    cells = ad.read_h5ad(PBMC)[:50].copy()
    cells.X *= 2
    cells.write_h5ad(more)
    code = f"""
import sys
from sedd.cli import main
for words in (["convert", {str(PBMC)!r}, {str(store)!r}], ["info", {str(PBMC)!r}], ["info", {str(store)!r}],
              ["verify", {str(store)!r}, "--against", {str(PBMC)!r}],
              ["convert", {str(PBMC)!r}, {str(more)!r}, {str(both)!r}], ["convert", {str(more)!r}, {str(store)!r}, "--append"]):
    assert main(words) == 0
print("found:", *[name for name in ("anndata", "dask", "distributed", "torch") if name in sys.modules])
size = "--genes 50 --limit_cells 400 --num_epochs 1 --hidden_dim 8 --num_layers 1 --num_heads 1".split()
assert main(["train", "--data_path", {str(store)!r}, "--checkpoint_dir", {str(run)!r}, *size]) == 0
print("found:", *[name for name in ("anndata", "dask", "distributed") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("found:")] == ["found:", "found:"]
