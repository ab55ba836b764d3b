"""Writes the entry for the list of packages of the scverse ecosystem: its `meta.yaml`, by version 2.0 of the list's schema.

    python tools/ecosystem.py --home ADDRESS_OF_THE_SOURCE --docs ADDRESS_OF_THE_SITE --contact GITHUB_NAME -o meta.yaml

What the project knows of itself comes from pyproject.toml. The addresses are not known before it is published, so they are asked for.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
TAGS = ["scRNA-seq", "denoising", "cell-type annotation", "dimensionality reduction", "deep learning", "probabilistic modeling"]
"""Names that the list's schema knows."""


def entry(home: str, docs: str, contact: list[str]) -> dict[str, object]:
    """Return the entry.

    Raises
    ------
    SystemExit
        If an address is none.
    """
    for address in (home, docs):
        if urlsplit(address).scheme != "https" or not urlsplit(address).netloc:
            raise SystemExit(f"ecosystem: {address!r} is no address; expected one that begins with https://.")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        "name": project["name"],
        "description": project["description"],
        "project_home": home,
        "documentation_home": docs,
        "install": {"pypi": project["name"]},
        "license": project["license"],
        "primary_category": "scRNA-seq",
        "tags": TAGS,
        "language": "Python",
        "category": "ecosystem",
        "contact": contact,
        "test_command": "./bash/test.sh",
    }


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", required=True, help="address of the source")
    parser.add_argument("--docs", required=True, help="address of the site")
    parser.add_argument("--contact", required=True, nargs="+", help="GitHub names of maintainers")
    parser.add_argument("-o", "--output", type=Path, default=Path("meta.yaml"), help="the file to write (default: meta.yaml)")
    args = parser.parse_args()
    args.output.write_text(yaml.safe_dump(entry(args.home, args.docs, args.contact), sort_keys=False, allow_unicode=True))
    print(args.output, file=sys.stderr)


if __name__ == "__main__":
    main()
