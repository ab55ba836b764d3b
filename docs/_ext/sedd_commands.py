"""The directive `sedd-commands`: every command with its options, from the dataclasses that the command line is made of."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Any, Literal

import tyro
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from sedd.cli import CLASSES, PURPOSES
from sedd.config import SECTIONS
from sedd.options import fields_to_show, meanings_of


class SeddCommands(SphinxDirective):
    """Puts a section for each purpose and each command in its place."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        lines: list[str] = []
        for purpose, names in PURPOSES.items():
            lines += [f"## {purpose}", ""]
            for name in names:
                lines += command_page(name)
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def command_page(name: str) -> list[str]:
    """Return one command as lines of Markdown."""
    command = CLASSES[name]
    groups = list(SECTIONS.values()) if name == "train" else [command]
    lines = [f"### sedd {name}", "", inspect.cleandoc(command.__doc__ or ""), ""]
    for group in groups:
        hints, meanings = typing.get_type_hints(group, include_extras=True), meanings_of(group)
        if name == "train":
            lines += [f"**{(group.__doc__ or '').strip().splitlines()[0]}**", ""]
        positional, flags = [], []
        for field in fields_to_show(group):
            words, is_positional = option(field, hints[field.name])
            (positional if is_positional else flags).append(f"{words}\n: {meanings[field.name]}{default_of(field)}\n")
        lines += positional + flags
    return lines


def option(field: dataclasses.Field[Any], hint: Any) -> tuple[str, bool]:
    """Return how an option is written, and whether it is known by its place."""
    names, metavar, positional = [f"--{field.name}"], None, False
    while typing.get_origin(hint) is typing.Annotated:
        for extra in hint.__metadata__:
            positional |= extra is tyro.conf.Positional
            names += getattr(extra, "aliases", None) or []
            metavar = getattr(extra, "metavar", None) or metavar
        hint = hint.__origin__
    if positional:
        return f"`{metavar}`", True
    if hint is bool:
        return f"`--{field.name}`, `--no_{field.name}`", False
    return ", ".join(f"`{name} {value_of(hint)}`" for name in names), False


def value_of(hint: Any) -> str:
    """Return what stands for a value of a type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        found = dict.fromkeys(value_of(one) for one in typing.get_args(hint) if one is not type(None))
        return " or ".join(found)
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        one = value_of(typing.get_args(hint)[0])
        return f"[{one} ...]"
    return str(hint.__name__).upper()


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return the default of an option in words; nothing where there is none or it is that of being left out."""
    if field.default in (dataclasses.MISSING, None, (), ""):
        return ""
    shown = {True: "on", False: "off"}.get(field.default) if isinstance(field.default, bool) else None
    values = field.default if isinstance(field.default, tuple) else (field.default,)
    return f" Default: {shown or '`' + ' '.join(map(str, values)) + '`'}."


def setup(app: Any) -> dict[str, bool]:
    """Connect it to Sphinx."""
    app.add_directive("sedd-commands", SeddCommands)
    return {"parallel_read_safe": True}
