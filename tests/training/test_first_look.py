"""What inputs rule out is said before they are converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import pytest
from conftest import TINY_FLAGS, make_counts

import sedd
from sedd.cli import main
from sedd.errors import UserError


def refused(adata: ad.AnnData, folder: Path, capsys: pytest.CaptureFixture[str], **settings: Any) -> str:
    """Train on the file of cells by the command and from Python, and on themselves; the one message of all three, without whose it is."""
    path = folder / "cells.h5ad"
    adata.write_h5ad(path)
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    capsys.readouterr()
    assert main(["train", "--data_path", str(path), "--checkpoint_dir", str(folder / "run"), *TINY_FLAGS, *words]) == 2
    said = [capsys.readouterr().err.strip().removeprefix("sedd train: error: ").replace(str(path), "DATA")]
    for data in (path, adata):
        with pytest.raises(UserError) as error:
            sedd.train(data, num_threads=1, **settings)
        said.append(str(error.value).replace(str(path), "DATA").replace("the AnnData", "DATA"))
    assert len(set(said)) == 1
    assert sorted(file.name for file in folder.iterdir() if file.name != "run") == ["cells.h5ad"]  # nothing was converted
    return said[0]


@pytest.mark.parametrize("n_obs", [1, 2])
def test_too_few_cells_are_said_before_they_are_converted(n_obs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(make_counts()[:n_obs].copy(), tmp_path, capsys)
    assert said.startswith(f"DATA: {n_obs} cell{'s' * (n_obs > 1)} with --val_fraction 0.1 leave no cell to validate with")


def test_a_label_that_is_not_there_is_said_before_cells_are_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--condition cell_typ: no such obs column" in refused(make_counts(), tmp_path, capsys, condition="cell_typ")


def test_labels_that_a_join_adds_are_known_to_be_there(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cells = make_counts(40)
        cells.obs_names = [f"{name}{cell}" for cell in cells.obs_names]
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    paths = [str(tmp_path / f"{name}.h5ad") for name in "ab"]
    flags = ["--checkpoint_dir", str(tmp_path / "run"), "--condition", "source", *TINY_FLAGS, "--num_epochs", "1"]
    assert main(["train", "--data_path", *paths, *flags]) == 0
    assert list(sedd.Pretrained.load(tmp_path / "run").categories["source"]) == ["a.h5ad", "b.h5ad"]
