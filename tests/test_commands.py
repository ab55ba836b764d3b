"""A setting of a command exists once and arrives where it is used."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import operator
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sedd import commands
from sedd.cli import CLASSES, main
from sedd.commands import COMMANDS
from sedd.config import SECTIONS
from sedd.errors import UserError

CALLED = {name: command.calls for name, command in COMMANDS.items() if hasattr(command, "calls")}
CALLED |= {"runs": "sedd.training.directory:runs_table"}
FUNCTIONS = {**CALLED, "train": "sedd.learning:train", "export": "sedd.inference.pretrained:Pretrained.save_pretrained"}


def function_of(name: str) -> Callable[..., Any]:
    module, _, attribute = FUNCTIONS[name].partition(":")
    function: Callable[..., Any] = operator.attrgetter(attribute)(importlib.import_module(module))
    return function


def values_unlike_the_defaults(name: str, folder: Path) -> dict[str, Any]:
    """A value for each field of a command that differs from its default and from all others."""
    values: dict[str, Any] = {}
    for number, field in enumerate(dataclasses.fields(COMMANDS[name])):
        if isinstance(field.default, bool):
            values[field.name] = not field.default
        elif isinstance(field.default, int | float):
            values[field.name] = 1000 + number
        elif isinstance(field.default, tuple):
            values[field.name] = (f"{field.name}=one", f"{field.name}2=two")
        else:
            values[field.name] = f"a_{field.name}"
    if name == "info":  # refuses a path where nothing is
        values["path"] = str(folder)
    return values | ({"output": str(folder / "out.h5ad")} if "output" in values else {})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the functions that do the work are called with; they do nothing."""
    seen: dict[str, dict[str, Any]] = {}

    def watch(path: str, result: Any) -> None:
        module, _, attribute = path.partition(":")
        home = importlib.import_module(module)
        real = getattr(home, attribute)

        @functools.wraps(real)
        def noted(*args: Any, **kwargs: Any) -> Any:
            seen[attribute] = dict(inspect.signature(real).bind(*args, **kwargs).arguments)
            return result

        monkeypatch.setattr(home, attribute, noted)

    metrics = {"likelihood": {"nats_per_cell": {"ci": (1.0, 2.0)}}}
    found = SimpleNamespace(metrics=metrics, steps=[], notes=[], report="report.html", n_obs=1, n_vars=1, nnz=1, dtype="uint8")
    for path in CALLED.values():
        watch(path, {} if path.endswith(":verify") else found)
    model = SimpleNamespace(describe=str, path="run/best.pt", save_pretrained=lambda directory, overwrite: Path())
    monkeypatch.setattr("sedd.inference.pretrained.Pretrained.load", lambda path, device: model)
    monkeypatch.setattr("sedd.metrics.metrics_table", lambda metrics: "")
    return seen


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_of_a_command_is_used_and_arrives_as_it_was_given(
    name: str, calls: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    values = values_unlike_the_defaults(name, tmp_path)
    command = object.__new__(COMMANDS[name])  # whose checks would refuse some of these values
    for field, value in values.items():
        object.__setattr__(command, field, value)

    def read_and_note(self: Any, field: str) -> Any:
        read.add(field)
        return object.__getattribute__(self, field)

    monkeypatch.setattr(COMMANDS[name], "__getattribute__", read_and_note)
    command.run()
    assert not values.keys() - read, "settings that nobody uses"
    if name not in CALLED:
        return
    function = function_of(name)
    arrived = calls[function.__name__]
    for field in values.keys() & inspect.signature(function).parameters.keys():
        expected = dict(text.split("=") for text in values[field]) if field in ("where", "as_if") else values[field]
        found = tuple(arrived[field]) if isinstance(arrived[field], list) else arrived[field]
        assert found == expected, field


def options_of(name: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The options of a command that its page of help lists, with their defaults."""
    fields = {field.name: field.default for section in SECTIONS.values() for field in dataclasses.fields(section)}
    if name != "train":
        fields = {field.name: field.default for field in dataclasses.fields(CLASSES[name])}
    with pytest.raises(SystemExit):
        main([name, "--help"])
    listed = re.findall(r"--(\w+)", capsys.readouterr().out)
    return {option: default for option, default in fields.items() if option in listed}  # the others have a place, and no name


def keywords_of(name: str) -> dict[str, Any]:
    """The parameters of the function of a command that can be given by name and have a default, but those that only Python needs."""
    parameters = inspect.signature(function_of(name)).parameters.values()
    assert not [one.name for one in parameters if one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL, one.POSITIONAL_ONLY)]
    return {one.name: one.default for one in parameters if one.default is not one.empty}


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("quick", "info", "runs")])  # which have no function for users
def test_every_option_is_a_keyword_of_the_same_name_and_default_and_the_other_way_round(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options, keywords = options_of(name, capsys), keywords_of(name)
    options.pop("data_path", None)  # of train: the first argument of the function, which takes an AnnData as well
    assert options.keys() == keywords.keys()
    assert len(options) >= 1
    for option, default in options.items():
        if (option, keywords[option]) in [("output", None), ("checkpoint_dir", None)]:  # from Python the result can stay in memory
            continue
        assert (None if default == () else default) == (None if keywords[option] == () else keywords[option]), option


def test_new_genes_need_their_vectors(tmp_path: Path) -> None:
    command = commands.Impute(checkpoint="run", data="a.h5ad", output=str(tmp_path / "o.h5ad"), new_genes=("TP53",))
    with pytest.raises(UserError, match="--new_genes needs --gene_embeddings"):
        command.run()
