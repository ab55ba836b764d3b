"""How each figure of the report is drawn: one question each, small enough to stack on a phone, in colours all can tell apart."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator
from scipy import sparse
from scipy.stats import spearmanr

from sedd.metrics import calibration_histogram, fit_pca, gene_moments, interval_coverage, log_cp10k

# Okabe and Ito's palette: distinct for every common kind of colour blindness, and in grey print by lightness.
MODEL, REAL, GENERATED, MUTED = "#0072B2", "#555555", "#D55E00", "#8a8a8a"
CYCLE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "sedd",  # the same input gives the same file
}
SIZE = (4.4, 3.5)
"""Width and height of a figure, inches."""
MAX_POINTS = 4000


def style() -> Any:
    """Return the context in which every figure is drawn and saved."""
    return matplotlib.rc_context(STYLE)


def _label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)


def series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs of which `key` is a finite number, and these numbers."""
    rows = [
        (row.get("epoch", i + 1), row[key]) for i, row in enumerate(history) if isinstance(row.get(key), int | float)
    ]
    points = np.array([row for row in rows if math.isfinite(row[1])], dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _epoch_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def training_loss(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    """Training loss by epoch."""
    epoch, loss = series(history, "train_loss")
    _label(axes, "Training loss", "epoch", "score entropy, nats per cell")
    axes.plot(epoch, loss, color=MODEL, marker="o", markersize=3.5)
    _epoch_ticks(axes)


def validation_nelbo(axes: Axes, history: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> None:
    """Draw the validation NELBO by epoch, the baselines as lines."""
    epoch, nelbo = series(history, "val_nelbo")
    _label(axes, "Held-out cells", "epoch", "NELBO, nats per cell")
    axes.plot(epoch, nelbo, color=MODEL, marker="o", markersize=3.5)
    low, high = nelbo.min(), nelbo.max()
    known = sorted((v, k) for k, v in baselines.items() if v is not None and math.isfinite(v))
    # A far worse baseline would squeeze the curve into a line: keep those near the curve or near the best baseline.
    near = [(v, k) for v, k in known if v <= max(high, known[0][0]) + 0.5 * (max(high, known[0][0]) - low)]
    labelled = -math.inf
    gap = 0.06 * (max([high, *(v for v, _ in near)]) - low)
    for value, name in near:
        axes.axhline(value, color=MUTED, linestyle="--", linewidth=1)
        labelled = max(value, labelled + gap)
        axes.annotate(
            name,
            (1, labelled),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
            color="#555555",
        )
    axes.margins(y=0.12)
    _epoch_ticks(axes)


def predicted_against_true(axes: Axes, true: np.ndarray, predicted: np.ndarray) -> None:
    """Density of hidden entries by predicted mean and true count, with the mean true count per predicted level."""
    _label(axes, "Hidden genes", "predicted mean count", "true count")
    true, predicted = np.asarray(true, np.float64), np.maximum(np.asarray(predicted, np.float64), 1e-3)
    top = max(float(true.max(initial=1)), float(predicted.max(initial=1)))
    x_edges = np.geomspace(1e-3, top * 1.2, 61)
    exact = np.arange(-0.5, min(top, 9) + 1)  # a row for each small count, then rows that widen
    y_edges = np.concatenate([exact, np.unique(np.round(np.geomspace(10, max(top, 10), 16)[1:])) + 0.5])
    density, _, _ = np.histogram2d(predicted, true, bins=[x_edges, y_edges])
    mesh = axes.pcolormesh(
        x_edges,
        np.log1p(np.maximum(y_edges, -0.4)),
        np.ma.masked_equal(density.T, 0),
        norm=LogNorm(vmin=1, vmax=max(density.max(), 2)),
        cmap="viridis",
        rasterized=True,
    )
    axes.figure.colorbar(mesh, ax=axes, label="entries", shrink=0.85)
    bins = np.digitize(predicted, x_edges) - 1
    enough = np.bincount(bins, minlength=60)[:60] >= 20
    if enough.any():
        totals = np.bincount(bins, true, minlength=60)[:60]
        level = np.bincount(bins, predicted, minlength=60)[:60]
        n = np.bincount(bins, minlength=60)[:60]
        axes.plot(
            level[enough] / n[enough], np.log1p(totals[enough] / n[enough]), color=GENERATED, label="mean true count"
        )
    line = np.geomspace(1e-3, top, 200)
    axes.plot(line, np.log1p(line), color="black", linestyle="--", linewidth=1, label="predicted = true")
    ticks = [t for t in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if t <= top]
    axes.set_yticks(np.log1p(ticks), [str(t) for t in ticks])
    axes.set_xscale("log")
    axes.legend(loc="upper left")


def calibration(axes: Axes, cdf_below: np.ndarray, cdf: np.ndarray) -> None:
    """Where true values fall in the predicted distributions; flat when the odds are honest."""
    _label(axes, "Calibration", "predicted probability below the true count", "density of hidden entries")
    density = calibration_histogram(cdf_below, cdf)
    axes.stairs(density, np.linspace(0, 1, len(density) + 1), fill=True, color=MODEL, alpha=0.75)
    axes.axhline(1, color="black", linestyle="--", linewidth=1, label="honest odds")
    axes.set_ylim(0, max(1.5, density.max() * 1.1))
    axes.legend(loc="lower center")


def coverage(axes: Axes, cdf_below: np.ndarray, cdf: np.ndarray) -> None:
    """Share of true counts inside central intervals against the probability that the model gives them."""
    _label(axes, "Interval coverage", "stated probability of the interval", "share of true counts inside")
    levels = np.linspace(0.02, 0.98, 33)
    axes.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="honest odds")
    axes.plot(levels, [interval_coverage(cdf_below, cdf, level) for level in levels], color=MODEL, label="sedd")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left")


def gene_scatter(axes: Axes, real: Any, generated: Any, moment: str) -> None:
    """One dot a gene: `mean`, `variance` or `zero_fraction` in real against generated cells."""
    name, unit = {"mean": ("mean", " count"), "variance": ("variance", ", counts²"), "zero_fraction": ("zeros", "")}[
        moment
    ]
    title = {"mean": "Gene means", "variance": "Gene variances", "zero_fraction": "Share of zeros"}[moment]
    label = "share of cells without the gene" if moment == "zero_fraction" else f"{name}{unit}"
    _label(axes, title, f"{label}, real", f"{label}, generated")
    x, y = gene_moments(real)[moment], gene_moments(generated)[moment]
    rank = float(spearmanr(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else float("nan")
    if moment != "zero_fraction":
        floor = 0.5 / max(real.shape[0], generated.shape[0])  # a gene never seen sits on the edge, not off the page
        x, y = np.maximum(x, floor), np.maximum(y, floor)
        axes.set(xscale="log", yscale="log")
    axes.scatter(x, y, s=6, color=MODEL, alpha=0.35, linewidths=0, rasterized=len(x) > 500)
    span = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(span, span, color="black", linestyle="--", linewidth=1)
    if moment == "zero_fraction":
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.text(0.04, 0.95, f"{len(x):,} genes\nSpearman {rank:.3f}", transform=axes.transAxes, va="top", fontsize=8)
    axes.set_aspect("equal", adjustable="box" if moment == "zero_fraction" else "datalim")


def library_sizes(axes: Axes, real: Any, generated: Any) -> None:
    """Histograms of the cells' totals."""
    _label(axes, "Library sizes", "counts per cell (panel genes)", "share of cells")
    totals = [np.asarray(sparse.csr_array(x).sum(axis=1), dtype=np.float64).ravel() for x in (real, generated)]
    low = max(min(t[t > 0].min(initial=np.inf) for t in totals), 1.0)
    high = max(max(t.max() for t in totals), low * 2) * 1.01
    edges = np.geomspace(low if math.isfinite(low) else 1.0, high, 33)
    for total, color, name in zip(totals, (REAL, GENERATED), ("real", "generated"), strict=True):
        share = np.histogram(np.clip(total, edges[0], edges[-1]), edges)[0] / len(total)
        axes.stairs(share, edges, color=color, linewidth=1.6, label=name)
        axes.stairs(share, edges, color=color, fill=True, alpha=0.18)
    axes.set_xscale("log")
    # Totals often span less than a decade, where a log axis has a single power of ten to label: choose round numbers.
    ticks = [t for e in range(8) for t in (10**e, 2 * 10**e, 5 * 10**e) if edges[0] <= t <= edges[-1]]
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.legend()


def _sample(n: int, limit: int, seed: int = 0) -> np.ndarray:
    return np.arange(n) if n <= limit else np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))


def coordinates(real: Any, generated: Any, reference: Any | None, umap: bool) -> tuple[str, np.ndarray, np.ndarray]:
    """Two coordinates of each real and generated cell: principal components, or a UMAP of both together.

    Placed on a map of real cells alone every generated cell would get a place among real ones, however unlike them it is.

    Parameters
    ----------
    real, generated : (n, n_vars) and (m, n_vars) counts
    reference : (k, n_vars) counts, optional
        Cells that the components are fitted on; default: the real ones.
    umap : bool
        Needs `umap-learn` (`umap_is_installed`).

    Returns
    -------
    kind, real_xy, generated_xy : `PCA` or `UMAP` and the coordinates
    """
    pca = fit_pca(real if reference is None else reference, 50 if umap else 2)
    a, b = pca.transform(log_cp10k(real)), pca.transform(log_cp10k(generated))
    if not umap:
        return "PCA", a, b
    from umap import UMAP

    n_neighbors = min(15, len(a) + len(b) - 1)
    at = np.asarray(UMAP(n_neighbors=n_neighbors, random_state=0, n_jobs=1).fit_transform(np.concatenate([a, b])))
    return "UMAP", at[: len(a)], at[len(a) :]


def umap_is_installed() -> bool:
    """Whether the package umap-learn is there."""
    return importlib.util.find_spec("umap") is not None


def cell_map(
    axes: Axes, kind: str, real: np.ndarray, generated: np.ndarray, labels: np.ndarray | None = None, which: str = "both"
) -> None:
    """Real and generated cells in the same two coordinates; by label when `which` is `real` or `generated`."""
    axis = "PC" if kind == "PCA" else "UMAP "
    _label(axes, f"{kind}: real and generated", f"{axis}1", f"{axis}2")
    everything = np.concatenate([real, generated])
    if labels is None:
        for xy, color, name in ((real, REAL, "real"), (generated, GENERATED, "generated")):
            axes.scatter(xy[:, 0], xy[:, 1], s=7, color=color, alpha=0.45, linewidths=0, label=name, rasterized=True)
    else:
        axes.set_title(f"{kind}: {which} cells by label")
        xy = real if which == "real" else generated
        labels = np.where(np.isin(labels, ["nan", "None", ""]), "no label", labels)
        names, n = np.unique(labels, return_counts=True)
        for i, name in enumerate(names[np.argsort(-n)]):
            color = CYCLE[i] if i < len(CYCLE) else MUTED
            label = str(name) if i < len(CYCLE) else ("other" if i == len(CYCLE) else None)
            x, y = xy[labels == name].T
            axes.scatter(x, y, s=7, color=color, alpha=0.6, linewidths=0, label=label, rasterized=True)
    pad = 0.05 * np.ptp(everything, axis=0)
    axes.set_xlim(everything[:, 0].min() - pad[0], everything[:, 0].max() + pad[0])
    axes.set_ylim(everything[:, 1].min() - pad[1], everything[:, 1].max() + pad[1])
    axes.set(xticks=[], yticks=[])
    axes.legend(markerscale=2, loc="best", handletextpad=0.2, borderpad=0.2)


def step_points(steps: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, float | None]:
    """Return (k, 2) numbers of sampling steps and a metric at these, by steps, and the metric of real cells (0 steps) if there is one."""
    rows = sorted((row["steps"], row[metric]) for row in steps if row.get(metric) is not None)
    return np.array([row for row in rows if row[0]], np.float64).reshape(-1, 2), next((value for n, value in rows if n == 0), None)


def steps_against_quality(axes: Axes, steps: Sequence[Mapping[str, Any]], metric: str, title: str) -> None:
    """Draw a generation metric against the number of sampling steps, real cells as a line."""
    points, real = step_points(steps, metric)
    _label(axes, "Sampling steps", "steps", title)
    if real is not None:
        axes.axhline(real, color="black", linestyle="--", linewidth=1, label="real cells")
        axes.legend()
    axes.plot(*points.T, color=MODEL, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(points[:, 0], [f"{int(s)}" for s in points[:, 0]])
    axes.minorticks_off()


def subsample(counts: Any, labels: np.ndarray | None = None) -> tuple[Any, np.ndarray | None]:
    """At most `MAX_POINTS` cells (and their labels), the same ones each time."""
    csr = sparse.csr_array(counts)
    keep = _sample(csr.shape[0], MAX_POINTS)
    return csr[keep], None if labels is None else np.asarray(labels)[keep]
