"""Turn `benchmarks/results/quality_*.json` into the tables of docs/results.md, between its two markers.

python benchmarks/quality_tables.py            # rewrite the page
python benchmarks/quality_tables.py --print    # only show them
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flags import Flags

from sedd.metrics import METRICS, format_value

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
START, END = "<!-- tables: made by benchmarks/quality_tables.py -->", "<!-- end of tables -->"
TITLES = {
    "likelihood": "Likelihood of held-out cells, nats per cell",
    "imputation": "Imputation of hidden genes",
    "denoising": "Denoising of held-out molecules",
    "generation": "Generation",
    "conditional": "Generation by cell type",
    "embedding": "Embedding",
}
COLUMNS: dict[str, list[tuple[str, str, str | float]]] = {
    "likelihood": [("nats_per_cell", "nats per cell", "lower")],
    "imputation": [
        (key, METRICS[key].title, METRICS[key].better)
        for key in ("nll", "mae", "rmse_log1p", "mae_nonzero", "spearman", "coverage_50", "coverage_90")
    ],
    "denoising": [
        ("mse", "MSE", "lower"),
        ("mse_expected_log", "MSE, expected log", "lower"),
        ("poisson", "Poisson", "lower"),
    ],
    "generation": [
        (key, METRICS[key].title, METRICS[key].better)
        for key in ("w2", "w2_exact", "mmd2", "auc", "correlation", "zero_fraction", "library_ks", "nearest_ratio")
    ],
    "conditional": [
        ("named_right_per_type", "Named as asked for, mean of types", "higher"),
        ("named_right", "Named as asked for, mean of cells", "higher"),
        ("w2_within_types", "Gaussian W2 within types", "lower"),
        ("mmd2_within_types", "MMD² within types", "lower"),
    ],
    "embedding": [("knn_accuracy", "kNN accuracy", "higher"), ("ari", "ARI", "higher")],
}


def loss(value: float, better: str | float) -> float:
    """What to minimise."""
    if isinstance(better, str):
        return value if better == "lower" else -value
    return abs(value - better)


def table(protocol: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown rows, best first by the first column; the best of each column in bold, anchors in italics and out of it."""
    methods: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        methods[record["method"], record.get("conditions_on", "")].append(record)
    columns = COLUMNS[protocol]
    means = {
        who: [
            float(np.mean([r[key] for r in rows])) if all(key in r for r in rows) else np.nan for key, _, _ in columns
        ]
        for who, rows in methods.items()
    }
    given = protocol == "likelihood"

    def rank(who: tuple[str, str]) -> tuple[Any, ...]:
        value = loss(means[who][0], columns[0][2])
        return (who[1] if given else "", np.isnan(value), value)

    best = {}
    for i, (_, _, better) in enumerate(columns):
        rivals = {
            who: loss(row[i], better)
            for who, row in means.items()
            if np.isfinite(row[i]) and "anchor" not in who[0] and not (given and who[1] != "nothing")
        }
        best[i] = min(rivals, key=lambda who, rivals=rivals: rivals[who]) if rivals else None
    head = ["method", *(["given"] if given else []), *(title for _, title, _ in columns), "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for who in sorted(means, key=rank):
        cells = []
        for i, (key, _, _) in enumerate(columns):
            values = [r[key] for r in methods[who] if key in r]
            text = format_value(means[who][i])
            if len(values) > 1 and np.isfinite(means[who][i]):
                text += f" ± {format_value(float(np.std(values, ddof=1)))}"
            cells.append(f"**{text}**" if best[i] == who else text)
        name = f"*{who[0]}*" if "anchor" in who[0] else who[0]
        seeds = str(len({r["seed"] for r in methods[who]}))
        lines.append("| " + " | ".join([name, *([who[1]] if given else []), *cells, seeds]) + " |")
    return lines


def tables(path: Path) -> str:
    """All tables of one result file."""
    result = json.loads(path.read_text())
    cells = result["cells"]
    lines = [
        f"## {result['data']}: {cells['train']} training cells, {cells['test']} test cells, {result['genes']} genes",
        "",
    ]
    for protocol, title in TITLES.items():
        records = [r for r in result["records"] if r["protocol"] == protocol]
        if not records:
            continue
        for percent in sorted({r.get("hidden_percent", 0) for r in records}):
            part = [r for r in records if r.get("hidden_percent", 0) == percent]
            lines += [f"### {title}{f', {percent} % hidden' if percent else ''}", "", *table(protocol, part), ""]
    return "\n".join(lines)


def main() -> None:
    parser = Flags(__doc__)
    parser.add_argument("--print", action="store_true", help="show the tables and leave the page alone")
    args = parser.parse_args()
    text = "\n".join(tables(path) for path in sorted((HERE / "results").glob("quality_*.json")))
    if args.print:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    PAGE.write_text(f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
