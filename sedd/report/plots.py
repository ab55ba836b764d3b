"""Which figures there are of a model, in their order: for the page and for a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sedd.errors import UserError
from sedd.metrics.table import METRICS, better_text
from sedd.report.figures import (
    calibration,
    cell_map,
    coordinates,
    coverage,
    gene_scatter,
    library_sizes,
    predicted_against_true,
    series,
    step_points,
    steps_against_quality,
    subsample,
    training_loss,
    umap_is_installed,
    validation_nelbo,
)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything that a report shows; what is missing is left out of the page.

    Attributes
    ----------
    title : str
        Heading of the page.
    history : list of dict
        One per epoch: `epoch`, `train_loss` (nats per cell), `val_nelbo` (nats per cell), `cells_per_s`, `wait_share`.
    metrics : {section: {metric: {"sedd": value, "ci": (low, high), "baselines": {name: value}, "anchors": ...}}}
        Sections and metrics are named in `sedd.metrics.SECTIONS` and `METRICS`; others are shown under their key.
    settings : dict
        What was run; a nested dict becomes a group with its key as heading.
    hidden_true, hidden_mean : (k,) arrays, optional
        True count and predicted mean of the hidden entries.
    hidden_cdf_below, hidden_cdf : (k,) arrays, optional
        Predicted `P(X < true)` and `P(X <= true)` of the same entries.
    real, generated : (n, n_vars) and (m, n_vars) counts, dense or sparse, optional
        Held-out cells and generated ones.
    reference : (k, n_vars) counts, optional
        Training cells, which the principal components are fitted on.
    real_labels, generated_labels : (n,) and (m,) str arrays, optional
    steps : list of dict
        `steps` and any generation metrics, one per number of sampling steps tried; 0 steps are real cells.
    notes : list of str
        Sentences that a reader should see first, such as a warning.
    """

    title: str = "A diffusion model of your cells"
    history: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    hidden_true: np.ndarray | None = None
    hidden_mean: np.ndarray | None = None
    hidden_cdf_below: np.ndarray | None = None
    hidden_cdf: np.ndarray | None = None
    real: Any | None = None
    generated: Any | None = None
    reference: Any | None = None
    real_labels: np.ndarray | None = None
    generated_labels: np.ndarray | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for first, second in (("hidden_true", "hidden_mean"), ("hidden_cdf_below", "hidden_cdf")):
            a, b = getattr(self, first), getattr(self, second)
            if (a is None) != (b is None) or (a is not None and b is not None and len(a) != len(b)):
                raise UserError(f"{first} and {second} belong together: give both, of the same length, or neither.")
        if self.real is not None and self.generated is not None and self.real.shape[1] != self.generated.shape[1]:
            found = f"{self.real.shape[1]} and {self.generated.shape[1]}"
            raise UserError(f"real and generated cells have {found} genes; give the same genes in the same order.")


@dataclass(frozen=True)
class Plot:
    """A figure to be: its name, section, caption, and what draws it into axes."""

    name: str
    section: str
    caption: str
    draw: Callable[[Axes], None]


