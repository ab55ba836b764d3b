"""How much of what an entry's own count says of its rate is believed: learned from cells that are alike.

A count differs from what the other genes of its cell predict for three reasons: it is a small number, the cell differs from cells that
are otherwise like it, or its measurement does. Molecules of one cell cannot tell the last two apart, since they were measured together:
half of them predicts the other half, error of the measurement included. Other cells can. Where a gene is higher than predicted in a cell, is
it in the most similar cells as well? The share of the update by the own count that makes their counts most probable is what is kept of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

from sedd.inference.cells import Cells
from sedd.inference.posterior import TaskBatch, batches
from sedd.inference.pretrained import Pretrained

MIN_CELLS, MAX_CELLS = 100, 1000
"""Of fewer cells nothing is learned; of more, as many that are evenly spaced are looked at."""
NEIGHBOURS = 5
LEAST = 0.1
"""Similar cells are not the same cell, so what they confirm is rather too little than too much."""
GRID = np.linspace(0, 1, 21)


@dataclass(frozen=True)
class Sample:
    """What is looked at before cells are denoised.

    Attributes
    ----------
    cells : (n,) int64
        Their numbers in the data, sorted.
    counts, others, own : (n, n_vars) float32
        Counts; what the other genes predict; what they and the own count do.
    place : (n, dim) float32
        Where the cells are: those near one another are similar.
    """

    cells: np.ndarray
    counts: np.ndarray
    others: np.ndarray
    own: np.ndarray
    place: np.ndarray


def look(
    model: Pretrained,
    chosen: Cells,
    predict: Callable[[TaskBatch], tuple[np.ndarray, np.ndarray]],
    *,
    batch_size: int,
    progress: bool,
    labels: Collection[str] | None,
) -> Sample | None:
    """Return a sample of the cells that are asked for; None of too few.

    Parameters
    ----------
    predict
        Expected counts of a batch, (B, n_vars) each: by the other genes, and also by the own count.
    labels
        As in `sedd.inference.posterior.batches`.
    """
    if len(chosen) < MIN_CELLS:
        return None
    known = copy.copy(chosen)  # the cells that are asked for stay as many
    known.hide(chosen.missing_in_some)
    if len(known) > MAX_CELLS:
        known.keep(np.linspace(0, len(known) - 1, MAX_CELLS).round().astype(np.int64))
    basis = model.model.embedding_basis()
    found: list[tuple[np.ndarray, ...]] = []
    for here in batches(model, known, batch_size, "denoise: how much own counts and similar cells say", progress, labels=labels):
        shown, hidden = here.hide(np.zeros(here.counts.shape, bool), model.binning.n_bins)
        with torch.no_grad():
            place = model.model.embed(shown, model.sigma(hidden), **here.context, basis=basis).float().cpu().numpy()
        others, own = predict(here)
        found.append((here.cells, here.counts, others.astype(np.float32), own.astype(np.float32), place))
    return Sample(*(np.concatenate(part) for part in zip(*found, strict=True)))


def shares(counts: np.ndarray, others: np.ndarray, own: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Share of each gene, (n_vars,) float64 between `LEAST` and 1, under which its counts in the most similar cells are most probable.

    By how many times the own count raises a prediction, so many times, to the share that is kept, those of the most similar cells are
    raised, whose counts are taken as Poisson. A gene is judged with an average gene's worth of what all together say.

    Parameters
    ----------
    counts, others, own : (n_cells, n_vars)
        Counts; what the other genes predict; what they and the own count do.
    place : (n_cells, dim)
        Where the cells are: those near one another are similar.
    """
    near = nearest(place)
    ratio = own / np.maximum(others, 1e-9)
    seen, expected = np.zeros(counts.shape, np.float32), np.zeros(counts.shape, np.float32)
    for k in range(near.shape[1]):
        seen += counts[near[:, k]]
        expected += others[near[:, k]]
    fit = np.empty((len(GRID), counts.shape[1]))
    for row, share in zip(fit, GRID, strict=True):
        raised = 1 - share + share * ratio
        row[:] = (seen * np.log(np.maximum(raised, 1e-9)) - expected * raised).sum(0, dtype=np.float64)
    return np.maximum(GRID[(fit + fit.mean(1, keepdims=True)).argmax(0)], LEAST)


def nearest(place: np.ndarray) -> np.ndarray:
    """Return the numbers of the `NEIGHBOURS` cells nearest to each, (n_cells, k)."""
    place = place.astype(np.float64)
    square = (place**2).sum(1)
    distance = square[:, None] + square - 2 * place @ place.T
    np.fill_diagonal(distance, np.inf)
    k = min(NEIGHBOURS, len(place) - 1)
    return np.argpartition(distance, k - 1, axis=1)[:, :k]
