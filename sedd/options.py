"""How settings are written and handed on: sizes of memory, and keywords that are fields of dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import operator
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sedd.errors import SettingError, UserError, without_secrets

Function = TypeVar("Function", bound=Callable[..., Any])


def check_seed(seed: Any) -> None:
    """Refuse a seed that is not a whole number from 0 to the largest that a file holds."""
    try:
        fits = 0 <= operator.index(seed) < 2**63
    except TypeError:
        fits = False
    if not fits:
        raise SettingError(f"--seed is {seed}; expected a whole number from 0 to 2**63 - 1.")


def parse_bytes(text: str | int) -> int:
    """Read a number of bytes, such as "1GiB", "500 MB", "1.5e9" or 4096.

    Raises
    ------
    UserError
        If it is no size above 0.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+|[0-9]+\.)(e[0-9]+)?([kmgt]i?)?b?", re.sub(r"\s", "", str(text).lower()))
    unit = (match[3] or "") if match else ""
    power = " kmgt".index(unit[:1] or " ")
    size = float(match[1] + (match[2] or "")) * (1024 if unit.endswith("i") else 1000) ** power if match else 0
    if not 1 <= size < 1 << 63:
        raise UserError(f"{text!r} is not a size of memory; expected one such as 1GiB, 500MB or a number of bytes.")
    return int(size)


def recorded_path(path: str | os.PathLike[str]) -> str:
    """Return a path as files keep it that others may see: the home directory as `~`, a URL without names, passwords and signatures."""
    text, home = str(path), os.path.expanduser("~")
    if "://" in text:
        return without_secrets(text)
    return f"~{text[len(home):]}" if home != "/" and (text == home or text.startswith(f"{home}/")) else text


def keywords_of(*groups: type, without: tuple[str, ...] = ()) -> Callable[[Function], Function]:
    """Show the fields of dataclasses, which a function takes as `**options`, as keywords of its signature and docstring: for `help` and editors.

    Parameters
    ----------
    *groups
        The dataclasses.
    without
        Fields that the function does not take, or has a parameter of its own for.
    """

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        parameters = [p for p in own.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
        for one in (one for group in groups for one in dataclasses.fields(group) if one.name not in without):
            parameters.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type))
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        function.__doc__ = with_meanings(function.__doc__, *groups, without=without)
        return function

    return decorate


def with_meanings(doc: str | None, *groups: type, without: tuple[str, ...] = ()) -> str | None:
    """Return a docstring that says below its `**options` what each field of the dataclasses means; there is none under python -OO."""
    if doc is None:
        return None
    lines = []
    for group in groups:
        meanings = meanings_of(group)
        for field in fields_to_show(group):
            if field.name in meanings and field.name not in without:
                text = meanings[field.name] + ("" if field.default in (dataclasses.MISSING, None, ()) else f" Default: {field.default!r}.")
                lines += [field.name, *textwrap.wrap(text, 120, initial_indent="    ", subsequent_indent="    ")]
        if not meanings:  # it says what they mean in one place
            lines += inspect.cleandoc(group.__doc__ or "").partition("Attributes\n----------\n")[2].splitlines()
    listed = "\n".join(lines)
    return re.sub(
        r"^(layer, raw, )?\*\*\w+.*\n(    .*\n)*",
        lambda said: f"{said[0]}{listed}\n",
        inspect.cleandoc(doc),  # as Python 3.13 has it
        count=1,
        flags=re.MULTILINE,
    )


def meanings_of(group: type) -> dict[str, str]:
    """Return what is written under each field of a dataclass, also under those that it inherits."""
    found: dict[str, str] = {}
    for one in reversed(group.__mro__[:-1]):
        body = _classes(inspect.getsourcefile(one) or "")[one.__name__].body
        for line, below in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
                found[line.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def fields_to_show(group: type) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass as its help lists them: what is required, then its own, then what it shares with others."""
    depth = {name: place for place, one in reversed([*enumerate(group.__mro__)]) for name in inspect.get_annotations(one)}
    fields = dataclasses.fields(group)
    required = {field.name for field in fields if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING}
    return sorted(fields, key=lambda field: 0 if field.name in required else 1 + depth[field.name])


@functools.cache
def _classes(path: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(Path(path).read_text()).body if isinstance(node, ast.ClassDef)}


def grouped(options: dict[str, Any], *groups: type) -> list[Any]:
    """Make each of several dataclasses from those of the options that are its fields.

    Raises
    ------
    TypeError
        If an option is a field of none.
    """
    names = [{field.name for field in dataclasses.fields(group)} for group in groups]
    unknown = sorted(set(options).difference(*names))
    if unknown:
        close = difflib.get_close_matches(unknown[0], set().union(*names), 1)
        raise TypeError(f"there is no option {unknown[0]!r}" + (f"; did you mean {close[0]!r}?" if close else "."))
    return [group(**{n: options[n] for n in own & set(options)}) for group, own in zip(groups, names, strict=True)]
