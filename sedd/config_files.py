"""Settings of a run from files and from the environment, as words of the command line."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from sedd.config import PATHS, SECTIONS
from sedd.errors import UserError


def setting_types() -> dict[str, str]:
    """Return the name of every setting and its type as written in this file."""
    return {f.name: str(f.type) for section in SECTIONS.values() for f in dataclasses.fields(section)}


def environment_arguments(environment: Mapping[str, str]) -> list[str]:
    """Command-line arguments from variables named like the settings in capitals; empty ones are passed over.

    `COMPILE=1` (or true, yes) turns a switch on, any other value off; a list is split at white space.
    """
    arguments: list[str] = []
    for name, kind in setting_types().items():
        value = environment.get(name.upper(), "")
        if not value:
            continue
        if kind == "bool":
            arguments.append(f"--{name}" if value.lower() in ("1", "true", "yes") else f"--no_{name}")
        else:
            arguments += [f"--{name}", *(value.split() if kind.startswith("tuple") else [value])]
    return arguments


def config_file_arguments(path: str) -> list[str]:
    """Return the settings of a YAML (or JSON, such as args.json) file as command-line arguments.

    Raises
    ------
    UserError
        If the file cannot be read, is not a mapping or names a setting that does not exist.
    """
    try:
        text = Path(path).read_text()
        flat = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        detail = str(error).replace("\n", " ")
        raise UserError(f"{path}: cannot be read as a settings file ({detail}); expected YAML.") from error
    if not isinstance(flat, dict):
        raise UserError(f"{path}: holds a {type(flat).__name__}; expected a mapping such as `batch_size: 64`.")
    known = setting_types()
    arguments: list[str] = []
    for key, value in flat.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"{path}: unknown setting {key!r}; `sedd train --help` lists those there are.")
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, dict | list) for one in value)):
            raise UserError(f"{path}: {key} holds lists or mappings in one another; expected one value, or a list of values.")
        elif isinstance(value, list | tuple):
            arguments += [f"--{name}", *(_as_argument(name, one) for one in value)]
        elif value is not None:
            arguments += [f"--{name}", _as_argument(name, value)]
    return arguments


def _as_argument(name: str, value: object) -> str:
    return os.path.expanduser(str(value)) if name in PATHS else str(value)  # args.json keeps the home directory as ~
