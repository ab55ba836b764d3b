"""Genes by how many cells have them: the store is smaller, and everything in it is the same by name."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sedd.errors import UserError
from sedd.io.convert import convert
from sedd.io.store import CellStore
from sedd.io.verify import verify
from tests.io.conversion.test_convert_killed import changes_of, files_of, processes, run
from tests.io.h5ads import counts, write

__all__ = ["processes"]
pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")

LAYOUTS: dict[str, Any] = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}


def skewed(n_obs: int, n_vars: int, seed: int, prefix: str = "gene") -> tuple[np.ndarray, list[str]]:
    """Counts of genes of which few are common, in no order, and their names."""
    rng = np.random.default_rng(seed)
    return rng.poisson(np.exp(rng.normal(-2, 2, n_vars)), (n_obs, n_vars)), [f"{prefix}{k}" for k in range(n_vars)]


def by_frequency(dense: np.ndarray, names: list[str]) -> list[str]:
    """Names by how many cells have them; ties as they come."""
    seen = [sum(1 for value in column if value) for column in dense.T]
    return [names[k] for k in sorted(range(len(names)), key=lambda k: (-seen[k], k))]


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Any small counts: empty cells and genes, ties, a single gene, all zeros."""
    shape = draw(st.integers(1, 8)), draw(st.integers(1, 70))
    kept = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return rng.integers(1, 4, shape) * (rng.random(shape) < kept * rng.random(shape[1]))


