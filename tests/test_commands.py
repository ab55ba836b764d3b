"""A setting of a command exists once and arrives where it is used."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sedd import commands
from sedd.commands import COMMANDS
from sedd.errors import UserError

CALLED = {name: command.calls for name, command in COMMANDS.items() if hasattr(command, "calls")}
CALLED |= {"verify": "sedd.io.verify:verify", "runs": "sedd.training.directory:runs_table"}


def function_of(name: str) -> Callable[..., Any]:
    module, _, attribute = CALLED[name].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
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
            values[field.name] = (f"{field.name}=one", f"{field.name}=two")
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
    watch("sedd.inference.new_genes:add_genes", "a model with new genes")
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


@pytest.mark.parametrize("name", CALLED)
def test_a_command_and_the_function_that_it_calls_have_the_same_defaults(name: str) -> None:
    taken = inspect.signature(function_of(name)).parameters
    for field in dataclasses.fields(COMMANDS[name]):
        if field.default in (None, dataclasses.MISSING, ()) or field.name not in taken:
            continue
        assert taken[field.name].default in (field.default, inspect.Parameter.empty), field.name


@pytest.mark.parametrize("name", CALLED)
def test_every_setting_of_a_function_has_a_flag(name: str) -> None:
    flags = {field.name for field in dataclasses.fields(COMMANDS[name])} | {"model", "inputs", "output", "path"}
    settings = inspect.signature(function_of(name)).parameters.keys() - {"progress"}
    assert settings - flags == ({"workers"} if name == "verify" else set())


def test_new_genes_need_their_vectors(tmp_path: Path) -> None:
    command = commands.Impute(checkpoint="run", data="a.h5ad", output=str(tmp_path / "o.h5ad"), new_genes=("TP53",))
    with pytest.raises(UserError, match="--new_genes needs --gene_embeddings"):
        command.run()
