"""The tables of the report: what stands in them, row by row, for the template to lay out."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sedd.metrics.table import METRICS, best_baseline, better_text, reading, winner

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


def glance_rows(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the headline metrics: sedd, the best baseline and what real cells get; empty if none of them was measured."""
    rows = []
    for section, metric in HEADLINES:
        row = metrics.get(section, {}).get(metric)
        if row is None or row.get("sedd") is None:
            continue
        rival, value = best_baseline(metric, row)
        rows.append(
            {
                "metric": metric,
                "sedd": row["sedd"],
                "won": winner(metric, row) == "sedd",
                "rival": rival,
                "rival_value": value,
                "ideal": row.get("anchors", {}).get("real cells"),
            }
        )
    return rows


def better(metric: str) -> str:
    """Which way a metric is better, in words."""
    text = better_text(metric)
    return f"{text} is better" if text in ("lower", "higher") else text


def section_table(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return a section's metrics beside their baselines, each with how to read it; None where there are none."""
    if not rows:
        return None
    rivals = list(dict.fromkeys(name for row in rows.values() for name in row.get("baselines", {})))
    anchors = list(dict.fromkeys(name for row in rows.values() for name in row.get("anchors", {})))
    body = []
    for metric, row in rows.items():
        best, info = winner(metric, row), METRICS.get(metric)
        values = {"sedd": row.get("sedd"), **{name: row.get("baselines", {}).get(name) for name in rivals}}
        meaning = f"{info.meaning[0].upper()}{info.meaning[1:]}. " if info else ""
        cells = [{"name": name, "value": value, "best": name == best, "ci": None} for name, value in values.items()]
        cells[0]["ci"] = row.get("ci")
        body.append(
            {
                "metric": metric,
                "cells": cells,
                "anchors": [{"name": name, "value": row.get("anchors", {}).get(name)} for name in anchors],
                "reading": meaning + _capital(reading(metric, row)),
            }
        )
    return {"rivals": rivals, "anchors": anchors, "rows": body}


def _capital(text: str) -> str:
    return text if text.startswith("sedd") else text[:1].upper() + text[1:]


def settings_groups(settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what was run, group by group, and the versions that ran it."""
    groups: dict[str, Mapping[str, Any]] = {k: v for k, v in settings.items() if isinstance(v, Mapping)}
    flat = {k: v for k, v in settings.items() if not isinstance(v, Mapping)}
    if flat:
        groups = {"Settings": flat, **groups}
    system = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    return {**groups, "Versions": {**system, **_versions()}}


def setting_text(value: Any) -> str:
    """Return a setting as people write it."""
    if value is None:
        return "not set"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(setting_text(v) for v in value) or "none"
    return str(value)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
