"""How settings are written and handed on: sizes of memory, and keywords that are fields of dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

from sedd.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])


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


def keywords_of(*groups: type) -> Callable[[Function], Function]:
    """Show the fields of dataclasses, which a function takes as `**options`, as keywords of its signature: for `help` and editors."""

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        parameters = [p for p in own.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
        for one in (one for group in groups for one in dataclasses.fields(group)):
            parameters.append(
                inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
            )
        function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


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
