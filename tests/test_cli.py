"""The commands about stores, and what the program says of itself."""

from __future__ import annotations

import dataclasses
import inspect
import random
import re
import shutil
from pathlib import Path

import pytest

from sedd import __version__
from sedd.cli import CLASSES, PURPOSES, main
from sedd.commands import Impute
from sedd.config import ConversionSettings
from sedd.config_files import setting_types
from sedd.io.convert import convert
from sedd.options import fields_to_show


def test_a_file_is_converted_described_and_proven(
    tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "tiny.zarr")
    assert main(["convert", str(tiny_h5ad), store, "--dry_run"]) == 0
    assert not list(tmp_path.iterdir())
    assert main(["convert", str(tiny_h5ad), store, "--obs", "cell_type", "donor", "--codec", "zstd"]) == 0
    assert main(["convert", str(tiny_h5ad), store]) == 2
    assert store in capsys.readouterr().err
    assert main(["info", store]) == 0
    said = capsys.readouterr().out
    assert "zstd" in said
    assert "cell_type, donor" in said
    assert main(["verify", store, "--against", str(tiny_h5ad)]) == 0
    assert "every entry is that of its input" in capsys.readouterr().out


def test_a_damaged_store_is_named_with_status_2(
    tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "tiny.zarr"
    assert main(["convert", str(tiny_h5ad), str(store)]) == 0
    shard = store / "X" / "data" / "c" / "0"
    damaged = bytearray(shard.read_bytes())
    damaged[random.Random(0).randrange(len(damaged) // 2)] ^= 4
    shard.write_bytes(damaged)
    assert main(["verify", str(store)]) == 2
    assert str(shard) in capsys.readouterr().err


def test_two_files_become_one_store(tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, copy = str(tmp_path / "both.zarr"), str(tmp_path / "copy.h5ad")
    shutil.copy(tiny_h5ad, copy)
    assert main(["convert", str(tiny_h5ad), copy, store, "--shuffle", "--join", "outer"]) == 0
    assert "480 cells x 60 genes" in capsys.readouterr().out
    assert main(["convert", store]) == 2
    assert "fewer than two paths" in capsys.readouterr().err


def test_files_after_the_options_and_a_second_input_are_told_where_they_belong(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["convert", "a.h5ad", "--raw", "a.zarr"], ["evaluate", "-o", "out", "run", "a.h5ad", "b.h5ad"]):
        assert main(words) == 2
        assert f"unexpected words: {words[-1]}. Files stand together, before the options" in capsys.readouterr().err


def test_every_command_has_a_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name in CLASSES:
        assert f"  {name}" in overview
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        assert f"sedd {name}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"sedd {__version__}"


@pytest.mark.parametrize("name", CLASSES)
def test_help_shows_every_option_as_it_is_documented(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    page = capsys.readouterr().out
    options = set(re.findall(r"--([a-z][\w-]*)", page))
    assert not [option for option in options if "-" in option]
    assert not re.search(r"\{None\}|\||default: (None)?\)", page.replace("--no_", "no_").replace(" | no_", ""))
    fields = set(setting_types()) if name == "train" else {setting.name for setting in dataclasses.fields(CLASSES[name])}
    positional = {field for field in fields if field not in options}
    assert positional <= {"path", "paths", "store", "checkpoint", "data", "directory"}
    assert all(re.search(rf"\b{field.upper()}\b", page) for field in positional)


def test_help_begins_with_what_is_required_and_what_is_the_commands_own() -> None:
    shown = [field.name for field in fields_to_show(Impute)]
    assert shown[:5] == ["checkpoint", "output", "data", "predict", "hide"]
    assert sorted(shown) == sorted(field.name for field in dataclasses.fields(Impute))


def test_the_overview_names_each_command_once_by_its_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    page = capsys.readouterr().out
    assert sorted(re.findall(r"^  (\w+) ", page, re.MULTILINE)) == sorted(CLASSES)
    assert re.findall(r"^([A-Z].*):$", page, re.MULTILINE) == list(PURPOSES)


def test_the_word_none_is_a_name_not_a_missing_value(tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(tiny_h5ad), str(tmp_path / "a.zarr"), "--layer", "None"]) == 2
    assert "has no layers/None" in capsys.readouterr().err


def test_every_setting_of_a_conversion_is_a_keyword_of_convert() -> None:
    keywords = inspect.signature(convert).parameters
    for field in dataclasses.fields(ConversionSettings):
        assert keywords[field.name].default == field.default
    with pytest.raises(TypeError, match="shufle"):
        convert("a.h5ad", "b.zarr", shufle=True)


def test_info_about_what_is_not_there_does_not_guess_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "cells.h5ad")]) == 2
    said = capsys.readouterr().err
    assert "no such file or directory; expected cells, a store, a checkpoint" in said and said.count("\n") == 1
