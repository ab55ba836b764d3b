"""What stands around the package, read by other programs: workflows, forms, recipe, licences, lists. Each says what pyproject.toml says."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "dask": "dask-core"}
"""Names that differ between the two worlds."""
in_checkout = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="a source distribution has no .github")


def tool(name: str) -> ModuleType:
    """Return a script of `tools/` as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@in_checkout
def test_there_are_workflows_for_tests_build_docs_and_publishing() -> None:
    assert [path.stem for path in WORKFLOWS] == ["build", "docs", "publish", "tests"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_trusts_nothing_that_can_change_and_runs_what_is_there(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] in ({}, {"contents": "read"})
    for step in steps_of(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])  # a commit; a tag can be moved
            if step["uses"].startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}
        else:
            assert "${{" not in step["run"]  # text of others would become a part of the script
            for script in re.findall(r"\./[\w/]+\.sh", step["run"]):
                assert os.access(ROOT / script, os.X_OK)
    assert all(job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())


@in_checkout
def test_every_version_of_python_that_the_package_names_is_tested_and_pinned() -> None:
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", line)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == named == sorted(path.stem for path in (ROOT / "constraints").glob("*.txt"))
    assert PROJECT["requires-python"] == f">={named[0]}"


@in_checkout
def test_only_the_job_that_uploads_may_prove_who_it_is() -> None:
    jobs = {job: what for path in WORKFLOWS for job, what in yaml.safe_load(path.read_text())["jobs"].items() if "id-token" in what.get("permissions", {})}
    assert list(jobs) == ["publish"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"]
    assert not [step for step in jobs["publish"]["steps"] if "checkout" in step.get("uses", "")]  # it runs no code of the repository


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_for_issues_is_one(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes") and field["attributes"]["label"]


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Return the lower bound of each, by its name in conda."""
    found = {}
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        found[CONDA.get(name, name)] = str(requirement.specifier)
    return found


def test_the_conda_recipe_needs_what_the_package_needs() -> None:
    recipe = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text())
    wanted = lower_bounds(PROJECT["dependencies"]) | {"python": PROJECT["requires-python"]}
    assert dict(line.split(" ") for line in recipe["requirements"]["run"]) == wanted
    assert recipe["context"] == {"name": PROJECT["name"], "version": PROJECT["version"]}
    assert recipe["about"]["license"] == PROJECT["license"] and (ROOT / recipe["about"]["license_file"]).is_file()
    assert recipe["build"]["python"]["entry_points"] == [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]


def test_the_licence_of_every_package_that_is_named_is_listed_and_compatible() -> None:
    licences = tool("licences")
    rows = re.findall(r"^\| ([\w-]+) \| (.+?) \| (.+?) \|$", (ROOT / "docs" / "licences.md").read_text(), re.MULTILINE)[1:]
    named = [text for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for text in texts]
    assert {canonicalize_name(Requirement(text).name) for text in named} - {"sedd"} <= {name for name, *_ in rows}
    assert {name for name, _, why in rows if why == "sedd needs"} == {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert len(rows) == len({name for name, *_ in rows}) > 60
    assert not [row for row in rows if licences.parts(row[1]) - licences.COMPATIBLE or not licences.parts(row[1])]


def test_a_licence_that_is_not_known_to_be_compatible_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    licences = tool("licences")
    monkeypatch.setitem(licences.KNOWN, "numpy", "MIT AND GPL-3.0-only")
    with pytest.raises(SystemExit, match=r"numpy is under MIT AND GPL-3.0-only; GPL-3.0-only is not"):
        licences.page()


def test_the_entry_for_the_scverse_list_has_all_that_its_schema_asks_for() -> None:
    made = tool("ecosystem").entry("https://example.org/source", "https://example.org/site", ["ada"])
    # by the schema's version 2.0, which the list's repository keeps
    assert {"name", "description", "project_home", "documentation_home", "license", "tags", "primary_category", "language", "category", "install"} <= set(made)
    assert made["category"] == "ecosystem" and made["primary_category"] == "scRNA-seq" and made["language"] == "Python"
    assert made["tags"] and len(made["tags"]) == len(set(made["tags"]))
    assert (made["name"], made["license"], made["install"]) == (PROJECT["name"], PROJECT["license"], {"pypi": PROJECT["name"]})
    for wrong in ("not known yet", "example.org", "file:///home"):
        with pytest.raises(SystemExit, match="is no address"):
            tool("ecosystem").entry(wrong, "https://example.org", ["ada"])


def test_what_only_maintainers_run_is_in_groups_and_not_in_the_package() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    needed = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    tools = {canonicalize_name(Requirement(text).name) for texts in groups.values() for text in texts} | {"pytest", "hypothesis", "ruff", "mypy", "sphinx"}
    assert not needed & tools


def test_the_changelog_has_a_section_for_what_is_not_released() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_every_flag_of_a_benchmark_says_what_it_means_and_what_it_is_by_default() -> None:
    spec = importlib.util.spec_from_file_location("flags", ROOT / "benchmarks" / "flags.py")
    assert spec and spec.loader
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    calls = [(path.name, node) for path in (ROOT / "benchmarks").glob("*.py") for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    made = [call for name, call in calls if ast.unparse(call.func).endswith(".add_argument") and name != "flags.py"]
    assert len(made) > 150
    silent = [ast.unparse(call) for call in made if "help" not in {word.arg for word in call.keywords}]
    assert not [one for one in silent if not any(f"'{flag}'" in one for flag in flags.MEANINGS)]
    assert not [name for name, call in calls if ast.unparse(call.func) == "argparse.ArgumentParser"]
    parser = flags.Flags("What it does.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="which 5 %% of the rows", nargs="*", default=[])
    assert "seed of all random choices (default: 0)" in parser.format_help() and "which 5 % of the rows (default: none)" in parser.format_help()
