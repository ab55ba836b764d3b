"""Pages and help are in plain words: phrases that readers stumbled over do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sedd.cli import CLASSES, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "nbs").glob("*.ipynb"))]
PHRASES = re.compile(r"\btold\b|\bthe road\b|\bbegun\b|\bgone on with\b|\bgo(es)? on with\b|\bsays? of\b", re.IGNORECASE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_in_plain_words(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert not [f"{page.name}:{number}: {line}" for number, line in enumerate(lines, 1) if PHRASES.search(line)]


@pytest.mark.parametrize("name", CLASSES)
def test_help_is_in_plain_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert not PHRASES.findall(" ".join(capsys.readouterr().out.split()))