@pytest.mark.slow
@given(dense=matrices(), layout=st.sampled_from(sorted(LAYOUTS)), keep_some=st.booleans())
@settings(max_examples=40, deadline=None)
def test_anndata_reads_the_cells_of_the_file_with_frequent_genes_first(
    dense: np.ndarray, layout: str, keep_some: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("order")
    limit = {"limit_cells": max(1, len(dense) // 2)} if keep_some else {}
    path = write(folder / "a.h5ad", LAYOUTS[layout](dense.astype(np.float32)))
    convert(path, folder / "a.zarr", gene_order="frequent", progress=False, **limit)
    found, expected = ad.read_zarr(folder / "a.zarr"), ad.read_h5ad(path)
    assert found.var_names.tolist() == by_frequency(dense, expected.var_names.tolist())
    there = expected[: found.n_obs, found.var_names]
    np.testing.assert_array_equal(found.X.toarray(), there.to_df().to_numpy())
    assert found.obs_names.tolist() == there.obs_names.tolist()
    assert found.obs["kind"].tolist() == there.obs["kind"].tolist()
    assert found.X.has_sorted_indices
    verify(folder / "a.zarr", path, progress=False)


def three(tmp_path: Path) -> list[str]:
    """Files of different genes and layouts, each with a layer that has genes in another frequency."""
    paths = []
    for k, layout in enumerate(("csr", "csc", "dense")):
        dense, names = skewed(40 + k, 60, k)
        layer = sparse.csr_matrix(np.random.default_rng(k).permuted(dense, axis=1))
        genes = names[k:] + [f"own{k}_{j}" for j in range(k)]
        paths.append(write(tmp_path / f"{k}.h5ad", LAYOUTS[layout](dense), genes, layers={"spliced": layer}))
    return paths


@pytest.mark.parametrize(("join", "shuffle"), [pytest.param("inner", False, marks=pytest.mark.slow), ("outer", True)])
def test_several_files_and_layers_have_the_order_of_the_first_file(join: str, shuffle: bool, tmp_path: Path) -> None:
    paths, asked = three(tmp_path), {"join": join, "shuffle": shuffle, "keep_layers": ("spliced",), "progress": False}
    plain = convert(paths, tmp_path / "plain.zarr", **asked)
    store = convert(paths, tmp_path / "a.zarr", gene_order="frequent", workers=1, **asked)
    assert isinstance(store, CellStore) and isinstance(plain, CellStore)
    first = ad.read_h5ad(paths[0])
    frequent = by_frequency(first.X.toarray(), first.var_names.tolist())
    there = set(plain.var_names)
    assert store.var_names.tolist() == [name for name in frequent if name in there] + [name for name in plain.var_names if name not in frequent]
    found, expected = ad.read_zarr(tmp_path / "a.zarr"), ad.read_zarr(tmp_path / "plain.zarr")[:, store.var_names]
    np.testing.assert_array_equal(found.X.toarray(), expected.X.toarray())
    np.testing.assert_array_equal(found.layers["spliced"].toarray(), expected.layers["spliced"].toarray())
    pd.testing.assert_frame_equal(store.gene_stats(), plain.gene_stats().loc[store.var_names])
    np.testing.assert_array_equal(store.gene_histogram().toarray(), plain.gene_histogram().toarray()[pd.Index(plain.var_names).get_indexer(store.var_names)])
    verify(tmp_path / "a.zarr", paths, progress=False)
    if join == "inner":
        convert(paths, tmp_path / "b.zarr", gene_order="frequent", workers=3, **asked)
        assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "b.zarr")


def test_an_appended_store_is_what_all_files_together_make(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{k}.h5ad", sparse.csr_matrix(skewed(50, 60, k)[0])) for k in range(2)]
    asked: dict[str, Any] = {"gene_order": "frequent", "progress": False}
    whole = convert(paths, tmp_path / "whole.zarr", **asked)
    convert(paths[0], tmp_path / "a.zarr", **asked)
    grown = convert(paths[1], tmp_path / "a.zarr", append=True, progress=False)
    assert isinstance(whole, CellStore) and isinstance(grown, CellStore)
    assert grown.fingerprint == whole.fingerprint
    assert grown.var_names.tolist() == whole.var_names.tolist() != sorted(whole.var_names, key=lambda name: int(name[4:]))
    for own, other in zip(grown.read_rows(0, 100), whole.read_rows(0, 100), strict=True):
        np.testing.assert_array_equal(own, other)
    verify(tmp_path / "a.zarr", paths, progress=False)


@pytest.mark.slow
def test_killed_anywhere_it_is_resumed_to_the_same_bytes(tmp_path: Path, processes: Any) -> None:
    dense, _ = skewed(60, 50, 3)
    source, output = write(tmp_path / "a.h5ad", sparse.csr_matrix(dense)), str(tmp_path / "a.zarr")
    changes, _ = changes_of(processes, source, output, gene_order="frequent")
    expected = files_of(output)
    for number in (len(changes) // 4, len(changes) // 2, 3 * len(changes) // 4):
        shutil.rmtree(output, ignore_errors=True)
        assert changes_of(processes, source, output, number, gene_order="frequent")[1] == -signal.SIGKILL
        assert run(processes, source, output, resume=True, gene_order="frequent") == "done"
        assert files_of(output) == expected


def test_the_store_is_smaller_and_the_same_by_name(tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", sparse.csr_matrix(skewed(1000, 2000, 0)[0]))
    sizes = {}
    for order in ("input", "frequent"):
        convert(source, tmp_path / f"{order}.zarr", gene_order=order, progress=False)
        sizes[order] = sum(path.stat().st_size for path in (tmp_path / f"{order}.zarr/X").rglob("*") if path.is_file())
    assert sizes["frequent"] < 0.9 * sizes["input"]
    found, expected = (ad.read_zarr(tmp_path / f"{order}.zarr") for order in ("frequent", "input"))
    assert found.var_names.tolist() == by_frequency(expected.X.toarray(), expected.var_names.tolist())
    np.testing.assert_array_equal(found.X.toarray(), expected[:, found.var_names].X.toarray())


def test_frequent_genes_that_come_first_already_change_nothing_but_the_setting(tmp_path: Path) -> None:
    dense, names = skewed(40, 30, 0)
    columns = [names.index(name) for name in by_frequency(dense, names)]
    source = write(tmp_path / "a.h5ad", sparse.csr_matrix(dense[:, columns]))
    for order in ("input", "frequent"):
        convert(source, tmp_path / f"{order}.zarr", gene_order=order, progress=False)
    plain, ordered = files_of(tmp_path / "input.zarr"), files_of(tmp_path / "frequent.zarr")
    assert {name for name in plain if plain[name] != ordered[name] and "meta" not in name} == set()


def test_a_file_that_got_other_genes_is_noticed(tmp_path: Path) -> None:
    matrix = counts()
    source = write(tmp_path / "a.h5ad", matrix)
    convert(source, tmp_path / "a.zarr", gene_order="frequent", progress=False)
    write(tmp_path / "a.h5ad", matrix, [f"gene{k}" for k in range(39)] + ["other"])
    with pytest.raises(UserError, match="has other genes than"):
        verify(tmp_path / "a.zarr", source, progress=False)


def test_genes_that_are_chosen_are_ordered_too(tmp_path: Path) -> None:
    dense, names = skewed(50, 40, 4)
    source, chosen = write(tmp_path / "a.h5ad", sparse.csr_matrix(dense)), names[30:3:-2]
    store = convert(source, tmp_path / "a.zarr", genes=chosen, gene_order="frequent", progress=False)
    assert isinstance(store, CellStore)
    assert store.var_names.tolist() == by_frequency(dense[:, 30:3:-2], chosen)
    verify(store.path, source, progress=False)


def test_an_order_that_is_not_known_or_not_that_of_the_store_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", counts())
    with pytest.raises(UserError, match="gene_order must be input or frequent, not 'counts'"):
        convert(source, tmp_path / "a.zarr", gene_order="counts", progress=False)
    convert(source, tmp_path / "a.zarr", progress=False)
    other = write(tmp_path / "b.h5ad", counts(seed=1))
    with pytest.raises(UserError, match="--gene_order: .* was made with another"):
        convert(other, tmp_path / "a.zarr", append=True, gene_order="frequent", progress=False)
    meta = json.loads(str(CellStore(tmp_path / "a.zarr")._group["uns/sedd/meta"][()]))
    assert meta["settings"]["gene_order"] == "input"
