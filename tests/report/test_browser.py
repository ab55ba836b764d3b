"""The page of a hostile file in a real browser: names of genes, labels and files are text there and nothing runs."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from test_page import Balanced, data  # noqa: F401

from sedd.report.page import ReportData, write_report

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]
ATTACKS = [
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"><svg onload=\"document.title='owned'\">",
    "</title></style></text></figure><script>document.title='owned'</script>",
    "' onmouseover='document.title=`owned`' x='",
    "--><script>document.title='owned'</script><!--",
    "{{ 7*7 }}{% raw %}",
    "javascript:document.title='owned'",
]


def shown(page: Path, folder: Path) -> str:
    """Return what a browser made of a file once its scripts have had two seconds."""
    assert BROWSER
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", f"--user-data-dir={folder}", "--dump-dom", page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=True, env={**os.environ, "HOME": str(folder)}).stdout


def test_the_browser_of_these_tests_runs_what_is_not_escaped(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(f"<!doctype html><title>page</title><body>{ATTACKS[0]}")
    assert "<title>owned</title>" in shown(page, tmp_path)


def test_names_run_nothing_in_a_browser(data: ReportData, tmp_path: Path) -> None:  # noqa: F811
    labels = np.array([ATTACKS[i % len(ATTACKS)] for i in range(80)])
    row = {"sedd": 1.0, "baselines": dict.fromkeys(ATTACKS, 2.0), "anchors": dict.fromkeys(ATTACKS, 0.5)}
    hostile = dataclasses.replace(
        data, title=" ".join(ATTACKS), notes=ATTACKS, metrics={**data.metrics, ATTACKS[0]: {ATTACKS[1]: row}}, real_labels=labels, generated_labels=labels[:60],
        settings={name: {name: [name]} for name in ATTACKS},
    )  # fmt: skip
    page = write_report(tmp_path / "report", hostile, umap=False)
    found = shown(page, tmp_path)
    title = re.search(r"<title>(.*?)</title>", found, re.DOTALL)
    assert title and title.group(1) != "owned" and "document.title" in title.group(1)
    parser = Balanced()
    parser.feed(found)
    tags = [(tag, attrs) for tag, attrs in parser.found if tag in ("script", "svg", "iframe") or any(name.startswith("on") for name in attrs)]
    assert not tags
    assert all((attrs["src"] or "").startswith("data:image/svg+xml") for tag, attrs in parser.found if tag == "img")
    assert "49" not in re.findall(r"(\d+)\{% raw", parser.text)


@pytest.mark.parametrize("figure", ["cells_real_labels", "cells_generated_labels"])
def test_a_figure_opened_by_itself_runs_nothing(figure: str, data: ReportData, tmp_path: Path) -> None:  # noqa: F811
    labels = np.array([ATTACKS[i % len(ATTACKS)] for i in range(80)])
    page = write_report(tmp_path / "report", dataclasses.replace(data, real_labels=labels, generated_labels=labels[:60]), umap=False)
    found = shown(page.parent / "figures" / f"{figure}.svg", tmp_path)
    drawn = list(ElementTree.fromstring(found).iter())
    assert len(drawn) > 50
    assert not [one for one in drawn if one.tag.endswith("script") or any(name.lower().startswith("on") for name in one.attrib)]
