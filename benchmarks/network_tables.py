"""Write the section of docs/results.md on the law of counts from `results/network.json`, which `network.py` makes.

    python benchmarks/network_tables.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flags import Flags

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "a89df50"
Record = dict[str, Any]


def rates(record: Record) -> list[str]:
    """Return the table of cells per second."""
    now, before = record["cells a second"]["here"], record["cells a second"][BEFORE]
    rows = ["| | now | before | |", "|---|---|---|---|"]
    for name, rate in now.items():
        old = before.get(name)
        beside = f"{old:,.0f} | {rate / old:.1f}x" if old else "- | -"
        rows.append(f"| {name} | {rate:,.0f} | {beside} |")
    return rows


def times(records: list[Record]) -> list[str]:
    """Return the table of seconds to a bound."""
    rows = ["| data | | seconds to the bound | epochs | best bound | seconds to it |", "|---|---|---|---|---|---|"]
    for record in records:
        for name, found in record["found"].items():
            reached = "never" if found["seconds"] is None else f"{found['seconds']:.0f} to {found['target']:.0f} nats"
            best = f"{found['best bound']:.1f} | {found['seconds to the best']:.0f}"
            rows.append(f"| {record['data']} | {'now' if name == 'here' else 'before'} | {reached} | {found['epochs'] or '-'} | {best} |")
    return rows


def marks(records: list[Record]) -> list[str]:
    """Return the table of what cells that were made are like."""
    rows = [
        "| data, epochs | | counts above the largest seen | variance ratio, 95th / 99th percentile | rare genes, predicted over true "
        "| MMD² (independent genes) | nats per held-out cell |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda one: (one["data"], one["epochs"])):
        for name, found in record["found"].items():
            what = {"here": "now", BEFORE: "before"}.get(name, name)
            made, mmd2 = found["generated"], found["mmd2"]
            nats = f"{found['nats per held-out cell']:.1f}" if "nats per held-out cell" in found else ""
            epochs = "" if name == "scVI" else f", {record['epochs']}"
            rows.append(
                f"| {record['data']}{epochs} | {what} | {figures(made)} | {found['rare genes, predicted over true']:.2f} "
                f"| {mmd2.get('scVI', mmd2.get('sedd')):.4f} ({mmd2['gene marginals']:.4f}) | {nats} |"
            )
        rows.append(f"| | held out | {figures(record['found']['here']['held out'])} | 1 | | |")
    return rows


def figures(cells: Record) -> str:
    """Return the columns of cells alone."""
    ratio = (cells[f"variance ratio, {k}th percentile"] for k in (95, 99))
    return f"{cells['counts above the largest seen']:.1%} | {' / '.join(f'{one:.1f}' for one in ratio)}"


def section(records: list[Record]) -> str:
    """Return the whole section."""
    by_kind = {kind: [one for one in records if one["what"] == kind] for kind in ("rates", "time", "marks")}
    return "\n".join(
        [
            "## The law of counts beside the one before",
            "",
            f"`benchmarks/network.py`, `results/network.json`, one thread; *before* is commit {BEFORE}, a free law over bins; settings of the "
            "quick run, one seed. Rates are cells per second of processor time, medians of interleaved rounds.",
            "",
            *rates(by_kind["rates"][0]),
            "",
            "Steps are no longer of equal length, and 16 of them make cells as good as 128 do ([the method](method.md)).",
            "",
            *(
                ["Processor seconds of a whole command until the bound on the validation cells is reached:", "", *times(by_kind["time"]), ""]
                if by_kind["time"]
                else []
            ),
            "Cells that were generated, and hidden rare genes (training mean below .01); *held out* is what real cells get, scVI is trained with "
            "early stopping on the same cells and draws from its prior.",
            "",
            *marks(by_kind["marks"]),
        ]
    )


def main() -> None:
    """Put the section in its place."""
    Flags(__doc__).parse_args()
    page = ROOT / "docs" / "results.md"
    before, _, rest = page.read_text().partition("<!-- law -->")
    after = rest.partition("<!-- end of tables -->")[2]
    records = json.loads((ROOT / "benchmarks" / "results" / "network.json").read_text())
    page.write_text(f"{before}<!-- law -->\n{section(records)}\n<!-- end of tables -->{after}")


if __name__ == "__main__":
    main()
