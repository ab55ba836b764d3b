"""A run goes on with the cells that it knew when cells were appended to its store."""

from __future__ import annotations

import pickle
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from test_trainer import assert_same_weights, train

from sedd import checkpoint
from sedd.errors import UserError
from sedd.inference.cells import begins_as_trained_on, cells_of_split
from sedd.inference.sources import opened
from sedd.io.convert import convert
from sedd.io.format.histogram import histogram
from sedd.io.loading.selection import encode_label
from sedd.io.store import CellStore

FLAGS = ("--condition", "cell_type", "--condition_library_size")


@pytest.fixture
def halves(tiny_h5ad: Path, tmp_path: Path) -> tuple[str, str]:
    """The cells of `tiny_h5ad`, and others with labels that sort before theirs."""
    first = ad.read_h5ad(tiny_h5ad)
    second = first[: first.n_obs // 3].copy()
    second.X = second.X[::-1].copy()
    second.obs_names = [f"new{k}" for k in range(second.n_obs)]
    second.obs["cell_type"] = [f"A new kind {k % 2}" for k in range(second.n_obs)]
    paths = str(tmp_path / "first.h5ad"), str(tmp_path / "second.h5ad")
    first.write_h5ad(paths[0])
    second.write_h5ad(paths[1])
    return paths


@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_a_resumed_run_on_a_grown_store_is_the_run_that_never_saw_it_grow(
    halves: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "a.zarr"
    before = convert(halves[0], data, progress=False)
    assert before is not None
    assert train(data, tmp_path / "whole", *FLAGS) == 0
    assert train(data, tmp_path / "run", *FLAGS, "--num_epochs", "1") == 0
    grown = convert(halves[1], data, append=True, progress=False)
    assert grown is not None
    message = f"has grown from {before.n_obs} to {grown.n_obs} cells since this run began"
    capsys.readouterr()
    assert train(data, tmp_path / "run", *FLAGS, "--resume", "auto") == 0
    assert capsys.readouterr().err.count(message) == 1
    assert_same_weights(tmp_path / "whole" / "final.pt", tmp_path / "run" / "final.pt")
    states = [checkpoint.load(tmp_path / name / "final.pt") for name in ("whole", "run")]
    for part in ("split", "data", "categories"):
        assert states[0][part] == states[1][part]
    # And once more, from a checkpoint that was made on the grown store.
    assert train(data, tmp_path / "run", *FLAGS, "--resume", "auto", "--num_epochs", "3") == 0
    assert message in capsys.readouterr().err
    cells = ad.read_zarr(data)
    assert begins_as_trained_on(cells.obs_names, states[1])
    with opened(str(data)) as after, opened(halves[0]) as then:
        for part in ("train", "val"):
            np.testing.assert_array_equal(cells_of_split(after, part, states[1]), cells_of_split(then, part, states[1]))
    assert not begins_as_trained_on(cells.obs_names[::-1], states[1])


@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_a_store_as_it_was_is_the_store_before_it_grew(halves: tuple[str, str], tmp_path: Path) -> None:
    convert(halves[0], tmp_path / "kept.zarr", progress=False)
    store = convert(halves[0], tmp_path / "a.zarr", progress=False)
    assert store is not None
    grown = convert(halves[1], tmp_path / "a.zarr", append=True, progress=False)
    assert grown is not None
    assert grown.as_of(grown.fingerprint) is None
    earlier, kept = grown.as_of(store.fingerprint), CellStore(tmp_path / "kept.zarr")
    assert earlier is not None
    for view in (earlier, pickle.loads(pickle.dumps(earlier))):
        assert (view.n_obs, view.nnz, view.max_value, view.fingerprint) == (kept.n_obs, kept.nnz, kept.max_value, kept.fingerprint)
        for one, other in zip(view.read_rows(0, view.n_obs), kept.read_rows(0, kept.n_obs), strict=True):
            np.testing.assert_array_equal(one, other)
        assert view.obs.index.tolist() == kept.obs.index.tolist()
        assert (view.gene_histogram() != kept.gene_histogram()).nnz == 0
        chosen = np.arange(0, view.n_obs, 3)
        assert (histogram(view, chosen) != histogram(kept, chosen)).nnz == 0
        np.testing.assert_array_equal(view.cell_hashes(), kept.cell_hashes())
        codes, labels = encode_label(view, "cell_type")
        known, names = encode_label(kept, "cell_type")
        assert [*labels, None][codes[5]] == [*names, None][known[5]]
    with pytest.raises(UserError, match="has no cells"):
        earlier.read_rows(0, grown.n_obs)
    with pytest.raises(UserError, match="is of all cells"):
        earlier.gene_stats()
