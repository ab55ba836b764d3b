"""Files made to run something when they are read: each kind that a command takes is refused, and nothing has run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_FLAGS

from sedd import checkpoint
from sedd.cli import main
from sedd.inference.pretrained import Pretrained
from sedd.io.convert import convert


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.target}'",)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "owned"


def refused(target: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that ends with status 2 and one line, without the payload having run; the line."""
    capsys.readouterr()
    assert main(arguments) == 2
    assert not target.exists()
    said = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("warning:")]
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize("kind", ["archive", "plain pickle", "in a whole checkpoint"])
def test_a_checkpoint(
    kind: str, target: Path, tiny_run: Path, tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    content = {"sedd_format": checkpoint.FORMAT, "model": Payload(target)}
    if kind == "in a whole checkpoint":
        content = {**checkpoint.load(tiny_run / "best.pt"), "note": Payload(target)}
    path = run / "best.pt"
    path.write_bytes(pickle.dumps(content)) if kind == "plain pickle" else torch.save(content, path)
    training = ["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(tmp_path / "new"), *TINY_FLAGS]
    for arguments in (
        ["info", str(path)],
        ["generate", str(run), "-n", "1", "-o", str(tmp_path / "x.h5ad")],
        ["impute", str(path), str(tiny_h5ad), "-o", str(tmp_path / "x.h5ad")],
        ["export", str(run), str(tmp_path / "exported")],
        [*training, "--resume", str(path)],
    ):
        said = refused(target, arguments, capsys)
        assert "best.pt" in said
        assert "weights_only" not in said  # no advice to run it
    shutil.copy(tiny_run / "args.json", run)  # without it the directory is not known to be a run's, and is left alone
    resumed = ["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(run), *TINY_FLAGS, "--num_epochs", "1"]
    assert main([*resumed, "--resume", "auto", "--overwrite"]) == 0  # passed over: there is no other
    assert not target.exists()
    torch.save(content, tmp_path / "again.pt")
    torch.load(tmp_path / "again.pt", weights_only=False)
    assert target.exists()  # the payload works where it is let


def test_an_exported_model(target: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "exported"
    Pretrained.load(tiny_run).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(target)))
    assert "damaged" in refused(target, ["generate", str(folder), "-n", "1", "-o", str(tmp_path / "x.h5ad")], capsys)


@pytest.mark.parametrize("name", ["../secret", "/dev/zero"])
def test_an_exported_model_reads_no_file_but_its_own(
    name: str, target: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exported"
    Pretrained.load(tiny_run).save_pretrained(folder)
    (tmp_path / "secret").write_text("secret")
    config = json.loads((folder / "config.json").read_text())
    del config["digest"]
    config["sha256"][name] = "0" * 64
    config["digest"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    assert "names other files" in refused(target, ["generate", str(folder), "-n", "1", "-o", str(tmp_path / "x.h5ad")], capsys)


def test_a_file_of_settings(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"seed: !!python/object/apply:os.system [\"touch '{target}'\"]\n")
    assert "cannot be read as a settings file" in refused(target, ["train", "--config", str(path)], capsys)
    yaml.load(path.read_text(), Loader=yaml.UnsafeLoader)
    assert target.exists()


def test_gene_vectors(target: Path, tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vectors.npz"
    np.savez(path, genes=np.array([Payload(target)], dtype=object), vectors=np.zeros((1, 2)))
    training = ["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(tmp_path / "run"), *TINY_FLAGS]
    assert "gene vectors" in refused(target, [*training, "--gene_embeddings", str(path)], capsys)


@pytest.mark.parametrize("array", ["X/data", "obs/depth"])
def test_a_store(
    array: str, target: Path, tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An array that says of itself that it is encoded by pickle."""
    store = tmp_path / "cells.zarr"
    convert([str(tiny_h5ad)], str(store), progress=False)
    codec = [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]
    own = store / array / "zarr.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "codecs": codec}))
    root = json.loads((store / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"][array]["codecs"] = codec
    (store / "zarr.json").write_text(json.dumps(root))
    shutil.rmtree(store / array / "c")
    (store / array / "c").mkdir()
    (store / array / "c" / "0").write_bytes(pickle.dumps(Payload(target)))
    training = ["train", "--data_path", str(store), "--checkpoint_dir", str(tmp_path / "run"), *TINY_FLAGS]
    for arguments in (["info", str(store)], ["verify", str(store)], training):
        refused(target, arguments, capsys)
    pickle.loads((store / array / "c" / "0").read_bytes())
    assert target.exists()
