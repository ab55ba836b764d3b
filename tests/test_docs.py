"""Every public name has a page, and what the pages say is there is there."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import sedd
from sedd.config import SECTIONS

DOCS = ROOT / "docs"
PAGES = [page for kind in ("md", "ipynb") for page in sorted(DOCS.glob(f"**/*.{kind}")) if not {"generated", "_build"} & set(page.parts)]
PUBLIC = ["sedd", "sedd.io", "sedd.io.plan", "sedd.metrics", "sedd.evaluation", "sedd.report", "sedd.pl"]


def _names_with_a_page() -> set[str]:
    """Return the full names in the lists of the reference."""
    found = set()
    for page in (DOCS / "reference").glob("*.md"):
        module = ""
        for line in page.read_text().splitlines():
            if line.startswith(".. currentmodule:: "):
                module = line.split()[-1]
            elif re.fullmatch(r"   [A-Za-z_][\w.]*", line):
                found.add(f"{module}.{line.strip()}")
            elif line.startswith((".. autoclass:: ", ".. py:data:: ")):
                found.add(f"{module}.{line.split()[-1]}")
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_page(module: str) -> None:
    pages = {id(_resolved(name)) for name in _names_with_a_page()}
    public = importlib.import_module(module)
    assert not [name for name in public.__all__ if name != "__version__" and id(getattr(public, name)) not in pages]


def _resolved(name: str) -> object:
    found: object = importlib.import_module("sedd")
    for part in name.split(".")[1:]:
        found = getattr(found, part, None) or importlib.import_module(f"{getattr(found, '__name__', '')}.{part}")
    return found


def test_every_public_name_says_what_it_is() -> None:
    bare = [name for name in _names_with_a_page() if not (getattr(_resolved(name), "__doc__", None) or "").strip()]
    assert not bare


def test_every_public_function_says_what_goes_in() -> None:
    functions = {name: found for name in _names_with_a_page() if inspect.isfunction(found := _resolved(name))}
    assert len(functions) > 50
    assert not [name for name, one in functions.items() if inspect.signature(one).parameters and "Parameters\n---" not in (inspect.getdoc(one) or "")]


FUNCTIONS = [getattr(sedd, name) for name in sedd.__all__ if inspect.isfunction(getattr(sedd, name))]
OF_A_MODEL = [sedd.Pretrained.load, sedd.Pretrained.save_pretrained, sedd.Pretrained.push_to_hub]


@pytest.mark.parametrize("function", [*FUNCTIONS, *OF_A_MODEL, sedd.pl.report, sedd.CellLoader], ids=lambda function: function.__qualname__)
def test_the_help_of_a_function_says_what_goes_in_what_comes_out_what_is_refused_and_how_it_is_called(function: Callable[..., Any]) -> None:
    doc = inspect.getdoc(function) or ""
    heads = re.findall(r"^(\w+)\n-+$", doc, re.MULTILINE)
    assert heads == (["Parameters", "Attributes"] if inspect.isclass(function) else ["Parameters", "Returns", "Raises", "Examples"])
    entries = re.findall(r"^([\w*][\w*, ]*?)(?: : .*)?\n? {4,}|^([\w, ]+?) : ", doc[doc.index("Parameters\n---") :], re.MULTILINE)
    said = set(re.findall(r"\w+", " ".join(map("".join, entries))))
    assert inspect.signature(function).parameters.keys() - {"self"} <= said
    assert "sedd.tasks." not in doc


def test_every_group_of_settings_has_a_page() -> None:
    assert {f"sedd.config.{section.__name__}" for section in SECTIONS.values()} <= _names_with_a_page()


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_to_what_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in local if not (page.parent / link).exists()]


def test_the_readme_says_no_command_that_cannot_be_run_as_it_stands() -> None:
    commands = "".join(re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))
    assert "bash/train_quick.sh" in commands and not re.findall(r"[A-Z]+_OF_|<[a-z ]+>|example\.(?:org|com)", commands)


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set()
    for page in DOCS.glob("**/*.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            listed |= {(page.parent / line).resolve() for line in block.splitlines() if line and not line.startswith(":")}
    assert not [page.name for page in PAGES if page.with_suffix("").resolve() not in listed and page.name != "index.md"]


PEER_ROWS = (
    {"protocol": "likelihood", "metric": "nats_per_cell", "conditions_on": "nothing", "sedd": "sedd, bound"},
    {"protocol": "imputation", "metric": "nll", "hidden_percent": 15},
    {"protocol": "denoising", "metric": "poisson"},
    {"protocol": "denoising", "metric": "mse", "sedd": "sedd, mean of the logarithm"},
    {"protocol": "generation", "metric": "w2", "only": "prior"},
    {"protocol": "generation", "metric": "mmd2", "only": "prior"},
)


def test_the_readme_compares_with_peers_by_the_numbers_that_were_measured() -> None:
    block = (ROOT / "README.md").read_text().partition("<!-- peers -->")[2].partition("<!-- end of peers -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(PEER_ROWS)
    for column, name in ((1, "pbmc3k"), (3, "baron_mouse")):
        records = json.loads((ROOT / "benchmarks" / "results" / f"quality_{name}.json").read_text())["records"]
        for cells, row in zip(rows, PEER_ROWS, strict=True):
            kept = {k: v for k, v in row.items() if k in ("protocol", "conditions_on", "hidden_percent")}
            values: dict[str, list[float]] = {}
            for record in records:
                if row["metric"] in record and all(record.get(k) == v for k, v in kept.items()):
                    values.setdefault(record["method"], []).append(record[str(row["metric"])])
            means = {method: sum(found) / len(found) for method, found in values.items()}
            others = {k: v for k, v in means.items() if k.startswith(("scVI", "MAGIC", "kNN")) and str(row.get("only", "")) in k}
            for text, value in ((cells[column], means[str(row.get("sedd", "sedd"))]), (cells[column + 1], min(others.values()))):
                shown = text.split(" (")[0].strip("*")
                assert shown == f"{value:.{len(shown.partition('.')[2])}f}", (cells[0], name, value)


def _record(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def _results() -> str:
    return (DOCS / "results.md").read_text()


@pytest.mark.parametrize("script", ["annotate", "batches"])
def test_the_tables_of_labels_and_batches_are_what_their_scripts_print_of_what_was_measured(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(script)
    made = {"annotate": "tables", "batches": "table"}[script]
    blocks = getattr(module, made)(_record(script)).strip().split("\n\n")
    assert len(blocks) > 1
    assert not [block.splitlines()[0] for block in blocks if block not in _results()]


def test_the_table_of_genes_missing_is_that_of_the_results() -> None:
    page = (DOCS / "missing-genes.md").read_text()
    rows = re.findall(r"^\| (?:accuracy|calibration|nats|share).*$", page, re.MULTILINE)
    of_the_cells = _results().partition("**pbmc3k**: ")[2].partition("\n\n**")[0]
    assert rows and not [row for row in rows if row not in of_the_cells]


def test_the_tables_of_known_truth_are_what_was_measured() -> None:
    for row in _record("truth")["rows"]:
        amounts = ("all", "3.75 pg", "7.5 pg", "15 pg", "30 pg")
        nearness = [f"{kind}, {amount}" for kind in ("rmse", "r") for amount in amounts]
        same = [f"rmse to 30 pg of the same protocol, {amount}" for amount in amounts]
        use = [key for key in row if key not in {*nearness, *same, "method", "chosen"}]
        for keys in (nearness, same, use):
            assert f"| {row['method']} | " + " | ".join(f"{row[key]:.3f}" for key in keys) + " |" in _results()


def _cells_below(heading: str) -> list[list[str]]:
    """Cells of the first table below a text, less its head and names, without what makes them bold."""
    lines = _results().partition(heading)[2].splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("|"))
    table = lines[first + 2 :]
    end = next(k for k, line in enumerate(table) if not line.startswith("|"))
    return [[cell.replace("**", "").strip() for cell in line.strip("|").split("|")[1:]] for line in table[:end]]


def test_the_tables_of_perturbations_are_what_was_measured() -> None:
    simulated = [
        [f"{row['pearson']:.3f} ± {row['pearson_std_over_seeds']:.3f}", f"{row['spearman']:.3f}", f"{row['rmse']:.3f}"]
        for row in _record("perturbation")["summary"]
    ]
    assert _cells_below("## Perturbation") == simulated
    real = _record("perturbation_real")
    expected = []
    for row in real["summary"]:
        kinds: dict[str, list[float]] = {}
        for one in real["records"]:
            if one["method"] == row["method"]:
                kinds.setdefault(one["left out"], []).append(one["pearson"])
        by_kind = [sum(found) / len(found) for _, found in sorted(kinds.items())]
        expected.append([f"{value:.3f}" for value in (row["pearson"], row["spearman"], row["rmse"], *by_kind)])
    assert _cells_below("**Interferon, real cells.**") == expected
