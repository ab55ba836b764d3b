"""The house as `docs/architecture.md` draws it: which room may look into which, and how large a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = [
    ["errors", "processes"],
    ["options"],
    ["config"],
    ["config_files"],
    ["kernels"],
    ["binning"],
    ["io.remote"],
    ["io.files", "io.locks", "io.loading.threads"],
    ["io.outputs"],
    ["io.format"],
    ["io.input"],
    ["io.store"],
    ["io.conversion"],
    ["io.convert"],
    ["io.verify"],
    ["io.loading.split"],
    ["io.plan"],
    ["io.loading"],
    ["io.loader"],
    ["io"],
    ["graph", "noise"],
    ["nn"],
    ["model", "loss"],
    ["likelihood", "sampling"],
    ["checkpoint"],
    ["training"],
    ["trainer"],
    ["metrics"],
    ["inference"],
    ["tasks", "learning"],
    ["report"],
    ["evaluation"],
    ["pl"],
    ["commands", "shipped"],
    ["cli"],
    ["__main__"],
]
"""Rooms and doors, lowest first. A file may import from its own entry and from those below it."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name without `sedd.` -> file."""
    found = {}
    for path in sorted((ROOT / "sedd").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "sedd").with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else ""] = path
    return found


def imported(name: str) -> set[str]:
    """Modules of sedd that a file imports, wherever in it and for whatever purpose, types included."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("sedd.") for alias in node.names if alias.name.startswith("sedd.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sedd":
            base = node.module.removeprefix("sedd").lstrip(".")
            for alias in node.names:
                inside = f"{base}.{alias.name}".lstrip(".")
                found.add(inside if is_module(base, alias.name) else base)
    return found - {"", name}


def is_module(package: str, name: str) -> bool:
    """Whether `name` of a package is a file of it, rather than a function that has the name of its file."""
    file = modules().get(f"{package}.{name}".lstrip("."))
    if file is None:
        return False
    door = modules().get(package)
    return door is None or door.name != "__init__.py" or f"import {name}" not in door.read_text()


def floor(name: str) -> int:
    """The entry of `FLOORS` that a module belongs to: the longest that names it or a package around it."""
    best, found = -1, ""
    for height, rooms in enumerate(FLOORS):
        for room in rooms:
            if (name == room or name.startswith(room + ".")) and len(room) > len(found):
                best, found = height, room
    return best


def test_every_file_has_a_floor() -> None:
    assert [name for name in modules() if name and floor(name) < 0] == []


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_a_file_imports_from_its_own_room_and_from_lower_ones(name: str) -> None:
    higher = {other: FLOORS[floor(other)] for other in imported(name) if floor(other) > floor(name)}
    assert not higher


def test_no_circle_of_imports_not_even_for_types() -> None:
    edges = {name: imported(name) & set(modules()) for name in modules()}
    left = dict(edges)
    while done := [name for name, others in left.items() if not others & set(left)]:
        for name in done:
            del left[name]
    assert not left, f"these import one another: {sorted(left)}"


def test_files_hold_one_idea_each() -> None:
    long = {name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > 450}
    assert not long
    assert len(list((ROOT / "sedd").glob("*.py"))) <= 20


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sedd.io.plan", {"torch", "anndata", "zarr"}),
        ("sedd.io.convert", {"torch", "anndata", "zarr", "dask", "distributed"}),
        ("sedd", {"torch", "numpy", "matplotlib"}),
        ("sedd.tasks", {"torch._dynamo", "sklearn", "matplotlib", "distributed"}),
        ("sedd.cli", {"anndata", "zarr", "torch"}),
    ],
)
def test_what_is_slow_to_import_is_imported_when_it_is_needed(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*[name for name in {sorted(absent)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_page_about_the_house_names_every_file_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z_0-9]+)`", page)) | set(re.findall(r"([a-z_0-9]+)\.py`", page))
    stems = {path.stem for name, path in modules().items() if name and path.stem != "__init__"}
    assert stems - named == set()
    rooms = set(re.findall(r"\*\*`([a-z/]+)/`\*\*", page))
    assert rooms == {str(p.parent.relative_to(ROOT / "sedd")) for p in modules().values() if p.name == "__init__.py"} - {".", "io"}
