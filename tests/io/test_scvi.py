"""scVI from a store: what it is given, and what it makes of that, is what it reads and makes of the same cells by itself."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_counts

import sedd
from tests.io.stores import small_store

DOCS = Path(__file__).parents[2] / "docs" / "loader.md"

CHECKS = """
import anndata
import numpy as np
import torch

loss = model.history["train_loss"]["train_loss"].astype(float)
assert loss.iloc[1] < 0.95 * loss.iloc[0], loss
adata = anndata.read_zarr("atlas.zarr")
scvi.model.SCVI.setup_anndata(adata, batch_key="cell_type")
theirs = scvi.model.SCVI(adata)


def same(given, cells):
    [want] = theirs._make_data_loader(adata=adata, indices=cells, batch_size=len(cells), shuffle=False)
    for name in ("X", "batch", "labels"):
        assert torch.equal(given[name].float(), want[name].float()), name


train = cells.train_dataloader()
assert model.trainer.global_step == 2 * len(train) == 2 * -(-adata.n_obs // 128)
orders = []
for epoch in (2, 3):  # those that follow the two of the training
    train.loader.set_epoch(epoch)
    orders.append([batch.cell.numpy() for batch in train.loader])
    for given, which in zip(train, orders[-1], strict=True):
        same(given, which)
    assert np.array_equal(np.sort(np.concatenate(orders[-1])), np.arange(adata.n_obs))
assert not np.array_equal(np.concatenate(orders[0]), np.concatenate(orders[1]))
held_out = sedd.io.scvi_datamodule("atlas.zarr", batch_key="cell_type", val_fraction=0.2)
parts = [sum(len(given["X"]) for given in part) for part in (held_out.train_dataloader(), held_out.val_dataloader())]
assert sum(parts) == adata.n_obs and parts[1] == round(0.2 * adata.n_obs), parts

theirs.module.load_state_dict(model.module.state_dict())
theirs.module.eval()
theirs.is_trained_ = True
np.testing.assert_allclose(latent, theirs.get_latent_representation(adata), rtol=1e-4, atol=1e-5)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("scvi") is None, reason="scvi-tools is not installed")
def test_the_documented_example_trains_scvi_on_what_scvi_would_have_read(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(import scvi\n.*?)```", DOCS.read_text(), re.DOTALL)
    example = example.replace('"donor"', '"cell_type"')  # which no cell of the store lacks
    (tmp_path / "atlas.zarr").symlink_to(small_store())
    done = subprocess.run(  # in a process of its own: its packages warn, and warnings are errors here
        [sys.executable, "-c", example + CHECKS], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.stdout.endswith("the same\n"), done.stderr


@pytest.mark.skipif(importlib.util.find_spec("lightning") is not None, reason="lightning is installed")
def test_without_its_packages_the_way_out_is_said() -> None:
    with pytest.raises(sedd.UserError, match=r"pip install 'sedd\[scvi\]'"):
        sedd.io.scvi_datamodule("atlas.zarr")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
@pytest.mark.filterwarnings("default")  # its packages warn
def test_what_scvi_cannot_take_is_refused(tmp_path: Path) -> None:
    cells = make_counts()
    cells.write_h5ad(tmp_path / "a.h5ad")
    store = sedd.convert(tmp_path / "a.h5ad", tmp_path / "a.zarr", progress=False)
    with pytest.raises(sedd.UserError, match="1 of 240 cells have no label in 'cell_type'"):
        sedd.io.scvi_datamodule(store, batch_key="cell_type")
    with pytest.raises(sedd.UserError, match="no label 'batch' in obs; it has"):
        sedd.io.scvi_datamodule(store, batch_key="batch")
    with pytest.raises(sedd.UserError, match="val_fraction is 1"):
        sedd.io.scvi_datamodule(store, val_fraction=1)
    cells.X = np.log1p(cells.X)
    cells.write_h5ad(tmp_path / "b.h5ad")
    logged = sedd.convert(tmp_path / "b.h5ad", tmp_path / "b.zarr", values="real", progress=False)
    with pytest.raises(sedd.UserError, match="holds real values; scVI expects counts"):
        sedd.io.scvi_datamodule(logged)
