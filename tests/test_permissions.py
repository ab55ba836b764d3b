"""What a user may not read or write is called so, and is not called missing or damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_FLAGS

from sedd.inference.pretrained import Pretrained
from sedd.io.convert import convert

RUN = """
import contextlib, io, json, sys
from sedd.cli import main
for name, words in json.load(sys.stdin).items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except BaseException as error:
            code = repr(error)
    print(json.dumps([name, code, said.getvalue().splitlines()]))
"""


def without_rights() -> list[str]:
    """Words that run a program with the rights that files give it, as root has others."""
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if os.geteuid() == 0 and (shutil.which("setpriv") is None or subprocess.run([*words, "true"], check=False, capture_output=True).returncode):
        pytest.skip("root may read everything here")
    return words if os.geteuid() == 0 else []


@pytest.mark.slow
def test_what_may_not_be_read_is_neither_missing_nor_damaged(tiny_h5ad: Path, tiny_run: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"  # a folder that may not be entered
    locked.mkdir()
    shutil.copy(tiny_h5ad, locked / "a.h5ad")
    shutil.copytree(tiny_run, locked / "run")
    convert(tiny_h5ad, locked / "a.zarr", progress=False)
    run, store, export = (tmp_path / name for name in ("run", "a.zarr", "export"))
    shutil.copytree(tiny_run, run)
    convert(tiny_h5ad, store, progress=False)
    Pretrained.load(tiny_run).save_pretrained(export)
    closed = {name: tmp_path / name for name in ("a.h5ad", "best.pt", "genes.txt", "vectors.npz", "settings.yaml")}
    shutil.copy(tiny_h5ad, closed["a.h5ad"])
    shutil.copy(tiny_run / "best.pt", closed["best.pt"])
    closed["genes.txt"].write_text("a\\n")
    closed["settings.yaml"].write_text("num_epochs: 1\\n")
    np.savez(closed["vectors.npz"], genes=["a"], vectors=np.ones((1, 2)))
    result = ["-o", str(tmp_path / "out.h5ad")]
    train = ["train", "--checkpoint_dir", str(tmp_path / "new"), *TINY_FLAGS, "--data_path"]
    tasks = {name: [name, str(tiny_run)] for name in ("impute", "denoise", "embed", "score", "evaluate")}
    commands: dict[str, tuple[Path, list[str]]] = {}
    for path in (closed["a.h5ad"], locked / "a.h5ad", locked / "a.zarr"):
        kind = f"{path.relative_to(tmp_path)}"
        commands |= {f"{name} {kind}": (path, [*words, str(path), *result]) for name, words in tasks.items()}
        commands[f"info {kind}"] = path, ["info", str(path)]
        commands[f"train {kind}"] = path, [*train, str(path)]
        if path.suffix == ".h5ad":
            commands[f"convert {kind}"] = path, ["convert", str(path), str(tmp_path / "new.zarr")]
        else:
            commands[f"verify {kind}"] = path, ["verify", str(path)]
    for path in (closed["best.pt"], run / "best.pt", locked / "run", locked / "run" / "best.pt"):
        shown = run if path == run / "best.pt" else path
        kind = f"{path.relative_to(tmp_path)}"
        commands[f"info {kind}"] = path, ["info", str(shown)]
        commands[f"generate {kind}"] = path, ["generate", str(shown), *result]
        commands[f"resume {kind}"] = path, [*train, str(tiny_h5ad), "--resume", str(shown if path != run / "best.pt" else path)]
    commands["runs"] = locked, ["runs", str(locked)]
    commands["info export"] = export / "config.json", ["info", str(export)]
    commands["the store's file"] = store / "zarr.json", ["verify", str(store)]
    commands["genes"] = closed["genes.txt"], ["convert", str(tiny_h5ad), str(tmp_path / "new.zarr"), "--genes", str(closed["genes.txt"])]
    commands["genes of train"] = closed["genes.txt"], [*train, str(tiny_h5ad), "--genes", str(closed["genes.txt"])]
    commands["vectors"] = closed["vectors.npz"], [*train, str(tiny_h5ad), "--gene_embeddings", str(closed["vectors.npz"])]
    commands["config"] = closed["settings.yaml"], ["train", "--config", str(closed["settings.yaml"]), "--data_path", str(tiny_h5ad)]
    for path in (*closed.values(), run / "best.pt", export / "config.json", store / "zarr.json", locked):
        path.chmod(0)
    before = sorted(tmp_path.iterdir())
    try:
        done = subprocess.run(
            [*without_rights(), sys.executable, "-c", RUN],
            input=json.dumps({name: words for name, (_, words) in commands.items()}),
            capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        locked.chmod(0o700)
    found = {name: (code, lines) for name, code, lines in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == commands.keys(), done.stderr[-2000:]
    wrong = {
        name: (code, lines)
        for name, (code, lines) in found.items()
        if code != 2
        or len(lines) != 1
        or str(commands[name][0]) not in lines[0]
        or "permission denied" not in lines[0].lower()
        or any(word in lines[0] for word in ("no such", "damaged", "not there", "not a"))
    }
    assert not wrong, "\\n".join(f"{name}: {found}" for name, found in wrong.items())
    assert sorted(tmp_path.iterdir()) == before
