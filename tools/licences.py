"""Writes docs/licences.md: the licence of every package that sedd needs, from the metadata of those that are installed.

    python tools/licences.py            in the environment of ./bash/setup.sh

A licence that is not in `COMPATIBLE`, and a package whose metadata names none, ends it with an error.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"
COMPATIBLE = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "LLVM-exception", "MIT", "MIT-CMU", "MPL-2.0",
    "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
}  # fmt: skip
"""Each lets a program under the MIT licence use the package; MPL-2.0 asks for the source of changes to its own files only."""
CLASSIFIERS = {
    "Apache Software License": "Apache-2.0", "BSD License": "BSD-3-Clause", "MIT License": "MIT", "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "ISC License (ISCL)": "ISC", "The Unlicense (Unlicense)": "Unlicense",
}  # fmt: skip
KNOWN = {
    "hdf5plugin": "MIT AND BSD-2-Clause AND BSD-3-Clause AND Zlib",  # the filters that it contains have their own
    "matplotlib": "PSF-2.0",
    "numba": "BSD-2-Clause",
    "wandb": "MIT",  # this and those below are not in the environment of the tests
    "scvi-tools": "BSD-3-Clause",
    "sphinx-book-theme": "BSD-3-Clause",
    "sphinx-design": "MIT",
}
"""What metadata do not say, or not so that a program can read it; read in the packages."""


def project() -> dict:
    """Return the table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def licence_of(name: str) -> str:
    """Return the licence of a package as an SPDX expression.

    Raises
    ------
    SystemExit
        If its metadata name none.
    """
    if name in KNOWN:
        return KNOWN[name]
    try:
        found = metadata(name)
    except PackageNotFoundError:
        raise SystemExit(f"licences: {name} is not installed and not in KNOWN.") from None
    if expression := found.get("License-Expression"):
        return expression
    classifiers = [line.rpartition(" :: ")[2] for line in found.get_all("Classifier") or [] if line.startswith("License ::")]
    named = dict.fromkeys(CLASSIFIERS[one] for one in classifiers if one in CLASSIFIERS)
    text = (found.get("License") or "").strip()
    if named and len(named) == len([one for one in classifiers if one != "OSI Approved"]):
        return " AND ".join(named)
    for pattern, licence in ((r"MIT\b", "MIT"), (r"Apache", "Apache-2.0"), (r"(new |modified )?BSD|3-clause", "BSD-3-Clause"), (r"MPL-2", "MPL-2.0 AND MIT")):
        if re.match(pattern, text, re.IGNORECASE):
            return licence
    raise SystemExit(f"licences: {name} names its licence as {text[:60]!r} and {classifiers}; add what its licence file says to KNOWN.")


def parts(expression: str) -> set[str]:
    """Return the licences in an expression."""
    return set(re.split(r" AND | OR | WITH |[()]", expression)) - {""}


def needed(requirements: list[str]) -> set[str]:
    """Return the packages that requirements bring, on this system, with what these bring."""
    found: set[str] = set()
    left = [(Requirement(text), "") for text in requirements]
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        known = name in found
        found.add(name)
        try:
            of_it = [] if known and not requirement.extras else metadata(name).get_all("Requires-Dist") or []
        except PackageNotFoundError:
            continue
        left += [(Requirement(text), one) for text in of_it for one in (requirement.extras or {""})]
    return found


def page() -> str:
    """Return the page, without versions: it changes when a package comes, goes or changes its licence."""
    declared = project()
    core = {canonicalize_name(Requirement(text).name) for text in declared["dependencies"]}
    optional: dict[str, list[str]] = {}
    for extra, texts in declared["optional-dependencies"].items():
        for text in texts:
            name = canonicalize_name(Requirement(text).name)
            if name != "sedd" and name not in core:
                optional.setdefault(name, []).append(extra)
    brought = {name for name in needed(declared["dependencies"]) - core if not name.startswith(("nvidia-", "cuda-"))}
    rows = {"sedd needs": sorted(core), "they bring": sorted(brought), "extras": sorted(set(optional) - brought)}
    lines = ["# Licences", "", "sedd is under the MIT licence. It contains no code of the packages below; `pip` installs them beside it. All of their licences allow that."]
    lines += ["`tools/licences.py` makes this page from the packages' own metadata, and refuses a licence that it does not know to be compatible.", ""]
    lines += ["| package | licence | why it is there |", "|---|---|---|"]
    for why, names in rows.items():
        for name in names:
            licence = licence_of(name)
            if unknown := parts(licence) - COMPATIBLE:
                raise SystemExit(f"licences: {name} is under {licence}; {', '.join(sorted(unknown))} is not in COMPATIBLE.")
            lines.append(f"| {name} | {licence} | {why if why != 'extras' else 'extra ' + ', '.join(optional[name])} |")
    lines += ["", "The build of torch for NVIDIA GPUs also brings NVIDIA's libraries, which are under NVIDIA's own terms; the build for CPUs does not."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page())
    print(PAGE.relative_to(ROOT), file=sys.stderr)
