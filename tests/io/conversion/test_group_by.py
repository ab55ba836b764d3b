"""Cells of one label are stored together: in the order of labels, stable within one, missing ones last."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sedd.commands import format_facts
from sedd.errors import SeddWarning, UserError
from sedd.io.convert import convert
from sedd.io.store import CellStore, store_facts
from sedd.io.verify import verify
from tests.io.conversion.test_convert_killed import changes_of, files_of, processes, run
from tests.io.h5ads import counts

__all__ = ["processes"]
pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


def write(path: Path, n: int, seed: int, kind: str = "csr", labels: str = "text") -> str:
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 6, n)
    values: Any = pd.Series(np.array(["ctrl", "KO-b", "KO-a", "zz", None, "KO-a"], dtype=object)[drawn])
    if labels == "categories":  # in an order of their own, one of them unused
        values = pd.Categorical(values, categories=["zz", "KO-a", "unused", "ctrl", "KO-b"])
    elif labels == "numbers":
        values = pd.array(drawn * 7 % 4, dtype="Int64")
        values[drawn == 4] = pd.NA
    matrix = counts(n, 40, seed=seed)
    made = {"csr": matrix, "csc": matrix.tocsc(), "dense": matrix.toarray()}[kind]
    obs = pd.DataFrame({"guide": np.asarray(values, dtype=object) if labels == "text" else values, "n": np.arange(n)})
    obs.index = [f"s{seed}_{k}" for k in range(n)]
    adata = ad.AnnData(made, obs=obs, layers={"spliced": sparse.csr_matrix(matrix.toarray() // 2)}, obsm={"X_pca": rng.random((n, 2))})
    adata.write_h5ad(path)
    return str(path)


def expected_order(column: pd.Series) -> np.ndarray:
    """Cell by cell: labels in the order of categories or sorted, missing ones last, in the order of the input within each."""
    labels = list(column.cat.categories) if isinstance(column.dtype, pd.CategoricalDtype) else sorted(column.dropna().unique())
    lists = [np.flatnonzero((column == label).fillna(False).to_numpy(bool)) for label in labels]
    return np.concatenate([*lists, np.flatnonzero(column.isna())])


@pytest.mark.parametrize("labels", ["text", "categories", "numbers"])
@pytest.mark.parametrize("kinds", [("csr",), ("csc",), ("csr", "dense", "csc")])
def test_cells_of_a_label_are_together(kinds: tuple[str, ...], labels: str, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{k}.h5ad", 90 - 20 * k, k, kind, labels) for k, kind in enumerate(kinds)]
    store = convert(paths, tmp_path / "a.zarr", group_by="guide", keep_layers=("spliced",), progress=False)
    assert isinstance(store, CellStore)
    files = [ad.read_h5ad(path) for path in paths]
    together = ad.concat(files) if len(files) > 1 else files[0]
    order = expected_order(together.obs["guide"])
    mine = ad.read_zarr(store.path)
    dense = np.vstack([np.asarray(file.X.toarray() if sparse.issparse(file.X) else file.X) for file in files])
    np.testing.assert_array_equal(mine.X.toarray(), dense[order])
    np.testing.assert_array_equal(mine.layers["spliced"].toarray(), dense[order] // 2)
    np.testing.assert_array_equal(mine.obsm["X_pca"], together.obsm["X_pca"][order])
    assert mine.obs_names.tolist() == together.obs_names[order].tolist()
    np.testing.assert_array_equal(mine.obs["sedd_cell"], order)
    assert mine.obs["guide"].isna().equals(mine.obs["guide"].isna().sort_values(kind="stable"))
    changes = (mine.obs["guide"].astype(object).fillna("none").to_numpy()[1:] != mine.obs["guide"].astype(object).fillna("none").to_numpy()[:-1]).sum()
    assert changes == mine.obs["guide"].nunique()  # and the missing ones are one more group
    verify(store.path, paths)
    text = format_facts(store_facts(store.path))
    assert f"guide: {mine.obs['guide'].nunique()} groups and {int(mine.obs['guide'].isna().sum())} cells without" in text


def test_only_the_first_cells_are_grouped_and_appended_ones_come_after(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.h5ad", 80, 1), write(tmp_path / "b.h5ad", 30, 2)
    store = convert(a, tmp_path / "a.zarr", group_by="guide", limit_cells=50, progress=False)
    assert isinstance(store, CellStore)
    first = ad.read_h5ad(a)[:50]
    order = expected_order(first.obs["guide"])
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), first.X.toarray()[order])
    verify(store.path, a)
    with pytest.warns(SeddWarning, match="is grouped by guide; the appended cells come after the others"):
        convert(b, tmp_path / "a.zarr", append=True, progress=False)
    grown = ad.read_zarr(store.path)
    np.testing.assert_array_equal(grown.X.toarray(), np.vstack([first.X.toarray()[order], ad.read_h5ad(b).X.toarray()]))
    assert grown.obs["sedd_cell"].tolist() == [*order, *range(50, 80)]
    verify(store.path, [a, b])
    assert "of the first 50 cells" in format_facts(store_facts(store.path))


@pytest.mark.slow
def test_a_killed_conversion_by_groups_resumes_to_the_same_bytes(processes: Any, tmp_path: Path) -> None:
    source, output = write(tmp_path / "a.h5ad", 200, 1), str(tmp_path / "a.zarr")
    changes, _ = changes_of(processes, source, output, group_by="guide")
    expected = files_of(output)
    for part in (".partial/spill/", ".partial/shards/", ".partial/store/"):
        shutil.rmtree(output)
        numbers = [number for number, change in enumerate(changes) if part in change]
        assert changes_of(processes, source, output, numbers[len(numbers) // 2], group_by="guide")[1] == -signal.SIGKILL
        assert run(processes, source, output, resume=True, group_by="guide") == "done"
        assert files_of(output) == expected


def test_what_cannot_be_grouped_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a.h5ad", 30, 1)
    for options, match in (
        ({"group_by": "guide", "shuffle": True}, "--shuffle spreads the cells that --group_by puts together"),
        ({"group_by": "other"}, r"obs has no column 'other'; it has guide, n"),
        ({"group_by": "guide", "obs": ("n",)}, "--group_by guide: the column is left out"),
        ({"group_by": "guide", "drop": ("obs/guide",)}, "--group_by guide: the column is left out"),
    ):
        with pytest.raises(UserError, match=match):
            convert(a, tmp_path / "a.zarr", progress=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]
