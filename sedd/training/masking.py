"""What a training step hides: genes, by the loader's threads or on the GPU with the same bits, labels and totals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sedd.config import TrainConfig
from sedd.io.loading.batch import Batch
from sedd.kernels.mask import exact_mask_torch, masked_count, random_mask_torch
from sedd.noise import Noise


@dataclass(frozen=True)
class DeviceMasks:
    """Draws the masks that the loader would have drawn.

    Attributes
    ----------
    objective
        "score_entropy" hides each gene with the mask probability of the cell's time, "masked" exactly
        a share `mask_ratio` of them.
    mask_ratio, noise, seed
        Of the run.
    """

    objective: str
    mask_ratio: float
    noise: Noise
    seed: int

    def of(self, batch: Batch, epoch: int, cells: Tensor) -> Tensor:
        """Masks of a batch, (B, n_vars) bool on the device on which its `cells` are by now."""
        n_vars = batch.tokens.shape[1]
        if self.objective == "masked":
            return exact_mask_torch(self.seed, epoch, cells, n_vars, masked_count(self.mask_ratio, n_vars))
        # Of the few times of a batch, in float64 and on the CPU as the loader does: else one mask in thousands would differ.
        probability = self.noise.mask_probability(batch.t.double())
        if cells.device.type == "cuda":
            probability = probability.pin_memory()  # else the driver may wait for the stream
        return random_mask_torch(self.seed, epoch, cells, n_vars, probability.to(cells.device, non_blocking=True))


def device_masks(config: TrainConfig, device: torch.device, noise: Noise) -> DeviceMasks | None:
    """Return what draws a run's masks beside the network on `device`; None if the loader does, or the graph needs none.

    By itself a run has them drawn on a GPU, where that halves what has to be copied to it. On a CPU the loader's kernel is the
    faster one (`benchmarks/train.py`).
    """
    asked = config.data.masks_on
    if config.model.graph == "uniform" or asked == "loader" or (asked == "auto" and device.type != "cuda"):
        return None
    return DeviceMasks(config.model.objective, config.model.mask_ratio, noise, config.run.seed)


def drop_conditions(condition: Tensor | None, library: Tensor | None, share: float) -> tuple[Tensor | None, Tensor | None]:
    """Hide labels and totals of a random `share` of the cells, so that the model also learns to do without.

    Parameters
    ----------
    condition : (B, n_labels) int64 or None, 0 for unknown
    library : (B,) or None, NaN for unknown
    share
        Of the cells to which both are hidden; each is hidden to the same share of the others as well, as each without the
        other is asked for too.
    """
    if condition is None and library is None:
        return None, None
    some = condition if condition is not None else library
    assert some is not None
    hidden = torch.rand(len(some), device=some.device) < share
    labels, total = hidden, hidden
    if condition is not None and library is not None:
        labels, total = hidden | (torch.rand((2, len(hidden)), device=hidden.device) < share)
    return (
        None if condition is None else condition.masked_fill(labels[:, None], 0),
        None if library is None else library.masked_fill(total, math.nan),
    )


def hide_labels(condition: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """Hide labels of half of the cells; the others keep theirs.

    So a model learns of all that it is asked for: a cell given all labels (the other half), a cell given none (those that
    `drop_conditions` hid from), and label after label and gene after gene in any order, which is the bound on their joint law.
    There each label is hidden with the probability of the genes, independently, and a cell that hides none teaches nothing of labels; here
    of every cell at least one is hidden, and the weight of its term says how much rarer that would have been. A lone label is always
    hidden, with the weight 1: with one over the probability, few cells with few genes hidden were all that labels were learned from.

    Parameters
    ----------
    condition : (B, columns) int64, 0 for unknown
    probability : (B,) with which the genes of each cell are hidden

    Returns
    -------
    shown : (B, columns) int64
        With 0 where a label is hidden.
    weight : (B, columns) float32
        Where one was hidden by its turn: how probable it is that any of the cell's known labels is hidden, over the probability of
        each, from 1 to their number; 1 elsewhere. A label has then the same weight in expectation at every time, whatever hid it.
    """
    p = probability.float().clamp(min=1e-6)
    known = condition != 0
    left = known.sum(1)
    weight = _any_of(left, p) / p
    in_turn = torch.rand(len(condition), device=condition.device) < 0.5
    none_yet, hidden = torch.ones_like(in_turn), []
    for there in known.unbind(1):
        chance = torch.where(none_yet, p / _any_of(left, p), p)  # given that one of those left must be, if none is yet
        hidden.append(there & in_turn & (torch.rand(len(p), device=p.device) < chance))
        none_yet, left = none_yet & ~hidden[-1], left - there.long()
    by_turn = torch.stack(hidden, 1)
    return condition.masked_fill(by_turn, 0), torch.where(by_turn, weight[:, None], 1.0)


def _any_of(n: Tensor, p: Tensor) -> Tensor:
    """Return the probability that any of n (B,), of one if n is 0, happens that each has the probability p (B,)."""
    return -torch.expm1(n.clamp(min=1) * torch.log1p(-p))
