"""Pages and help are in plain words: phrases that readers stumbled over do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sedd.cli import CLASSES, main

ROOT = Path(__file__).parents[1]
PROSE = [
    *sorted(ROOT.glob("*.md")),
    *(page for page in sorted((ROOT / "docs").glob("**/*.md")) if not {"_build", "generated"} & set(page.parts)),
    *sorted((ROOT / "data").glob("*.md")),
]
PAGES = [*PROSE, *sorted((ROOT / "nbs").glob("*.ipynb")), *sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))]
PHRASES = re.compile(r"\btold\b|\bthe road\b|\bbegun\b|\bgone on with\b|\bgo(es|ing)? on\b|\bsays? of\b|\bas it is\b", re.IGNORECASE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_in_plain_words(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert not [f"{page.name}:{number}: {line}" for number, line in enumerate(lines, 1) if PHRASES.search(line)]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_many_numbers_stand_in_a_table(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    full = [line for line in text.splitlines() if not line.startswith("|") and len(re.findall(r"(?<![\w.])\.?\d[\d,.]*", re.sub(r"`[^`]*`|\]\([^)]*\)", "", line))) >= 10]
    assert not full


@pytest.mark.parametrize("name", CLASSES)
def test_help_is_in_plain_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert not PHRASES.findall(" ".join(capsys.readouterr().out.split()))
