"""Figures for a notebook: those of the report, as axes of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from sedd.errors import UserError
from sedd.evaluation import Evaluation, evaluate
from sedd.inference.applying import Data
from sedd.inference.pretrained import Pretrained
from sedd.report.figures import SIZE, style
from sedd.report.plots import plots

__all__ = ["report"]


def report(
    model: Pretrained | str | Path | Evaluation,
    data: Data | None = None,
    *,
    only: str | Sequence[str] = (),
    columns: int = 3,
    umap: bool = True,
    **settings: Any,
) -> dict[str, Axes]:
    """Draw the figures of the report page, side by side in one figure of matplotlib.

    Parameters
    ----------
    model
        A checkpoint, the directory of a run or a loaded model, which is evaluated on the `data` first. Or what `sedd.evaluate` returned:
        that is drawn, and nothing is measured again.
    data
        As in `sedd.evaluate`. None with an `Evaluation`.
    only
        Names of the figures to draw, such as "library_sizes" or ["gene_mean", "cells"]; all that there are if none is named. In the order of
        the page: training_loss, validation_nelbo, predicted_against_true, calibration, coverage, gene_mean, gene_variance,
        gene_zero_fraction, library_sizes, cells, cells_umap, cells_real_labels, cells_generated_labels, steps_w2, steps_mmd2, steps_auc.
    columns
        Figures in a row; each is 4.4 inches wide and 3.5 high.
    umap
        Draw a UMAP as well, where `umap-learn` is installed; it takes ten seconds or more.
    **settings
        Of the evaluation, as in `sedd.evaluate`: `cells`, `layer`, `hide`, `steps`, `output`, ...

    Returns
    -------
    axes : dict of str -> matplotlib.axes.Axes
        Of each figure by its name, to be changed further; `next(iter(axes.values())).figure.savefig("report.pdf")` saves them.

    Raises
    ------
    UserError
        On bad input, or if `only` names a figure that this report does not have: those of labels need a model trained with `condition`,
        those of hidden genes one that was trained with the absorbing graph.

    Examples
    --------
    >>> axes = sedd.pl.report(model, adata)  # doctest: +SKIP
    >>> found = sedd.evaluate(model, adata)  # doctest: +SKIP
    >>> sedd.pl.report(found, only=["validation_nelbo", "gene_mean"], columns=2)  # doctest: +SKIP
    """
    if columns < 1:
        raise UserError(f"columns is {columns}; expected at least 1.")
    if isinstance(model, Evaluation):
        if data is not None or settings:
            given = "data" if data is not None else next(iter(settings))
            raise UserError(f"{given} was given beside an Evaluation, which is drawn without measuring anew; leave it out, or give the model in place of it.")
        found = model
    elif data is None:
        raise UserError("there are no data to evaluate the model on; expected sedd.pl.report(model, adata), or what sedd.evaluate returned.")
    else:
        found = evaluate(model, data, umap=umap, **settings)
    there = {plot.name: plot for plot in plots(found.shown, umap=umap)}
    names = [only] if isinstance(only, str) else list(only) or list(there)
    for name in names:
        if name not in there:
            raise UserError(f"only: this report has no figure {name!r}; it has: {', '.join(there)}.")
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    with style():
        figure = plt.figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
        drawn = {name: figure.add_subplot(rows, columns, place) for place, name in enumerate(names, 1)}
        for name, axes in drawn.items():
            there[name].draw(axes)
    return drawn
