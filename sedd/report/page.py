"""One self-contained HTML page that says how good a model is, for a reader who knows cells rather than diffusion."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from sedd.errors import UserError
from sedd.io.files import new_file
from sedd.metrics.table import METRICS, SECTIONS, better_text, reading, section_reading
from sedd.report.figures import (
    calibration,
    cell_map,
    coordinates,
    coverage,
    gene_scatter,
    library_sizes,
    predicted_against_true,
    steps_against_quality,
    style,
    subsample,
    training_loss,
    umap_is_installed,
    validation_nelbo,
)
from sedd.report.tables import headlines, section_table, settings_groups


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
class _Plot:
    """A figure to be: its file name, section, caption, and how to draw it."""

    name: str
    section: str
    caption: str
    draw: Callable[[], Figure | None]


def _plots(data: ReportData, umap: bool) -> Iterator[_Plot]:
    baselines = data.metrics.get("likelihood", {}).get("nats_per_cell", {}).get("baselines", {})
    learning = "likelihood"
    yield _Plot(
        "training_loss",
        learning,
        "The loss that training lowers. It is noisy, because each cell is hidden to a random degree.",
        lambda: training_loss(data.history),
    )
    yield _Plot(
        "validation_nelbo",
        learning,
        "How surprising cells are that the model has never seen; lower is better. The dashed lines know each gene's own "
        "distribution and nothing of the other genes, so what lies below them is learned from genes going together.",
        lambda: validation_nelbo(data.history, baselines),
    )
    if data.hidden_true is not None and data.hidden_mean is not None:
        true, mean = data.hidden_true, data.hidden_mean
        yield _Plot(
            "predicted_against_true",
            "imputation",
            "Each hidden entry by the mean that was predicted for it and the count it had. The orange line, the average "
            "of the true counts, follows the dashed one when predictions are right on average.",
            lambda: predicted_against_true(true, mean),
        )
    if data.hidden_cdf_below is not None and data.hidden_cdf is not None:
        below, upto = data.hidden_cdf_below, data.hidden_cdf
        yield _Plot(
            "calibration",
            "imputation",
            "Flat at 1 when the stated odds are honest; a hump means too cautious, a bowl too sure.",
            lambda: calibration(below, upto),
        )
        yield _Plot(
            "coverage",
            "imputation",
            "Of intervals that should hold half of the true counts, half should: the blue line on the dashed one.",
            lambda: coverage(below, upto),
        )
    if data.real is not None and data.generated is not None:
        yield from _generation_plots(data, umap)
    for metric in ("w2", "mmd2", "auc"):
        info = METRICS[metric]
        title = f"{info.title} ({better_text(metric)})" if isinstance(info.better, float) else info.title
        yield _Plot(
            f"steps_{metric}",
            "generation",
            "More steps unmask fewer genes at a time and so respect more of how genes go together. The dashed line is what real "
            "cells get.",
            lambda metric=metric, title=title: steps_against_quality(data.steps, metric, title),  # type: ignore[misc]
        )


def _generation_plots(data: ReportData, umap: bool) -> Iterator[_Plot]:
    section = "generation"
    real, real_labels = subsample(data.real, data.real_labels)
    fake, fake_labels = subsample(data.generated, data.generated_labels)
    reference = None if data.reference is None else subsample(data.reference)[0]
    for moment, caption in (
        ("mean", "One dot a gene: its average in real cells and in generated ones. On the line is right."),
        ("variance", "The spread of each gene over cells, real and generated."),
        ("zero_fraction", "The share of cells in which a gene is silent, real and generated."),
    ):
        yield _Plot(f"gene_{moment}", section, caption, lambda m=moment: gene_scatter(real, fake, m))  # type: ignore[misc]
    yield _Plot(
        "library_sizes",
        section,
        "Total counts of a cell over the genes of the model. Both histograms should have the same shape.",
        lambda: library_sizes(real, fake),
    )
    fitted = "real cells" if reference is None else "training cells"
    with_umap = umap and umap_is_installed()
    hint = "" if with_umap or not umap else " For a UMAP beside it: pip install umap-learn."
    kind, real_xy, fake_xy = coordinates(real, fake, reference, False)
    yield _Plot(
        "cells",
        section,
        f"Every dot is a cell, in the two principal components of {fitted}. Generated cells should lie where real ones do, as "
        f"densely.{hint}",
        lambda at=(kind, real_xy, fake_xy): cell_map(*at),  # type: ignore[misc]
    )
    if with_umap:
        kind, real_xy, fake_xy = coordinates(real, fake, reference, True)
        yield _Plot(
            "cells_umap",
            section,
            f"A UMAP of real and generated cells together, from 50 principal components of {fitted}. Generated cells of a kind "
            "that does not exist would form islands of their own; real ones without company are a kind that is never generated.",
            lambda at=(kind, real_xy, fake_xy): cell_map(*at),  # type: ignore[misc]
        )
    for which, labels in (("real", real_labels), ("generated", fake_labels)):
        if labels is not None:
            yield _Plot(
                f"cells_{which}_labels",
                section,
                f"The {which} cells of the same map, coloured by their label.",
                lambda w=which, names=labels: cell_map(kind, real_xy, fake_xy, names, w),  # type: ignore[misc]
            )


def write_report(path: str | os.PathLike[str], data: ReportData, *, umap: bool = True) -> Path:
    """Write the page and its figures.

    Parameters
    ----------
    path : path
        The page (`*.html`), or a directory, which then gets `report.html`. Figures go to `figures/` beside the page,
        as SVG; the page itself holds them inline and needs no other file.
    data : ReportData
    umap : bool
        Draw a UMAP beside the principal components, where the package `umap-learn` is installed.

    Returns
    -------
    page : Path
    """
    page = Path(path)
    if page.suffix.lower() != ".html":
        page = page / "report.html"
    folder = page.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    gallery: dict[str, list[dict[str, str]]] = {}
    with style():
        for plot in _plots(data, umap):
            figure = plot.draw()
            if figure is not None:
                svg = base64.b64encode(_save(figure, folder / f"{plot.name}.svg")).decode()
                gallery.setdefault(plot.section, []).append({"name": plot.name, "caption": plot.caption, "svg": svg})
    html = _page(data, gallery).encode()
    with new_file(page) as file:
        file.write(html)
    return page


def _save(figure: Figure, path: Path) -> bytes:
    with new_file(path) as file:
        figure.savefig(file, format="svg", dpi=200, metadata={"Date": None})
    return path.read_bytes()


def summary(data: ReportData) -> str:
    """One paragraph of plain sentences: what was trained and what came out of it.

    Parameters
    ----------
    data : ReportData

    Returns
    -------
    text : str
    """
    sentences = []
    if data.history:
        n = len(data.history)
        rates = [row["cells_per_s"] for row in data.history if row.get("cells_per_s")]
        waits = [row["wait_share"] for row in data.history if row.get("wait_share") is not None]
        speed = f" at {np.median(rates):,.0f} cells per second" if rates else ""
        wait = f", {100 * float(np.median(waits)):.0f} % of the time waiting for data" if waits else ""
        sentences.append(f"The model was trained for {n} epoch{'s' if n != 1 else ''}{speed}{wait}.")
    row = data.metrics.get("likelihood", {}).get("nats_per_cell")
    if row and _is_number(row.get("sedd")) and row.get("baselines"):
        ours, (name, best) = row["sedd"], min(row["baselines"].items(), key=lambda item: item[1])
        verdict = f"{best - ours:.0f} fewer than" if ours < best else f"{ours - best:.0f} more than"
        sentences.append(
            f"A cell that it has never seen costs it {ours:.0f} nats, {verdict} the best baseline that takes genes one by "
            f"one ({name}, {best:.0f})"
            + ("." if ours < best else ": it has not yet learned from genes going together.")
        )
    row = data.metrics.get("imputation", {}).get("nll")
    if row and _is_number(row.get("sedd")):
        sentences.append(f"On genes hidden from it, {_lower_first(reading('nll', row))}")
    row = data.metrics.get("generation", {}).get("auc")
    if row and _is_number(row.get("sedd")):
        real = row.get("anchors", {}).get("real cells")
        beside = f" (for real cells it is {real:.2f})" if _is_number(real) else ""
        sentences.append(
            f"A random forest tells its generated cells from real ones with an AUC of {row['sedd']:.2f}{beside}, where 0.5 "
            "means that it cannot."
        )
    return " ".join(sentences) or "No results were given to this report beyond what is listed below."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:] if not text.startswith("sedd") else text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _page(data: ReportData, gallery: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    sections = [
        {
            "name": name,
            "title": SECTIONS.get(name, name),
            "reading": section_reading(name, data.metrics.get(name, {})),
            "figures": gallery.get(name),
            "table": section_table(data.metrics.get(name, {})),
        }
        for name in [*SECTIONS, *(name for name in data.metrics if name not in SECTIONS)]
        if data.metrics.get(name) or name in gallery
    ]
    return environment.get_template("page.html.jinja").render(
        title=data.title,
        lead=summary(data),
        notes=data.notes,
        headlines=headlines(data.metrics),
        sections=sections,
        settings=settings_groups(data.settings),
    )
