"""Entries of one cell and gene that are stored several times, up to sums that no type here holds; counts that single precision does not hold."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from conftest import TINY_FLAGS, dense, make_counts
from hypothesis import given, settings
from hypothesis import strategies as st

from sedd.cli import main
from sedd.errors import SeddWarning, UserError
from sedd.inference.matrices import Rows
from sedd.inference.pretrained import Pretrained
from sedd.io.conversion.counts import LargeSumError, clean_rows, to_counts
from sedd.io.convert import convert
from sedd.io.loader import CellLoader
from sedd.tasks import denoise, impute

N, M = 8, 60
LIMIT = 2**32 - 1
DTYPES = ("uint8", "int8", "uint16", "int32", "uint32", "int64", "float32", "float64")
pytestmark = pytest.mark.filterwarnings("ignore:.*(never seen|summed|have no counts)")


def stored_twice(rows: list[int], columns: list[int], values: np.ndarray, layout: str) -> sp.spmatrix:
    """A matrix whose entries are as given, in the order given: unsorted, repeated, zero."""
    major, minor, size = (rows, columns, N) if layout == "csr" else (columns, rows, M)
    order = np.argsort(major, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(np.array(major, int), minlength=size))])
    kind = sp.csr_matrix if layout == "csr" else sp.csc_matrix
    return kind((values[order], np.array(minor, np.int32)[order], indptr), shape=(N, M))


def with_matrix(matrix: sp.spmatrix) -> ad.AnnData:
    adata = make_counts(N)
    adata.X = matrix
    return adata


def written(adata: ad.AnnData, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_h5ad(path)
    return path


@st.composite
def entries(draw: st.DrawFn) -> tuple[list[int], list[int], np.ndarray]:
    """Few cells and genes, so that many meet, of counts up to the largest that the type and a store have."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    most = min(LIMIT, 2**24 if dtype == np.float32 else 2**53 if dtype.kind == "f" else int(np.iinfo(dtype).max))
    places = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
    near = st.one_of(st.integers(0, 3), st.integers(max(0, most - 3), most))
    values = draw(st.lists(near, min_size=len(places), max_size=len(places)))
    rows, columns = map(list, zip(*places, strict=True))
    return rows, columns, np.array(values).astype(dtype)


@settings(max_examples=60, deadline=None)
@given(found=entries(), layout=st.sampled_from(["csr", "csc"]))
def test_entries_stored_twice_are_summed_exactly_or_refused(found: tuple[list[int], list[int], np.ndarray], layout: str) -> None:
    rows, columns, values = found
    expected = np.zeros((N, M))
    np.add.at(expected, (rows, columns), values.astype(np.float64))
    matrix = stored_twice(rows, columns, values, layout)
    np.testing.assert_array_equal(Rows(matrix).take(np.arange(N)).toarray(), expected)
    own = matrix.indptr.astype(np.int64), matrix.indices, to_counts(matrix.data, np.dtype(np.uint8)).values, matrix.shape[layout == "csr"], None
    if expected.max() > LIMIT:
        with pytest.raises(LargeSumError) as error:
            clean_rows(*own)
        cell, gene = (error.value.row, error.value.gene)[:: 1 if layout == "csr" else -1]
        assert error.value.value == expected[cell, gene] > LIMIT
        return
    indptr, indices, summed, _ = clean_rows(*own)
    kind = sp.csr_matrix if layout == "csr" else sp.csc_matrix
    np.testing.assert_array_equal(kind((summed.astype(np.float64), indices, indptr), shape=(N, M)).toarray(), expected)


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_the_largest_sum_is_converted_and_larger_ones_are_refused(layout: str, tmp_path: Path) -> None:
    largest, larger = (with_matrix(stored_twice([3, 1, 3], [7, 2, 7], np.array([2**31, 5, 2**31 - k]), layout)) for k in (1, 0))
    store = convert(written(largest, tmp_path / "a.h5ad"), tmp_path / "a.zarr", progress=False)
    assert store is not None
    assert dense(ad.read_zarr(store.path).X)[3, 7] == LIMIT
    with pytest.raises(UserError, match=r"b\.h5ad: X has several entries of cell 3 \('cell3'\) and gene 'gene7', which add up to 4294967296, too large"):
        convert(written(larger, tmp_path / "b.h5ad"), tmp_path / "b.zarr", progress=False)
    assert not list(tmp_path.glob("b.zarr*"))


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_an_error_leaves_no_input_open(layout: str, tmp_path: Path) -> None:
    """Whoever holds the error, as a notebook does, may write the file anew."""
    big = np.array([3e9, 3e9])
    path = written(with_matrix(stored_twice([3, 3], [7, 7], big, layout)), tmp_path / "a.h5ad")
    with pytest.raises(UserError, match="add up to 6000000000") as held:
        convert(path, tmp_path / "out.zarr", progress=False)
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0
    written(make_counts(N), path)
    assert held.value is not None


def with_count(value: int) -> ad.AnnData:
    x = dense(make_counts(N).X).astype(np.int64)
    x[3, 7] = value
    return with_matrix(sp.csr_matrix(x))


@pytest.mark.parametrize("output", [None, "out.h5ad"])
def test_a_count_that_a_result_cannot_hold_is_said(output: str | None, model: Pretrained, tmp_path: Path) -> None:
    out = None if output is None else tmp_path / output
    with pytest.warns(SeddWarning, match=r"counts above 16777216.*16777217 at cell 3, gene 'gene7' is 16777216 there"):
        impute(model, with_count(2**24 + 1), output=out, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SeddWarning)
        denoise(model, with_count(2**24 + 2), progress=False)


def test_a_loader_says_once_which_counts_single_precision_does_not_hold(tmp_path: Path) -> None:
    store = convert(written(with_count(2**24 + 1), tmp_path / "a.h5ad"), tmp_path / "a.zarr", progress=False)
    assert store is not None

    def largest(**options: object) -> int:
        with CellLoader(store, split="all", mask=None, shuffle=False, **options) as loader:
            first, again = ([int(batch.tokens.max()) for batch in loader] for _ in range(2))
            assert first == again
            return first[0]

    said = r"a\.zarr has counts above 16777216 \(the largest is 16777217\); float32 rounds them"
    with pytest.warns(SeddWarning, match=said) as found:
        assert largest(dtype="float32") == 2**24
    assert len(found) == 1
    with pytest.warns(SeddWarning, match=said), CellLoader(store, split="all") as loader:
        assert next(loader.as_csr()).x.max() == 2**24
    with warnings.catch_warnings():
        warnings.simplefilter("error", SeddWarning)
        assert largest() == 2**24 + 1  # tokens are whole numbers
        assert 0 < largest(dtype="float32", target_sum=1e4) <= 1e4


def test_a_count_that_no_model_takes_is_said_with_its_place(model: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"the AnnData: a value is 2147483648 at cell 3, gene 'gene7'; expected counts up to 2147483646"):
        impute(model, with_count(2**31), progress=False)
    path = written(with_count(2**31), tmp_path / "a.h5ad")
    assert main(["train", "--data_path", str(path), "--checkpoint_dir", str(tmp_path / "run"), *TINY_FLAGS]) == 2
    assert "gene 'gene7' has a count of 2147483648; expected counts up to 2147483646" in capsys.readouterr().err
