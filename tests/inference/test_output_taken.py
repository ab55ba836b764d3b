"""No task, evaluation or export replaces what a user made: whatever stands in its way stays byte for byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import make_counts
from test_output_parts import TASKS, write

from sedd.errors import UserError
from sedd.evaluation import evaluate
from sedd.inference.pretrained import Pretrained

TAKEN = ["file", "folder", "store", "link to a file", "link to a folder", "dangling link", "foreign .partial", "the data"]


@pytest.mark.parametrize("there", TAKEN)
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("task", TASKS)
def test_no_task_replaces_what_it_was_not_told_to(task: str, suffix: str, there: str, model: Pretrained, tmp_path: Path) -> None:
    data, output = tmp_path / f"data{suffix}", tmp_path / f"out{suffix}"
    write(make_counts(8), data)
    for name in ("folder", "file"):
        (tmp_path / f"my {name}").mkdir()
        (tmp_path / f"my {name}" / "thesis.txt").write_text("mine")
    if there == "file":
        output.write_text("mine")
    elif there == "folder":
        (tmp_path / "my folder").rename(output)
    elif there == "store":
        output.mkdir()
        (output / "zarr.json").write_text("{}")
    elif "link" in there:
        target = {"link to a file": "my file/thesis.txt", "link to a folder": "my folder", "dangling link": "nowhere"}[there]
        output.symlink_to(tmp_path / target)
    elif there == "foreign .partial":
        (tmp_path / "my folder").rename(f"{output}.partial")
    else:
        output = data
    may = (there, suffix) in {("file", ".h5ad"), ("store", ".zarr")}
    told = {"foreign .partial": "which sedd did not make.*Move it, or choose another output"}.get(there, "exists already; pass --overwrite")
    told_then = {"foreign .partial": told}.get(there, "so it is not replaced")
    if there == "the data":
        told = "exists already; pass --overwrite" if task == "generate" else "is the data itself"
        told_then = "is the data itself"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=told):
        TASKS[task](model, data, output=output, progress=False)
    if may:
        TASKS[task](model, data, output=output, overwrite=True, progress=False)
        assert output.stat().st_size > 0
        return
    if there == "the data" and task == "generate":
        return  # it reads none
    with pytest.raises(UserError, match=told_then):
        TASKS[task](model, data, output=output, overwrite=True, progress=False)
    assert before == ({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, sorted(os.listdir(tmp_path)))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", ["a file", "report.html", "metrics.json", "a link", "a folder"])
def test_an_evaluation_replaces_nothing_but_its_own(there: str, overwrite: bool, model: Pretrained, tiny_h5ad: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    if there == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
    if there.endswith(("html", "json")):
        (output / there).write_text("mine")
    elif there == "a link":
        (output / "report.html").symlink_to(tmp_path / "elsewhere.html")
    elif there == "a folder":
        (output / "steps.json").mkdir()
    if overwrite and there.endswith(("html", "json")):
        return  # told to
    said = {"a file": "is not a directory"}.get(there, "so it is not replaced" if overwrite else "exists already; pass --overwrite")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said):
        evaluate(model, tiny_h5ad, output=output, overwrite=overwrite, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", ["file", "folder", "link", "foreign .partial", "run"])
def test_an_export_replaces_nothing_but_an_export(there: str, overwrite: bool, model: Pretrained, tiny_run: Path, tmp_path: Path) -> None:
    target, exported = tmp_path / "model", model.save_pretrained(tmp_path / "exported")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    if there == "file":
        target.write_text("mine")
    elif there == "folder":
        mine.rename(target)
    elif there == "link":
        target.symlink_to(exported)
    elif there == "run":
        target.mkdir()
        (target / "best.pt").write_bytes(b"mine")
    else:
        mine.rename(f"{target}.partial")
    said = {"link": "is a link to .*exported, so it is not replaced", "foreign .partial": "which sedd did not make"}.get(there, "exists already")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said):
        model.save_pretrained(target, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before
