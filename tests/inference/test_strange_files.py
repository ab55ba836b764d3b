"""Files as other machines write them, and files that change while a task reads them."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import dense, make_counts

from sedd.errors import UserError
from sedd.inference import applying
from sedd.inference.pretrained import Pretrained
from sedd.io.convert import convert, ensure_store
from sedd.tasks import denoise, embed

pytestmark = pytest.mark.filterwarnings("ignore:.*never seen:sedd.errors.SeddWarning")

N = 12
FOREIGN = (">i2", ">f8", ">u8", ">f4")
TASKS = {"embed": embed, "denoise": denoise}


def written(adata: ad.AnnData, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_h5ad(path)
    return path


def of_a_foreign_machine(folder: Path, name: str, *, first: int = 0, matrix: bool = False) -> tuple[Path, pd.DataFrame]:
    """A file whose numbers have their bytes in the other order, and the table of its cells as it is read right."""
    adata = make_counts(N)
    adata.obs_names = [f"cell{first + k}" for k in range(N)]
    native = {kind: (np.arange(N) + first).astype(np.dtype(kind).newbyteorder("=")) for kind in FOREIGN}
    adata.obs, adata.var = adata.obs.assign(**native), adata.var.assign(start=np.arange(60))
    path = written(adata, folder / name)
    with h5py.File(path, "r+") as file:
        of_matrix = [("X/data", ">f4"), ("X/indices", ">i4"), ("X/indptr", ">i8")]  # which SciPy refuses, and so anndata
        for place, kind in [*((f"obs/{kind}", kind) for kind in FOREIGN), ("var/start", ">i8"), *of_matrix * matrix]:
            values, attributes = file[place][()], dict(file[place].attrs)
            del file[place]
            file[place] = values.astype(kind)
            file[place].attrs.update(attributes)
    return path, adata.obs


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    for kind in FOREIGN:
        assert found[kind].dtype.newbyteorder("=") == np.dtype(kind).newbyteorder("=")
        np.testing.assert_array_equal(found[kind], expected[kind])


@pytest.mark.parametrize("how", ["plain", "shuffled", "joined"])
def test_numbers_in_the_other_order_of_bytes_are_converted(how: str, tmp_path: Path) -> None:
    paths, tables = zip(*(of_a_foreign_machine(tmp_path, f"{k}.h5ad", first=k * N, matrix=True) for k in range(2 if how == "joined" else 1)), strict=True)
    expected, counts = pd.concat(tables), dense(make_counts(N).X)
    store = convert(list(paths), tmp_path / "out.zarr", shuffle=how == "shuffled", progress=False)
    assert store is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ad.read_zarr(store.path)
    same(found.obs, expected.loc[found.obs_names])
    np.testing.assert_array_equal(found.var["start"], np.arange(60))
    rows = [int(name.removeprefix("cell")) % N for name in found.obs_names]
    np.testing.assert_array_equal(dense(found.X), counts[rows])


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("task", TASKS)
def test_numbers_in_the_other_order_of_bytes_come_with_results(task: str, where: str, model: Pretrained, tmp_path: Path) -> None:
    path, expected = of_a_foreign_machine(tmp_path, "a.h5ad")
    foreign = ad.read_h5ad(path)
    foreign.obs = pd.DataFrame({name: expected[name].to_numpy().astype(name) if name in FOREIGN else expected[name] for name in expected}, expected.index)
    data = path if where == "file" else foreign
    for output in (None, tmp_path / "out.h5ad"):
        found = TASKS[task](model, data, output=output, progress=False)
        same(found.obs, expected)
        if output is None:
            np.testing.assert_array_equal(dense(found.X if task == "embed" else found.layers["counts"]), dense(make_counts(N).X))
    same(ad.read_h5ad(tmp_path / "out.h5ad").obs, expected)  # a copy has the bytes of the file


def replaced(path: Path, other: Path) -> None:
    os.replace(other, path)


def rewritten(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def removed(path: Path, other: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("output", [None, "out.h5ad"])
@pytest.mark.parametrize("change", [replaced, rewritten, removed])
@pytest.mark.parametrize("task", TASKS)
def test_a_file_that_changes_while_it_is_read_gives_no_result(
    task: str, change: object, output: str | None, model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = written(make_counts(N), tmp_path / "a.h5ad"), written(make_counts(N, seed=1), tmp_path / "b.h5ad")
    before = applying.described

    def described(*given: object) -> object:  # when the file is open and its tables are read
        change(path, other)  # type: ignore[operator]
        return before(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(applying, "described", described)
    out = None if output is None else tmp_path / output
    with pytest.raises(UserError, match=r"a\.h5ad: changed while it was read"):
        TASKS[task](model, path, output=out, progress=False)
    assert not (tmp_path / "out.h5ad").exists()


def test_a_folder_that_cannot_be_written_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so what the system says is said for it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    path = written(make_counts(N), folder / "a.h5ad")
    monkeypatch.setattr(os, "access", lambda where, mode: Path(where) != folder)
    with pytest.raises(UserError, match=r"shared: may not be written, .* pass --cache_dir"):
        ensure_store(path, progress=False)
    assert [item.name for item in folder.iterdir()] == ["a.h5ad"]
    assert ensure_store(path, cache_dir=tmp_path / "mine", progress=False).n_obs == N
