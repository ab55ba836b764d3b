"""A check of the pages as they are served: every link inside the site leads to a file, and to a place in it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.util import logging


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep links and identifiers."""
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.places.add(value)


def broken_links(root: Path) -> list[str]:
    """Return the links between the pages under a directory that lead nowhere."""
    pages = {path: Page(path) for path in sorted(root.rglob("*.html")) if "_static" not in path.parts}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            there = target.exists() and (not address.fragment or target not in pages or address.fragment in pages[target].places)
            if not there:
                broken.append(f"{path.relative_to(root)}: {link}")
    return broken


def _check(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        for link in broken_links(Path(app.outdir)):
            logging.getLogger(__name__).warning("a link leads nowhere: %s", link)


def setup(app: Any) -> dict[str, bool]:
    """Connect it to Sphinx."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