def plots(data: ReportData, *, umap: bool) -> Iterator[Plot]:
    """Give each figure that there are data for, in the order of the page; nothing is computed before it is drawn.

    Parameters
    ----------
    data : ReportData
    umap : bool
        A UMAP beside the principal components, where the package `umap-learn` is installed.
    """
    baselines = data.metrics.get("likelihood", {}).get("nats_per_cell", {}).get("baselines", {})
    if len(series(data.history, "train_loss")[0]):
        yield Plot(
            "training_loss",
            "likelihood",
            "The loss that training lowers. It is noisy, because each cell is hidden to a random degree.",
            partial(training_loss, history=data.history),
        )
    if len(series(data.history, "val_nelbo")[0]):
        yield Plot(
            "validation_nelbo",
            "likelihood",
            "How surprising cells are that the model has never seen; lower is better. The dashed lines know each gene's own "
            "distribution and nothing of the other genes, so what lies below them is learned from genes going together.",
            partial(validation_nelbo, history=data.history, baselines=baselines),
        )
    if data.hidden_true is not None and data.hidden_mean is not None:
        yield Plot(
            "predicted_against_true",
            "imputation",
            "Each hidden entry by the mean that was predicted for it and the count it had. The orange line, the average "
            "of the true counts, follows the dashed one when predictions are right on average.",
            partial(predicted_against_true, true=data.hidden_true, predicted=data.hidden_mean),
        )
    if data.hidden_cdf_below is not None and data.hidden_cdf is not None:
        yield Plot(
            "calibration",
            "imputation",
            "Flat at 1 when the stated odds are honest; a hump means too cautious, a bowl too sure.",
            partial(calibration, cdf_below=data.hidden_cdf_below, cdf=data.hidden_cdf),
        )
        yield Plot(
            "coverage",
            "imputation",
            "Of intervals that should hold half of the true counts, half should: the blue line on the dashed one.",
            partial(coverage, cdf_below=data.hidden_cdf_below, cdf=data.hidden_cdf),
        )
    if data.real is not None and data.generated is not None:
        yield from _plots_of_generated(data, umap)
    for metric in ("w2", "mmd2", "auc"):
        info = METRICS[metric]
        title = f"{info.title} ({better_text(metric)})" if isinstance(info.better, float) else info.title
        if len(step_points(data.steps, metric)[0]):
            yield Plot(
                f"steps_{metric}",
                "generation",
                "More steps unmask fewer genes at a time and so respect more of how genes go together. The dashed line is what "
                "real cells get.",
                partial(steps_against_quality, steps=data.steps, metric=metric, title=title),
            )


def _plots_of_generated(data: ReportData, umap: bool) -> Iterator[Plot]:
    section = "generation"
    real, real_labels = subsample(data.real, data.real_labels)
    fake, fake_labels = subsample(data.generated, data.generated_labels)
    reference = None if data.reference is None else subsample(data.reference)[0]
    for moment, caption in (
        ("mean", "One dot a gene: its average in real cells and in generated ones. On the line is right."),
        ("variance", "The spread of each gene over cells, real and generated."),
        ("zero_fraction", "The share of cells in which a gene is silent, real and generated."),
    ):
        yield Plot(f"gene_{moment}", section, caption, partial(gene_scatter, real=real, generated=fake, moment=moment))
    yield Plot(
        "library_sizes",
        section,
        "Total counts of a cell over the genes of the model. Both histograms should have the same shape.",
        partial(library_sizes, real=real, generated=fake),
    )
    fitted = "real cells" if reference is None else "training cells"
    with_umap = umap and umap_is_installed()
    hint = "" if with_umap or not umap else " For a UMAP beside it: pip install umap-learn."

    @cache  # one map, of which up to three figures are drawn
    def where(umap: bool) -> tuple[str, np.ndarray, np.ndarray]:
        return coordinates(real, fake, reference, umap)

    yield Plot(
        "cells",
        section,
        f"Every dot is a cell, in the two principal components of {fitted}. Generated cells should lie where real ones do, as "
        f"densely.{hint}",
        lambda axes: cell_map(axes, *where(False)),
    )
    if with_umap:
        yield Plot(
            "cells_umap",
            section,
            f"A UMAP of real and generated cells together, from 50 principal components of {fitted}. Generated cells of a kind "
            "that does not exist would form islands of their own; real ones without company are a kind that is never generated.",
            lambda axes: cell_map(axes, *where(True)),
        )
    for which, labels in (("real", real_labels), ("generated", fake_labels)):
        if labels is not None:
            yield Plot(
                f"cells_{which}_labels",
                section,
                f"The {which} cells of the same map, coloured by their label.",
                lambda axes, labels=labels, which=which: cell_map(axes, *where(with_umap), labels, which),  # type: ignore[misc]
            )
