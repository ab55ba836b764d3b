"""What the tables of the report hold; the template sets them out."""

from __future__ import annotations

import platform
from collections.abc import Mapping
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


def headlines(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """List the headline metrics that were measured: sedd, the best baseline and what real cells get."""
    found = []
    for section, metric in HEADLINES:
        row = metrics.get(section, {}).get(metric)
        if row is None or row.get("sedd") is None:
            continue
        rival, value = best_baseline(metric, row)
        found.append(
            {
                "label": metric_label(metric),
                "better": _better(metric),
                "won": winner(metric, row) == "sedd",
                "sedd": format_value(row["sedd"]),
                "rival": rival,
                "value": format_value(value),
                "real": format_value(row.get("anchors", {}).get("real cells")),
            }
        )
    return found


def _better(metric: str) -> str:
    text = better_text(metric)
    return f"{text} is better" if text in ("lower", "higher") else text


def section_table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Set out a section's metrics beside their baselines, each with how to read it; None without any."""
    if not rows:
        return None
    methods = ["sedd", *dict.fromkeys(name for row in rows.values() for name in row.get("baselines", {}))]
    anchors = list(dict.fromkeys(name for row in rows.values() for name in row.get("anchors", {})))
    table = []
    for metric, row in rows.items():
        scores = {"sedd": row.get("sedd"), **row.get("baselines", {})}
        meaning = METRICS[metric].meaning + ". " if metric in METRICS else ""
        table.append(
            {
                "label": metric_label(metric),
                "better": _better(metric),
                "winner": winner(metric, row),
                "scores": {name: format_value(scores.get(name)) for name in methods},
                "interval": " to ".join(map(format_value, row.get("ci") or ())),
                "anchors": {name: format_value(row.get("anchors", {}).get(name)) for name in anchors},
                "reading": _capital(meaning) + _capital(reading(metric, row)),
            }
        )
    return {"methods": methods, "anchors": anchors, "rows": table}


def _capital(text: str) -> str:
    return text if text.startswith("sedd") else text[:1].upper() + text[1:]


def settings_groups(settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """What was run, group by group, and the versions that ran it."""
    groups: dict[str, Mapping[str, Any]] = {k: v for k, v in settings.items() if isinstance(v, Mapping)}
    flat = {k: v for k, v in settings.items() if not isinstance(v, Mapping)}
    if flat:
        groups = {"Settings": flat, **groups}
    groups["Versions"] = {"python": platform.python_version(), "system": platform.platform(terse=True), **_versions()}
    return [(group, [(key, _setting(value)) for key, value in entries.items()]) for group, entries in groups.items()]


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
