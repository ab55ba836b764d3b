"""An exported model is the model: same weights, same answers, nothing executed, damage noticed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import sedd
from sedd.cli import main
from sedd.errors import DamagedFileError, ExistsError, MissingFileError, UserError, WrongFileError
from sedd.inference.export import is_export, model_card
from sedd.inference.pretrained import Pretrained
from sedd.tasks import denoise, generate, impute

FILES = {"README.md", "config.json", "model.safetensors", "panel.json"}


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "tiny"
    assert main(["export", str(tiny_run), str(directory)]) == 0
    return directory


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def test_the_exported_model_is_the_model_bit_for_bit(tiny_run: Path, exported: Path) -> None:
    model, again = Pretrained.load(tiny_run, device="cpu"), sedd.Pretrained.load(exported, device="cpu")
    weights = again.model.state_dict()
    assert weights.keys() == model.model.state_dict().keys()
    for name, value in model.model.state_dict().items():
        assert torch.equal(weights[name], value), name
    assert again.model.config == model.model.config
    assert list(again.genes) == list(model.genes)
    assert again.binning == model.binning
    assert again.categories == model.categories
    assert (again.histogram != model.histogram).nnz == 0
    assert np.array_equal(again.libraries, model.libraries)
    for name in ("epoch", "step", "history", "split", "var"):
        assert again.state[name] == model.state[name]
    torch.manual_seed(0)
    counts = torch.randint(0, 9, (5, 60))
    tokens = counts.masked_fill(torch.rand(5, 60) < 0.5, model.binning.n_bins)
    sigma = torch.full((5,), 0.7)
    one, other = (m.model(tokens, sigma, targets=counts) for m in (model, again))
    assert one.any() and torch.equal(one, other)


def test_every_task_answers_the_same(tiny_run: Path, tiny_h5ad: Path, exported: Path, tmp_path: Path) -> None:
    for task in (
        lambda of: impute(of, tiny_h5ad, hide=0.2, cells="val", progress=False).X,
        lambda of: denoise(of, tiny_h5ad, rounds=1, progress=False).X,
        lambda of: generate(of, 6, where={"cell_type": "B cell"}, num_steps=4, progress=False).X,
    ):
        mine, theirs = task(tiny_run), task(exported)
        assert np.array_equal(*(m.toarray() if hasattr(m, "toarray") else m for m in (mine, theirs)))
    out = tmp_path / "made.h5ad"
    assert main(["generate", str(exported), "-n", "3", "--num_steps", "2", "-o", str(out)]) == 0
    assert main(["info", str(exported)]) == 0
    assert Pretrained.load(exported).save_pretrained(tmp_path / "again") == tmp_path / "again"
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_the_directory_holds_what_is_said_and_no_folder_of_this_machine(tiny_h5ad: Path, exported: Path) -> None:
    assert {p.name for p in exported.iterdir()} == FILES
    assert [p.name for p in exported.parent.iterdir()] == ["tiny"]
    for path in exported.iterdir():
        assert str(tiny_h5ad.parent).encode() not in path.read_bytes()


def test_the_card_has_the_data_the_panel_the_metrics_and_commands_that_work(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    config = json.loads((exported / "config.json").read_text())
    assert card.startswith("---\nlibrary_name: sedd\n")
    assert "`tiny.sedd.zarr`: 240 cells, 60 genes; 216 cells trained on, 24 held out" in card
    assert "Panel of 60 genes: `gene0`, `gene1`" in card
    assert "Conditioned on `cell_type`: T cell, monocyte, B cell." in card
    last = config["history"][-1]
    assert f"On the held-out cells, after epoch {last['epoch']}; the bound is given cell\\_type, total:" in card
    assert f"| likelihood bound, nats per cell (lower is better) | {last['val_nelbo']:.5g}" in card
    assert f"| hidden counts: mean absolute error | {last['val_mae']:.5g} |" in card
    commands = re.findall(r"^sedd (\w+) DIRECTORY", card, flags=re.MULTILINE)
    assert commands == ["impute", "denoise", "generate"]
    assert '--where cell_type="T cell"' in card
    compile(re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], "card", "exec")  # type: ignore[index]


def test_names_in_the_card_are_said_and_do_nothing(exported: Path) -> None:
    hostile = ["<script>alert(1)</script>", "![x](http://a/b.png)", "[a](javascript:b)", "a`b``c", "`", "x\n# Title", "| a | b |", "```\nrm -rf ~\n```", "&lt;b&gt;"]
    config = json.loads((exported / "config.json").read_text())
    panel = json.loads((exported / "panel.json").read_text())

    def active(card: str) -> str:
        """What Markdown would act on: neither in code nor behind a backslash."""
        fenced = re.sub(r"^```(\w*)\n.*?^```$", r"fenced \1", card, flags=re.MULTILINE | re.DOTALL)
        spans = re.sub(r"(?<![`\\])(`+)(?!`)(.+?)(?<!`)\1(?!`)", "code", fenced)
        return re.sub(r"\\[!-/:-@[-`{-~]", "", spans)

    usual = active(model_card(config, panel, exported, 1))
    config["data"]["path"] = "a/<img src=x onerror=alert(1)>.h5ad"
    panel["genes"][: len(hostile)] = hostile
    panel["categories"] = {name: list(reversed(hostile)) for name in hostile}
    card = model_card(config, panel, exported, 1)
    for mark in "<>[]`*|\\":
        assert active(card).count(mark) == usual.count(mark), mark
    assert re.findall("^#.*", active(card), re.MULTILINE)[1:] == re.findall("^#.*", usual, re.MULTILINE)[1:]
    for name in hostile:
        assert " ".join(name.split()) in card, name
    assert "--where" not in card  # a label that a shell would act on is not put into a command


def test_the_card_shows_an_evaluation_made_after_the_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    row = {"sedd": 12.5, "baselines": {"gene marginals": 14.0}}
    (run / "metrics.json").write_text(json.dumps({"likelihood": {"nats_per_cell": row}}))
    Pretrained.load(run).save_pretrained(tmp_path / "new")
    assert "beside baselines" in (tmp_path / "new" / "README.md").read_text()


    os.utime(run / "metrics.json", (0, 0))
    Pretrained.load(run).save_pretrained(tmp_path / "old")
    assert "beside baselines" not in (tmp_path / "old" / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(FILES - {"README.md"}))
def test_a_missing_or_damaged_file_is_named(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (copy / name).read_bytes()
    damaged = bytearray(whole)
    at = whole.index(b'"epoch": ') + 9 if name == "config.json" else len(whole) // 2
    damaged[at] ^= 1
    for content in (bytes(damaged), whole[: len(whole) // 2], b""):
        (copy / name).write_bytes(content)
        with pytest.raises(DamagedFileError, match="damaged or not an exported model|is damaged"):
            Pretrained.load(copy)
    (copy / name).unlink()
    with pytest.raises(MissingFileError, match=f"lacks {name}"):
        Pretrained.load(copy)
    assert main(["generate", str(copy), "-n", "1", "-o", str(copy / "x.h5ad")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_other_directories_are_refused_and_left_alone(tiny_run: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file or directory"):
        Pretrained.load(tmp_path / "nowhere")
    assert not is_export(tiny_run)
    model = Pretrained.load(tiny_run)
    with pytest.raises(ExistsError, match="exists already; pass --overwrite"):
        model.save_pretrained(copy)
    (copy / "README.md").write_text("edited")
    model.save_pretrained(copy, overwrite=True)
    assert "edited" not in (copy / "README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another directory"):
        model.save_pretrained(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_model_of_another_format_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "sedd_format": 99}))
    with pytest.raises(WrongFileError, match="format 99"):
        Pretrained.load(copy)


def test_a_model_with_added_genes_is_not_exported(tiny_run: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    model = Pretrained.load(tiny_run)
    more = replace(model, genes=np.append(model.genes, "new"))
    with pytest.raises(UserError, match="genes were added"):
        more.save_pretrained(tmp_path / "out")
