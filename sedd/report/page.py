"""One self-contained HTML page that says how good a model is, for a reader who knows cells rather than diffusion."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from sedd.io.files import new_file
from sedd.metrics.table import SECTIONS, format_value, metric_label, reading, section_reading
from sedd.report.figures import SIZE, style
from sedd.report.plots import ReportData, plots
from sedd.report.tables import better, glance_rows, section_table, setting_text, settings_groups


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
    figures: dict[str, list[dict[str, str]]] = {}
    with style():
        for plot in plots(data, umap=umap):
            figure = Figure(figsize=SIZE, layout="constrained")
            plot.draw(figure.add_subplot())
            svg = _save(figure, folder / f"{plot.name}.svg")
            shown = {"name": plot.name, "caption": plot.caption, "svg": base64.b64encode(svg).decode("ascii")}
            figures.setdefault(plot.section, []).append(shown)
    with new_file(page) as file:
        file.write(_page(data, figures).encode("utf-8"))
    return page


def _save(figure: Figure, path: Path) -> bytes:
    vector = io.BytesIO()
    figure.savefig(vector, format="svg", dpi=200, metadata={"Date": None})
    with new_file(path) as file:
        file.write(vector.getvalue())
    return vector.getvalue()


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


def _page(data: ReportData, figures: Mapping[str, Sequence[dict[str, str]]]) -> str:
    sections = []
    for name in [*SECTIONS, *(name for name in data.metrics if name not in SECTIONS)]:
        rows = data.metrics.get(name, {})
        if rows or name in figures:
            how = section_reading(name, rows)
            found = {"name": name, "title": SECTIONS.get(name, name), "how": how, "figures": figures.get(name, ())}
            sections.append({**found, "table": section_table(rows)})
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pages.filters |= {"value": format_value, "metric_label": metric_label, "better": better, "setting": setting_text}
    return pages.get_template("page.html.jinja").render(
        title=data.title,
        summary=summary(data),
        notes=data.notes,
        glance=glance_rows(data.metrics),
        sections=sections,
        settings=settings_groups(data.settings),
    )
