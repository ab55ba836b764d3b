"""The tables of the report as HTML."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sedd.metrics.table import METRICS, best_baseline, better_text, format_value, metric_label, reading, winner

PACKAGES = ("sedd", "torch", "numpy", "scipy", "scikit-learn", "anndata", "zarr", "dask", "numba", "accelerate")


HEADLINES = (
    ("likelihood", "nats_per_cell"),
    ("imputation", "nll"),
    ("imputation", "rmse_log1p"),
    ("denoising", "mse"),
    ("denoising", "poisson"),
    ("generation", "w2"),
    ("generation", "auc"),
    ("embedding", "knn_accuracy"),
)


def glance_table(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The headline metrics: sedd, the best baseline and what real cells get; empty if none of them was measured."""
    body = []
    for section, metric in HEADLINES:
        row = metrics.get(section, {}).get(metric)
        if row is None or row.get("sedd") is None:
            continue
        name, value = best_baseline(metric, row)
        won = winner(metric, row) == "sedd"
        ideal = format_value(row.get("anchors", {}).get("real cells"))
        rival = f'{format_value(value)}<span class="ci">{escape(name)}</span>' if name else "-"
        body.append(
            f'<tbody><tr><th scope="row">{escape(metric_label(metric))}<span class="better">{escape(_better(metric))}'
            f'</span></th><td data-label="sedd"{_best(won)}>{format_value(row["sedd"])}</td>'
            f'<td data-label="best baseline"{_best(not won)}><span>{rival}</span></td>'
            f'<td data-label="real cells" class="anchor">{ideal}</td></tr></tbody>'
        )
    if not body:
        return ""
    return (
        '<section id="glance"><h2>At a glance</h2><p class="how">Bold is the better of sedd and the best baseline. '
        "<em>Real cells</em> are scored against other real cells: as good as it gets.</p>"
        '<div class="scroll"><table><thead><tr><th scope="col">Metric</th><th scope="col">sedd</th>'
        '<th scope="col">best baseline</th><th scope="col"><em>real cells</em></th></tr></thead>'
        f"{''.join(body)}</table></div></section>"
    )


def _best(won: bool) -> str:
    return ' class="best"' if won else ""


def _better(metric: str) -> str:
    text = better_text(metric)
    return f"{text} is better" if text in ("lower", "higher") else text


def section_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A section's metrics beside their baselines, each followed by how to read it."""
    rivals = list(dict.fromkeys(name for row in rows.values() for name in row.get("baselines", {})))
    anchors = list(dict.fromkeys(name for row in rows.values() for name in row.get("anchors", {})))
    head = ["sedd", *rivals, *(f"<em>{escape(a)}</em>" for a in anchors)]
    cells = "".join(f'<th scope="col">{h if h.startswith("<em>") else escape(h)}</th>' for h in head)
    body = []
    for metric, row in rows.items():
        best = winner(metric, row)
        info = METRICS.get(metric)
        values = {"sedd": row.get("sedd"), **{name: row.get("baselines", {}).get(name) for name in rivals}}
        out = []
        for name, value in values.items():
            text = format_value(value)
            if name == "sedd" and row.get("ci"):
                text += f'<span class="ci">{format_value(row["ci"][0])} to {format_value(row["ci"][1])}</span>'
            out.append(f'<td data-label="{escape(name)}"{_best(name == best)}><span>{text}</span></td>')
        for name in anchors:
            text = format_value(row.get("anchors", {}).get(name))
            out.append(f'<td data-label="{escape(name)}" class="anchor">{text}</td>')
        meaning = f"{info.meaning[0].upper()}{info.meaning[1:]}. " if info else ""
        body.append(
            f'<tbody><tr><th scope="row">{escape(metric_label(metric))}<span class="better">{escape(_better(metric))}</span></th>'
            f'{"".join(out)}</tr><tr class="reading"><td colspan="{len(head) + 1}">'
            f"{escape(meaning + _capital(reading(metric, row)))}</td></tr></tbody>"
        )
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">Metric</th>{cells}</tr></thead>'
        f"{''.join(body)}</table></div>"
    )


def _capital(text: str) -> str:
    return text if text.startswith("sedd") else text[:1].upper() + text[1:]


def settings_tables(settings: Mapping[str, Any]) -> str:
    """What was run, group by group, and the versions that ran it."""
    groups: dict[str, Mapping[str, Any]] = {k: v for k, v in settings.items() if isinstance(v, Mapping)}
    flat = {k: v for k, v in settings.items() if not isinstance(v, Mapping)}
    if flat:
        groups = {"Settings": flat, **groups}
    groups["Versions"] = {"python": platform.python_version(), "system": platform.platform(terse=True), **_versions()}
    tables = "".join(
        f'<table class="settings"><caption>{escape(str(group))}</caption><tbody>'
        + "".join(
            f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_setting(value))}</td></tr>'
            for key, value in entries.items()
        )
        + "</tbody></table>"
        for group, entries in groups.items()
    )
    return f'<section id="run"><h2>What was run</h2><div class="runs">{tables}</div></section>'


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_setting(v) for v in value) or "none"
    return str(value)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
