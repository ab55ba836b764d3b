"""The example of docs/loader.md that trains scVI from a store."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.io.stores import small_store

DOCS = Path(__file__).parents[3] / "docs" / "loader.md"

CHECKS = """
import anndata

loss = model.history["train_loss"]["train_loss"].astype(float)
assert model.trainer.global_step == 2 * len(cells) == 2 * 22
assert loss.iloc[1] < 0.95 * loss.iloc[0], loss

# What scVI itself makes of the same cells of the same store.
adata = anndata.read_zarr("atlas.zarr")
SCVI.setup_anndata(adata, batch_key="cell_type")
theirs = SCVI(adata)
for batch, given in zip(cells.loader, cells, strict=True):
    [want] = theirs._make_data_loader(adata=adata, indices=batch.cell.numpy(), batch_size=128, shuffle=False)
    for name in ("X", "batch", "labels"):
        assert torch.equal(given[name].float(), want[name].float()), name
print("the same")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("scvi") is None, reason="scvi-tools is not installed")
def test_the_documented_example_trains_scvi_on_what_scvi_would_have_read(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(from collections.*?SCVI\(.*?)```", DOCS.read_text(), re.DOTALL)
    example = example.replace('"donor"', '"cell_type"')  # which no cell of the store lacks
    (tmp_path / "atlas.zarr").symlink_to(small_store())
    done = subprocess.run(  # in a process of its own: its packages warn, and warnings are errors here
        [sys.executable, "-c", example + CHECKS], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.stdout.endswith("the same\n"), done.stderr
