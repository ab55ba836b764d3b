"""What each metric means, which way is better, and the short table that the terminal shows."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MetricInfo:
    """How to read one metric: its name, unit, better side (a number is the ideal value) and meaning."""

    title: str
    unit: str
    better: str | float
    meaning: str


METRICS: dict[str, MetricInfo] = {
    "nats_per_cell": MetricInfo(
        "Held-out NELBO", "nats/cell", "lower", "an upper bound on -log p of a cell never seen, given nothing of it"
    ),
    "nats_per_cell_given_total": MetricInfo(
        "Held-out NELBO, given the total",
        "nats/cell",
        "lower",
        "the same of a cell whose total count is given; not to be compared with a row that is given nothing",
    ),
    "nats_per_gene": MetricInfo("Held-out NELBO", "nats/gene", "lower", "the same, per gene"),
    "nll": MetricInfo(
        "Negative log score", "nats/entry", "lower", "surprise at the true count of a hidden gene; rewards honest odds"
    ),
    "mae": MetricInfo(
        "Mean absolute error",
        "counts",
        "lower",
        "distance to the true count; all zeros does well on it, so read it last",
    ),
    "rmse_log1p": MetricInfo("RMSE of log1p", "log counts", "lower", "error on the scale on which cells are analysed"),
    "mae_nonzero": MetricInfo("MAE where expressed", "counts", "lower", "error on hidden genes that were in fact on"),
    "spearman": MetricInfo("Spearman", "", "higher", "whether hidden entries are ranked right, over all genes"),
    "coverage_50": MetricInfo("Coverage of 50 % intervals", "", 0.5, "0.5 when the stated odds are the true ones"),
    "coverage_90": MetricInfo("Coverage of 90 % intervals", "", 0.9, "0.9 when the stated odds are the true ones"),
    "mse": MetricInfo("Denoising MSE", "log CP10k", "lower", "error on held-out molecules after log1p CP10k"),
    "poisson": MetricInfo(
        "Denoising Poisson", "nats/entry", "lower", "surprise at held-out molecules, the denoised counts being the rate"
    ),
    "w2": MetricInfo("Gaussian W2", "PC units", "lower", "distance between means and covariances of two sets of cells"),
    "w2_exact": MetricInfo("Exact W2", "PC units", "lower", "mean distance under the best one-to-one pairing of cells"),
    "mmd2": MetricInfo("MMD², unbiased", "", "lower", "kernel distance between distributions; 0 for the same one"),
    "auc": MetricInfo(
        "Real-or-fake AUC", "", 0.5, "how well a random forest tells them from real cells; 0.5: it cannot"
    ),
    "correlation": MetricInfo("Gene-gene correlation error", "", "lower", "whether genes go together as in real cells"),
    "gene_mean": MetricInfo("Gene mean error", "|log2 FC|", "lower", "how far the average level of a gene is off"),
    "gene_variance": MetricInfo("Gene variance error", "|log2 FC|", "lower", "how far the spread of a gene is off"),
    "zero_fraction": MetricInfo("Zero fraction error", "share", "lower", "how far the share of silent cells is off"),
    "library_ks": MetricInfo("Library size KS", "", "lower", "distance between the distributions of cell totals"),
    "nearest_ratio": MetricInfo(
        "Distance to nearest training cell", "generated/real", 1.0, "1 is right; well below 1 the model copies cells"
    ),
    "knn_accuracy": MetricInfo("kNN label accuracy", "", "higher", "cells of a type are neighbours in the embedding"),
    "ari": MetricInfo("ARI of k-means", "", "higher", "clusters of the embedding are the cell types"),
}

SECTIONS: dict[str, str] = {
    "likelihood": "Likelihood of held-out cells",
    "imputation": "Imputation of hidden genes",
    "denoising": "Denoising of held-out molecules",
    "generation": "Generated against held-out cells",
    "embedding": "Embedding",
}

FIRST_ROWS = {
    "likelihood": "nats_per_cell",
    "imputation": "nll",
    "denoising": "poisson",
    "generation": "w2",
    "embedding": "knn_accuracy",
}


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _loss(value: float, better: str | float) -> float:
    if isinstance(better, str):
        return value if better == "lower" else -value
    return abs(value - better)


def winner(metric: str, row: Mapping[str, Any]) -> str | None:
    """Who is best on a row: `sedd` or the name of a baseline; None if the metric is unknown or nothing was measured.

    Parameters
    ----------
    metric : key of `METRICS`
    row : {"sedd": value, "baselines": {name: value}}; anchors take no part, and `sedd` wins a tie
    """
    if metric not in METRICS:
        return None
    scores = {"sedd": row.get("sedd"), **row.get("baselines", {})}
    known = {name: _loss(value, METRICS[metric].better) for name, value in scores.items() if _known(value)}
    return min(known, key=lambda name: known[name]) if known else None


def best_baseline(metric: str, row: Mapping[str, Any]) -> tuple[str, float]:
    """Name and value of the best baseline of a row; an empty name and NaN if there is none."""
    rivals = {k: v for k, v in row.get("baselines", {}).items() if _known(v)}
    if metric not in METRICS or not rivals:
        return "", math.nan
    name = min(rivals, key=lambda k: _loss(rivals[k], METRICS[metric].better))
    return name, rivals[name]


def format_value(value: Any) -> str:
    """Write a value with four significant digits.

    Parameters
    ----------
    value
        A number, or None or NaN where nothing was measured.

    Returns
    -------
    text
        A dash for what was not measured.
    """
    if not _known(value):
        return "-"
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        digits = 3 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 6)}f}"
    return f"{value:.2e}"


def better_text(metric: str) -> str:
    """`lower`, `higher`, `0.5 is best`, or nothing for a metric that is not known."""
    if metric not in METRICS:
        return ""
    better = METRICS[metric].better
    return better if isinstance(better, str) else f"{better:g} is best"


def reading(metric: str, row: Mapping[str, Any]) -> str:
    """One sentence about a row: who wins, against whom and by how much.

    Parameters
    ----------
    metric : key of `METRICS`
    row : {"sedd": value, "baselines": {name: value}, "anchors": {name: value}, "ci": (low, high)}
    """
    ours = row.get("sedd")
    if metric not in METRICS or ours is None or not math.isfinite(ours):
        return ""
    name, value = best_baseline(metric, row)
    if name:
        better = METRICS[metric].better
        verdict = "better than" if _loss(ours, better) < _loss(value, better) else "not better than"
        parts = [f"sedd is {verdict} the best baseline ({name}, {format_value(value)})"]
    else:
        parts = [f"sedd scores {format_value(ours)}"]
    anchors = ", ".join(f"{name} get {format_value(v)}" for name, v in row.get("anchors", {}).items() if _known(v))
    if anchors:
        parts.append(anchors)
    return "; ".join(parts) + "."


def section_reading(section: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence about a table: on how many rows sedd is best, and what the row to read first says.

    Parameters
    ----------
    section : key of `SECTIONS`
    rows : {metric: row}, rows as for `reading`
    """
    known = [metric for metric, row in rows.items() if winner(metric, row) is not None and row.get("baselines")]
    first = FIRST_ROWS.get(section, "")
    said = reading(first, rows[first]) if first in rows else ""
    if not known or not said:
        return ""
    won = sum(winner(metric, rows[metric]) == "sedd" for metric in known)
    count = f"sedd is best on {won} of {len(known)} rows" if len(known) > 1 else ""
    return "; ".join(part for part in (count, f"{METRICS[first].title}, the row to read first: {said}") if part)


