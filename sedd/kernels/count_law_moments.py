"""Expectations under the law of a gene's count, see `sedd.kernels.count_law`, and given the entry's own count."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from sedd.kernels.count_law import by_gene, fill_laws, log_likelihoods
from sedd.kernels.count_law_draws import COMPONENTS, check_law, mean_log1p
from sedd.kernels.vector_math import BLOCK


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _moments(
    readout: Any, start: Any, moves: Any, masked: Any, counts: Any, by_own: Any, scale: Any, columns: Any,
    evidence: Any, first: Any, second: Any, zero: Any, log: Any,
) -> None:  # fmt: skip
    laws = np.empty((27, BLOCK), np.float32)
    part, rise = np.empty((COMPONENTS, BLOCK), np.float32), np.empty((COMPONENTS, BLOCK), np.float32)
    best, log_p = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    gene, cell, own = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64), np.zeros(BLOCK, np.int64)
    weight, theta, ratio = laws[9:12], laws[12:15], laws[15:18]
    n, entries = 0, masked.size
    for entry in range(entries):
        g, b = entry // masked.shape[0], entry % masked.shape[0]
        if masked[b, g]:
            gene[n], cell[n], own[n] = g, b, np.int64(counts[b, g]) if by_own[g] else 0
            n += 1
        if n == 0 or (n < BLOCK and entry < entries - 1):
            continue
        for i in range(n, BLOCK):
            own[i] = 0
        fill_laws(start, readout, moves, gene, cell, n, laws)
        log_likelihoods(laws, own, n, part, rise, best, log_p)
        for i in range(n):
            known, k = by_own[gene[i]], own[i]
            g, b = columns[gene[i]], cell[i]
            p = math.exp(np.float64(log_p[i]))
            times = max(p, 1e-300) if known else 1.0
            evidence[b, g] += times
            if zero.shape[0] > 0 and not known:
                zero[b, g] += p  # `own` is 0
            for j in range(COMPONENTS):
                share, t, r = np.float64(weight[j, i]), np.float64(theta[j, i]), np.float64(ratio[j, i])
                mean, spread = t * r, 1.0
                if known:  # the posterior of the rate behind the count: again a mixture of gamma laws
                    share, mean, t, spread = np.float64(part[j, i]), (t + k) * r / (1.0 + r), t + k, 0.0
                share *= times
                first[b, g] += share * mean
                second[b, g] += share * mean * (mean + mean / t + spread)
                if log.shape[0] > 0 and share > 1e-9 * times:
                    log[b, g] += share * mean_log1p(scale[b], mean, t)
        n = 0


class Sums(NamedTuple):
    """Running sums of expectations, each (B, n_vars) float64 on one device: of predictions of the same entries that are to be averaged.

    Attributes
    ----------
    evidence
        What to divide the others by: probabilities of the entries' own counts, or the number of predictions.
    first, second
        Of the count and its square; where the own count is given, of the rate behind it.
    zero, log1p
        Probability of 0, and expectation of `log1p(scale count)`; may be empty (0, 0).
    """

    evidence: Tensor
    first: Tensor
    second: Tensor
    zero: Tensor
    log1p: Tensor

    @classmethod
    def of_zeros(cls, shape: tuple[int, ...], *, zero: bool = False, log1p: bool = False, device: torch.device | None = None) -> Sums:
        """Return sums to begin with."""
        wanted = (True, True, True, zero, log1p)
        return cls(*(torch.zeros(shape if one else (0, 0), dtype=torch.float64, device=device) for one in wanted))

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each entry, 0 where nothing was added."""
        share = 1 / self.evidence.where(self.evidence > 0, 1)
        mean = self.first * share
        return mean, (self.second * share - mean.square()).clamp(min=0).sqrt()


def add_moments(
    sums: Sums,
    readout: np.ndarray,
    start: np.ndarray,
    moves: np.ndarray,
    masked: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    by_own: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    columns: np.ndarray | None = None,
) -> None:
    """Add the expectations of the masked entries to `sums`.

    Parameters
    ----------
    sums
        Changed in place; on the CPU.
    readout, start, moves, masked
        As in `log_probs`.
    counts : (B, n_vars), by_own : (n_vars,) bool, optional
        Genes whose own counts are given beside the other genes. Around a rate a count is Poisson, so the rate's posterior is,
        for each component, a gamma law with shape `theta + count` and mean `mean (theta + count) / (theta + mean)`.
    scale : (B,) float64, optional
        For `log1p`.
    columns : (n_vars,) int64, optional
        Where in the sums each gene of the other arrays has its column; in their order if not given.
    """
    check_law(readout, start, moves)
    none = by_own is None or counts is None
    own = np.zeros(masked.shape[1], np.bool_) if by_own is None else by_own
    given = np.zeros((1, 1), np.float32) if none or counts is None else counts
    scales = np.zeros(len(masked)) if scale is None else scale
    places = np.arange(masked.shape[1]) if columns is None else columns
    _moments(by_gene(readout), start.reshape(-1, 9), moves.reshape(-1, 9), masked, given, own, scales, places, *(part.numpy() for part in sums))
