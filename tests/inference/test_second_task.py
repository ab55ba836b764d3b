"""A task on what another made, or on data that have what it makes: nothing is replaced in silence, and what was done before is told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from conftest import dense, make_counts

from sedd.errors import SeddWarning
from sedd.inference.pretrained import Pretrained
from sedd.io.convert import convert
from sedd.io.verify import verify
from sedd.tasks import denoise, embed, impute


def read(path: Path) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)


def data_of(kind: str, adata: ad.AnnData, folder: Path, name: str) -> Any:
    """The cells in memory, in a file, or in a store, which has parts of its own in `uns["sedd"]`."""
    if kind == "memory":
        return adata
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_h5ad(folder / f"{name}.h5ad")
        if kind == "store":
            convert(folder / f"{name}.h5ad", folder / f"{name}.zarr", progress=False)
    return folder / (f"{name}.zarr" if kind == "store" else f"{name}.h5ad")


@pytest.mark.parametrize("kind", ["memory", "h5ad", "store"])
def test_what_a_result_replaces_is_said_and_what_was_done_before_is_kept(kind: str, model: Pretrained, tmp_path: Path) -> None:
    adata = make_counts(40)
    adata.obsm["X_sedd"], adata.uns["sedd"] = np.ones((40, 2)), "my own note"
    data, suffix = data_of(kind, adata, tmp_path, "a"), ".zarr" if kind == "store" else ".h5ad"
    with pytest.warns(SeddWarning, match=r"has obsm\['X_sedd'\] already"):
        first = embed(model, data, without=["cell_type"], output=tmp_path / f"first{suffix}", progress=False)
    if kind != "store":  # in which the place is its own
        assert first.uns["sedd"]["before"] == "my own note"
    with pytest.warns(SeddWarning, match=r"has obsm\['X_sedd'\] already"):
        embed(model, tmp_path / f"first{suffix}", output=tmp_path / f"again{suffix}", progress=False)
    again = read(tmp_path / f"again{suffix}")
    told = again.uns["sedd"]
    assert told["task"] == told["before"]["task"] == "embed"
    assert "without" not in told
    assert list(told["before"]["without"]) == ["cell_type"]
    assert np.array_equal(again.obsm["X_sedd"], embed(model, make_counts(40), progress=False).obsm["X_sedd"])
    assert adata.uns["sedd"] == "my own note" and adata.obsm["X_sedd"].shape == (40, 2)
    if kind == "store":
        assert verify(tmp_path / f"again{suffix}", progress=False)


@pytest.mark.parametrize("kind", ["memory", "h5ad"])
def test_counts_of_the_data_that_are_other_ones_are_told_of(kind: str, model: Pretrained, tmp_path: Path) -> None:
    adata = make_counts(40)
    adata.layers["counts"] = adata.X.copy()
    same = data_of(kind, adata, tmp_path, "same")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = impute(model, same, hide=0.2, progress=False)
    adata.layers["counts"] = adata.X * 2
    other = data_of(kind, adata, tmp_path, "other")
    with pytest.warns(SeddWarning, match="was given X, and that is what the layer counts of the result holds"):
        assert np.array_equal(dense(impute(model, other, hide=0.2, progress=False).layers["counts"]), dense(adata.X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(dense(denoise(model, other, layer="counts", progress=False).layers["counts"]), 2 * dense(adata.X))
        # What impute made holds the counts in that layer.
        after = denoise(model, data_of(kind, found, tmp_path, "found"), layer="counts", progress=False)
    assert np.array_equal(dense(after.layers["counts"]), dense(adata.X))
    assert after.uns["sedd"]["before"]["task"] == "impute" and after.uns["sedd"]["before"]["hide"] == 0.2
