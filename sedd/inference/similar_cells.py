"""What similar cells say of a cell's rates: their predictions, and their counts, by how probable they make the counts of the cell.

The other genes of a cell say what state it is in, and the fewer molecules it has, the less of it. Cells in the same state say more, so a
prediction is averaged with those of other cells. How much each weighs is a matter of likelihood: a shallow cell is as probable under many of them and
is averaged over many, a deep one over few, and one that no other resembles keeps what its own genes say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedd.inference.cells import Cells
from sedd.inference.own_share import LEAST, Sample, look, nearest, shares
from sedd.inference.posterior import TaskBatch, cross_predict_both
from sedd.inference.pretrained import Pretrained

SHARPNESS = (0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
PRIOR = (100.0, 300.0, 1000.0, 3000.0)
"""What the two settings are chosen among."""
_LEAST = 1e-12


class SimilarCells:
    """Cells that others are compared with.

    Parameters
    ----------
    cells : (m,) int64
        Their numbers in the data, sorted: no cell is similar to itself.
    known : (n_vars,) bool
        Genes that the data have; only these are compared.
    rates, counts : (m, n_vars) float32
        What is predicted, and what was counted.
    sharpness
        Power of the likelihood: below 1, since counts vary by more than Poisson's law says.
    prior
        How many molecules of a gene similar cells are to have before their counts say as much of its rate as their predictions do; None
        if their counts say nothing.
    """

    def __init__(self, cells: np.ndarray, known: Tensor, rates: Tensor, counts: Tensor, sharpness: float, prior: float | None = None) -> None:
        self.cells, self.known, self.rates, self.counts = cells, known, rates, counts
        self.sharpness, self.prior = sharpness, prior
        logs = self._log_shares(rates)
        self._usual = logs.mean(0)
        self._logs = logs.sub_(self._usual).mul_(known)  # relative to the usual profile they are small enough for float32

    @classmethod
    def learned(cls, sample: Sample, known: np.ndarray, device: torch.device) -> SimilarCells:
        """Return the cells of a sample, averaged among themselves, with the settings that make the counts of similar cells most probable.

        Half of the cells are compared with the other half. What a cell is given should fit the counts of those nearest to it, in which
        the errors of its own measurement are not (see `sedd.inference.own_share`).
        """
        rates, counts, here = (torch.from_numpy(array).to(device) for array in (sample.others, sample.counts, known))
        asked = np.arange(1, len(rates), 2)
        near = asked[nearest(sample.place[asked])][::2]
        asked = asked[::2]
        seen = counts[torch.from_numpy(near).to(device)].sum(1) * here
        at = torch.from_numpy(asked).to(device)
        fits = {}
        for sharpness in SHARPNESS:
            half = cls(sample.cells[::2], here, rates[::2], counts[::2], sharpness)._averaged()
            among = half._among(counts[at], rates[at], sample.cells[asked])
            for prior in PRIOR:
                logs = half._log_shares(half._rates(among, rates[at], prior))
                fits[sharpness, prior] = float((seen * logs).sum(dtype=torch.float64))
        sharpness, prior = max(fits, key=lambda settings: fits[settings])
        return cls(sample.cells, here, rates, counts, sharpness, prior)._averaged()

    def moved(self, counts: np.ndarray, rates: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Return the rates of some cells, (B, n_vars) float64, averaged with those of similar cells; each cell keeps its total.

        Parameters
        ----------
        counts, rates : (B, n_vars)
            What was counted, and what the other genes predict.
        cells : (B,)
            Their numbers in the data.
        """
        seen, own = (torch.from_numpy(np.asarray(array, np.float32)).to(self.rates.device) for array in (counts, rates))
        return np.asarray(self._rates(self._among(seen, own, cells), own, self.prior).double().cpu().numpy())

    def _averaged(self) -> SimilarCells:
        """Return the same cells, each averaged with the others."""
        rates = self._rates(self._among(self.counts, self.rates, self.cells), self.rates, None)
        return SimilarCells(self.cells, self.known, rates, self.counts, self.sharpness, self.prior)

    def _among(self, counts: Tensor, own: Tensor, cells: np.ndarray) -> tuple[Tensor, ...]:
        """Weighted means of rates, of the other cells and with the cell itself; of counts of the others; and of how many cells they are."""
        fit = counts @ self._logs.T
        at = np.minimum(np.searchsorted(self.cells, cells), len(self.cells) - 1)
        itself = np.flatnonzero(self.cells[at] == cells)
        fit[torch.from_numpy(itself), torch.from_numpy(at[itself])] = -torch.inf
        logs = self._log_shares(own).sub_(self._usual).mul_(self.known)
        fit_own = (counts * logs).sum(1, keepdim=True)
        weight = torch.softmax(torch.cat([fit, fit_own], 1) * self.sharpness, 1)
        others = weight[:, :-1] @ self.rates
        return others, others + weight[:, -1:] * own, weight[:, :-1] @ self.counts, 1 / weight.square().sum(1, keepdim=True)

    def _rates(self, among: tuple[Tensor, ...], own: Tensor, prior: float | None) -> Tensor:
        others, found, counts, n = among
        if prior is not None:  # a missing gene has no counts
            found = found * ((n * counts + prior) / (n * others + prior)).where(self.known, 1.0)
        return found * ((own * self.known).sum(1, keepdim=True) / (found * self.known).sum(1, keepdim=True).clamp_min(_LEAST))

    def _log_shares(self, rates: Tensor) -> Tensor:
        total = (rates * self.known).sum(1, keepdim=True).clamp_min(_LEAST)
        return (rates / total).clamp_min(_LEAST).log()


Moved = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def learn(
    model: Pretrained, chosen: Cells, labels: Collection[str] | None, arguments: Mapping[str, Any]
) -> tuple[np.ndarray, Moved | None, dict[str, Any]]:
    """Return how much own counts say, what similar cells do if they are asked for, and what a result records of both.

    Parameters
    ----------
    labels
        As in `sedd.inference.posterior.batches`.
    arguments
        Of the task.
    """

    def predict(here: TaskBatch) -> tuple[np.ndarray, np.ndarray]:
        return cross_predict_both(model, here, arguments["folds"], arguments["seed"])

    sample = look(model, chosen, predict, batch_size=arguments["batch_size"], progress=arguments["progress"], labels=labels)
    if sample is None:
        share = np.full(len(model.genes), LEAST)
        return share, None, {"own_share": share.astype(np.float32), "similar_cells": "none"}
    share = shares(sample.counts, sample.others, sample.own, sample.place)
    facts: dict[str, Any] = {"own_share": share.astype(np.float32)}
    if arguments["similar_cells"] == "none":
        return share, None, facts
    similar = SimilarCells.learned(sample, ~chosen.missing_in_some, model.device)
    return share, similar.moved, {**facts, "similar_cells_sharpness": similar.sharpness, "similar_cells_prior": similar.prior}
