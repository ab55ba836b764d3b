"""Every writer's file is read whole and right, is trained on, and its cells are denoised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import TINY_FLAGS, dense

from sedd.cli import main
from sedd.io.convert import convert
from tests.io.make_writers import CELLS, GENES, N_VARS
from tests.io.writers import Written, written

__all__ = ["written"]

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


def values(column: pd.Series) -> list[Any]:
    """The values of a column, None for a missing one."""
    return [None if pd.isna(value) else value for value in column.tolist()]


def check(read: ad.AnnData, written: Written) -> None:
    """The tables of cells and genes, and what is beside them."""
    assert read.obs_names.tolist() == CELLS
    assert set(read.obs) == set(written.table)
    for name, expected in written.table.items():
        assert values(read.obs[name]) == expected, name
    for name, categories in written.categories.items():
        dtype = read.obs[name].dtype
        assert isinstance(dtype, pd.CategoricalDtype)
        assert dtype.categories.tolist() == categories
        assert dtype.ordered == (written.ordered and name == "stage")
    for name in {"passed", "plate", "depth"} & set(written.table):
        assert read.obs[name].dtype.kind == {"passed": "b", "plate": "i", "depth": "f"}[name]
    for name in {"batch", "doublet"} & set(written.table):
        assert str(read.obs[name].dtype) == {"batch": "Int64", "doublet": "boolean"}[name]
    assert read.var_names.tolist()[:N_VARS] == GENES[:N_VARS]
    assert set(read.var) == set(written.genes)
    for name, expected in written.genes.items():
        assert values(read.var[name])[:N_VARS] == expected, name
    assert set(read.obsm) == set(written.obsm)
    for name, array in written.obsm.items():
        np.testing.assert_array_equal(read.obsm[name], array)
    assert set(read.uns) - {"sedd"} == set(written.uns)
    for name, kept in written.uns.items():
        assert np.array_equal(read.uns[name], kept), name


def test_tables_and_every_matrix_are_what_was_written(written: Written, tmp_path: Path) -> None:
    for place, (flags, expected) in written.places.items():
        read = ad.read_zarr(convert(written.path, tmp_path / f"{place}.zarr", progress=False, **flags).path)
        np.testing.assert_array_equal(dense(read.X), expected)
        check(read, written)
        assert read.var_names.tolist() == GENES[: expected.shape[1]]


def test_cells_in_another_order_keep_what_is_theirs(written: Written, tmp_path: Path) -> None:
    layers = {flags["layer"]: expected for flags, expected in written.places.values() if "layer" in flags}
    store = convert(written.path, tmp_path / "s.zarr", shuffle=True, keep_layers=tuple(layers), progress=False)
    read = ad.read_zarr(store.path)
    order = np.argsort(read.obs.pop("sedd_cell").to_numpy())
    assert set(read.layers) - {None} == set(layers)  # since 0.13, X is the layer None
    for name, expected in layers.items():
        np.testing.assert_array_equal(dense(read.layers[name])[order], expected)
    with ad.settings.override(remove_unused_categories=False):
        check(read[order], written)


def test_a_model_is_trained_on_it_and_denoises_it(written: Written, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "denoised.h5ad"
    flags = [*TINY_FLAGS, "--num_epochs", "1"]
    if "cell_type" in written.table:
        flags += ["--condition", "cell_type"]
    assert main(["train", "--data_path", str(written.path), "--checkpoint_dir", str(run), *flags]) == 0
    assert main(["denoise", str(run), str(written.path), "-o", str(output)]) == 0
    read = ad.read_h5ad(output)
    assert read.obs_names.tolist() == CELLS
    for name, expected in written.table.items():
        assert values(read.obs[name]) == expected
    assert read.var_names.tolist() == GENES[:N_VARS]
    assert (dense(read.X) >= 0).all() and dense(read.X).any()
