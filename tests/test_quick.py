"""The quick run: four commands on the cells that come with sedd, or on others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY_FLAGS

from sedd import shipped as room
from sedd.cli import main
from sedd.errors import MissingFileError, UserError
from sedd.shipped import Quick, shipped


def test_the_quick_run_trains_on_the_cells_that_come_with_sedd() -> None:
    train, impute, generate, evaluate = Quick(output="out").commands(["--num_epochs", "1"])
    cells, settings = str(shipped("pbmc3k.h5ad")), str(shipped("quick.yaml"))
    assert Path(cells).read_bytes() == (ROOT / "data" / "pbmc3k.h5ad").read_bytes()
    assert Path(settings).read_bytes() == (ROOT / "configs" / "quick.yaml").read_bytes()
    assert train == ["train", "--config", settings, "--data_path", cells, "--checkpoint_dir", "out", "--num_epochs", "1"]
    assert impute[:3] == ["impute", "out", cells] and impute[-2:] == ["--hide", "0.15"]
    assert generate == ["generate", "out", "-n", "500", "-o", "out/generated.h5ad"]
    assert evaluate[:3] == ["evaluate", "out", cells] and "--overwrite" not in [*train, *impute, *generate, *evaluate]


def test_the_layer_and_the_leave_to_replace_reach_every_command_that_takes_them() -> None:
    words = list(Quick(data_path="mine.h5ad", layer="counts", overwrite=True).commands())
    assert [line[0] for line in words if "--layer" in line] == ["train", "impute", "evaluate"]
    assert [line[0] for line in words if "--overwrite" in line] == ["train", "impute", "generate", "evaluate"]
    assert all("mine.h5ad" in line for line in words if line[0] != "generate")


def test_a_wheel_has_the_files_in_the_package_and_a_checkout_where_they_always_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "__file__", str(tmp_path / "sedd" / "shipped" / "__init__.py"))
    with pytest.raises(MissingFileError, match=r"lacks quick\.yaml.*Install sedd again"):
        shipped("quick.yaml")
    for place in ("configs", "sedd/shipped"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "quick.yaml").touch()
        assert shipped("quick.yaml").parent == tmp_path / place


def test_a_file_that_does_not_come_with_sedd_is_named_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r"name is 'mine\.h5ad'; expected one of pbmc3k\.h5ad, quick\.yaml"):
        shipped("mine.h5ad")


def test_the_wheel_is_given_the_files_and_their_licence() -> None:
    import tomllib

    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    wanted = {f"{folder}/{name}": f"sedd/shipped/{name}" for name, folder in room.CHECKOUT.items()}
    assert included == wanted | {"data/README.md": "sedd/shipped/README.md"}
    assert all((ROOT / name).is_file() for name in included)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Tensorflow not installed")  # umap, of a part of it that is not used
def test_a_quick_run_ends_with_a_page_and_its_training_takes_flags_of_train(tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = TINY_FLAGS.index("--ema_decay")
    flags = [*TINY_FLAGS[:at], *TINY_FLAGS[at + 2 :]]  # so that it is the quick run's
    words = ["quick", "--data_path", str(tiny_h5ad), "-o", str(tmp_path / "run"), *flags, "--num_epochs", "1", "--min_steps", "0"]
    assert main(words) == 0
    assert {"report.html", "imputed.h5ad", "generated.h5ad", "best.pt"} <= {path.name for path in (tmp_path / "run").iterdir()}
    used, quick = json.loads((tmp_path / "run" / "args.json").read_text()), yaml.safe_load((ROOT / "configs" / "quick.yaml").read_text())
    assert used["ema_decay"] == quick["ema_decay"] and used["learning_rate"] == 2e-3 != quick["learning_rate"]
    capsys.readouterr()
    assert main(words) == 2  # what is there is not replaced
    assert main(["quick", "--data_path", str(tiny_h5ad), "-o", str(tmp_path / "other"), "--frobnicate", "1"]) == 2
    assert "frobnicate" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