def metrics_table(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the metrics as aligned plain text: a table and a sentence per section, the winner of each row marked with `*`.

    Parameters
    ----------
    metrics : {section: {metric: {"sedd": value, "baselines": {name: value}, "anchors": {name: value}}}}

    Returns
    -------
    text : str, without a final newline
    """
    blocks = []
    for section, rows in metrics.items():
        if not rows:
            continue
        rivals = list(dict.fromkeys(name for row in rows.values() for name in row.get("baselines", {})))
        anchors = list(dict.fromkeys(name for row in rows.values() for name in row.get("anchors", {})))
        lines = [[SECTIONS.get(section, section), "sedd", *rivals, *(f"[{name}]" for name in anchors), "better"]]
        for metric, row in rows.items():
            best = winner(metric, row)
            scores = {"sedd": row.get("sedd"), **row.get("baselines", {})}
            cells = [format_value(scores.get(name)) + ("*" if name == best else " ") for name in ("sedd", *rivals)] + [
                format_value(row.get("anchors", {}).get(name)) + " " for name in anchors
            ]
            lines.append([metric_label(metric), *cells, better_text(metric)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        last = len(widths) - 1
        text = [
            "  ".join(
                cell.ljust(w) if i in (0, last) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        said = textwrap.wrap(section_reading(section, rows), max(len(rule), 72))
        blocks.append("\n".join([text[0], rule, *text[1:], *([rule, *said] if said else [])]))
    return "\n\n".join(blocks)


def steps_table(points: Sequence[Mapping[str, Any]]) -> str:
    """Return the generation metrics by number of sampling steps as aligned plain text, and what they say.

    Parameters
    ----------
    points : [{"steps": n, metric: value}], by steps; 0 steps are real cells
    """
    metrics = [name for name in points[0] if name != "steps"]
    lines = [["Sampling steps", *(METRICS[name].title for name in metrics)]]
    for row in points:
        lines.append([str(row["steps"] or "[real cells]"), *(format_value(row[name]) for name in metrics)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    rule = "-" * max(map(len, text))
    made = [row for row in points if row["steps"]]
    ends = made if len(made) < 2 else [made[0], made[-1]]
    said = [f"{format_value(row['w2'])} in {row['steps']} step{'s' if row['steps'] > 1 else ''}" for row in ends]
    said += [f"{format_value(row['w2'])} for real cells" for row in points if not row["steps"]]
    return "\n".join(
        [text[0], rule, *text[1:], rule, f"Gaussian W2 is {', '.join(said)}: more steps pay while it falls."]
    )


def metric_label(metric: str) -> str:
    """Return the title and unit of a metric, or its key if it is not known."""
    info = METRICS.get(metric)
    if info is None:
        return metric
    return f"{info.title} ({info.unit})" if info.unit else info.title
