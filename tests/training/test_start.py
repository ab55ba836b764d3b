"""What a run learns of its cells before the first step, and how much of the store it reads for that."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from conftest import TINY_FLAGS

from sedd.checkpoint import split_of
from sedd.cli import main
from sedd.config import DataConfig, ModelConfig, TrainConfig
from sedd.errors import UserError
from sedd.io.convert import convert
from sedd.io.files import obs_digest
from sedd.io.remote import filesystem
from sedd.io.store import CellStore
from sedd.training import run_data
from sedd.training.run_data import prepare_panel

N_OBS, N_VARS = 3000, 30
pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    counts = np.random.default_rng(0).poisson(0.7, (N_OBS, N_VARS)).astype(np.float32)
    ad.AnnData(sp.csr_matrix(counts)).write_h5ad(folder / "a.h5ad")
    convert(folder / "a.h5ad", folder / "a.zarr", shuffle=True, progress=False)
    return folder / "a.zarr"


def config(path: Path | str, **data: object) -> TrainConfig:
    return TrainConfig(data=DataConfig(data_path=str(path), genes="20", **data), model=ModelConfig(condition_library_size=True))


def dense(store: CellStore) -> np.ndarray:
    indptr, indices, data = store.read_rows(0, store.n_obs)
    return sp.csr_array((data, indices.astype(np.int32), indptr), shape=(store.n_obs, store.n_vars)).toarray()


def test_a_start_reads_only_validation_cells_and_counts_all_others(shuffled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    read = CellStore.read_cells
    monkeypatch.setattr(CellStore, "read_cells", lambda store, cells: seen.append(cells) or read(store, cells))
    panel = prepare_panel(config(shuffled, val_cells=128), None)
    val, train = panel.val_cells.cells(), panel.train_cells.cells()
    np.testing.assert_array_equal(np.concatenate(seen), val)
    assert val.size == 128
    assert set(np.bincount(val // 64)) == {0, 64}
    genes = [list(panel.store.var_names).index(gene) for gene in panel.genes]
    counts = dense(panel.store)[train][:, genes]
    expected = np.stack([np.bincount(gene, minlength=panel.histogram.shape[1]) for gene in counts.T])
    np.testing.assert_array_equal(panel.histogram.toarray(), expected)


def test_few_validation_cells_lie_apart_unless_the_store_is_shuffled_and_large(shuffled: Path, tmp_path: Path) -> None:
    assert prepare_panel(config(shuffled), None).val_cells.block == 1  # its tenth is below --val_cells
    plain = tmp_path / "plain.zarr"
    convert(shuffled.parent / "a.h5ad", plain, progress=False)
    val = prepare_panel(config(plain, val_cells=100), None).val_cells
    assert (val.block, val.n_cells) == (1, 100)
    assert np.diff(val.cells()).max() < 100


def test_a_checkpoint_remembers_its_split_and_an_old_one_has_no_limit(shuffled: Path) -> None:
    panel = prepare_panel(config(shuffled, val_cells=128), None)
    state = panel.state()
    assert (split_of(state, "train"), split_of(state, "val")) == (panel.train_cells, panel.val_cells)
    del state["split"]["most"], state["split"]["block"]
    assert split_of(state, "val").n_cells == N_OBS // 10


def test_quantiles_of_many_totals_come_from_a_sample_of_a_known_error(shuffled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = prepare_panel(config(shuffled), None)
    monkeypatch.setattr(run_data, "_SAMPLED", 1000)
    some = prepare_panel(config(shuffled), None)
    assert not np.array_equal(some.libraries, exact.libraries)
    genes = [list(exact.store.var_names).index(gene) for gene in exact.genes]
    totals = np.sort(dense(exact.store)[exact.train_cells.cells()][:, genes].sum(1))
    bound = np.sqrt(np.log(2 / 0.001) / 2 / 1000)
    shares = np.linspace(0, 1, some.libraries.size)
    low, high = (np.searchsorted(totals, some.libraries, side=side) / totals.size for side in ("left", "right"))
    assert np.maximum(low - shares, shares - high).max() < bound


def test_a_loader_and_a_start_read_no_names_but_for_their_digest(shuffled: Path) -> None:
    panel = prepare_panel(config(shuffled, val_cells=128), None)
    digest = panel.cells_digest
    assert "obs" not in vars(panel.store)
    assert digest == obs_digest(panel.store.obs.index)


def test_a_remote_file_is_trained_on_through_a_store_in_the_cache_and_else_refused_in_a_line(
    shuffled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"s3://bucket/file.h5ad: .*pass --cache_dir to say where, or convert it yourself\.$"):
        prepare_panel(config("s3://bucket/file.h5ad"), None)
    assert not list(tmp_path.iterdir())
    url = "memory://start/a.h5ad"
    filesystem(url)[0].put_file(str(shuffled.parent / "a.h5ad"), "/start/a.h5ad")
    panel = prepare_panel(config(url, cache_dir=str(tmp_path / "cache")), None)
    assert panel.store.n_obs == N_OBS
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_name_that_is_not_utf8_is_refused_before_anything_is_trained(tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / os.fsdecode(b"caf\xe9.h5ad")
    shutil.copyfile(tiny_h5ad, data)
    assert main(["train", "--data_path", str(data), "--checkpoint_dir", str(tmp_path / "run"), *TINY_FLAGS]) == 2
    said = capsys.readouterr().err
    assert "caf\\udce9.h5ad: has bytes that are not UTF-8" in said and "rename it" in said
