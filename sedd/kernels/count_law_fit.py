"""The law of each gene by itself, fitted to how often it has each count: where a model starts."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from scipy import sparse

from sedd.kernels.count_law import fill_laws, log_likelihoods, slopes_of
from sedd.kernels.count_law_draws import COMPONENTS
from sedd.kernels.vector_math import BLOCK

_FACTORS, _SHARES = np.array([0.2, 1.0, 3.0]), np.array([0.4, 0.42, 0.18])  # of the mean, where the components start


def fit(histogram: Any, *, pseudocount: float = 0.5, steps: int = 100) -> np.ndarray:
    """Fit the law of each gene by itself.

    So that a count that was not seen is not impossible, `pseudocount` cells are added to those of each gene, whose counts fall
    off as `exp(-count / (2 max + 1)) / (1 + count)`: within the range that was seen, not far beyond it.

    Parameters
    ----------
    histogram : (n_vars, max_count + 1) scipy.sparse
        How many cells have each count of each gene, zeros in column 0.
    pseudocount : float
    steps : int
        Steps of Adam (Kingma and Ba 2015) on the mean log-probability.

    Returns
    -------
    start : (n_vars, 3, 3) float32
        Logit of the weight, log of the mean and log of theta of each component.
    """
    csr = sparse.csr_array(histogram)
    n_vars, n_cells = csr.shape[0], max(float(csr[[0]].sum()), 1.0)
    gene = np.repeat(np.arange(n_vars), np.diff(csr.indptr))
    count, often = csr.indices.astype(np.float64), csr.data.astype(np.float64)
    mean = np.maximum(np.bincount(gene, count * often, n_vars) / n_cells, 0.5 / n_cells)
    square = np.bincount(gene, count**2 * often, n_vars) / n_cells
    top = np.zeros(n_vars)
    np.maximum.at(top, gene, np.where(often > 0, count, 0))
    excess = np.maximum(square - mean**2 - mean, 1e-3 * mean**2)
    theta = np.clip((mean**2 + 0.002) / (excess + 0.002), 0.05, 100)  # of few molecules the excess says little
    start = np.empty((n_vars, COMPONENTS, 3), np.float32)
    start[:, :, 0] = np.log(_SHARES)
    start[:, :, 1] = np.log(mean[:, None] * _FACTORS / (_FACTORS @ _SHARES))
    start[:, :, 2] = np.log(1.5 * theta)[:, None]
    values, weights = _entries(csr, top, pseudocount)
    order = np.argsort([len(own) for own in values], kind="stable")  # a block is as long as its longest gene
    for lo in range(0, n_vars, BLOCK):
        genes = order[lo : lo + BLOCK]
        n = max(len(values[g]) for g in genes)
        counts, mass = np.zeros((n, BLOCK), np.int64), np.zeros((n, BLOCK), np.float32)
        for i, g in enumerate(genes):
            counts[: len(values[g]), i], mass[: len(values[g]), i] = values[g], weights[g] / n_cells
        law = np.zeros((BLOCK, COMPONENTS * 3), np.float32)
        law[: len(genes)] = start[genes].reshape(len(genes), -1)
        _fit(counts, mass, 0.5 / n_cells, steps, law)
        start[genes] = law[: len(genes)].reshape(-1, COMPONENTS, 3)
    return start


def _entries(csr: Any, top: np.ndarray, pseudocount: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the counts of each gene and their weights, pseudocounts included: one for each small count, then ever fewer."""
    grids: dict[float, tuple[np.ndarray, np.ndarray]] = {}
    values, weights = [], []
    for g, largest in enumerate(top):
        if largest not in grids:
            reach = 6 * largest + 6
            grid = np.unique(np.concatenate([np.arange(7), np.rint(6 * 1.4 ** np.arange(1, 64))]))
            grid = grid[grid <= reach].astype(np.int64)
            mass = np.diff(grid, append=grid[-1] + 1) / (1 + grid) * np.exp(-grid / (2 * largest + 1))
            grids[largest] = grid, pseudocount * mass / mass.sum()
        grid, mass = grids[largest]
        own = slice(csr.indptr[g], csr.indptr[g + 1])
        values.append(np.concatenate([csr.indices[own], grid]))
        weights.append(np.concatenate([csr.data[own], mass]))
    return values, weights


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _fit(counts: Any, mass: Any, pull: Any, steps: Any, law: Any) -> None:
    """Fit the laws of a block of genes in place; a weak pull to where they began keeps apart what the data do not tell apart."""
    laws, genes, cells = np.empty((27, BLOCK), np.float32), np.arange(BLOCK), np.zeros(BLOCK, np.int64)
    part, rise = np.empty((COMPONENTS, BLOCK), np.float32), np.empty((COMPONENTS, BLOCK), np.float32)
    best, log_p, slope = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty((9, BLOCK), np.float32)
    nothing, none = np.zeros((BLOCK, 1, 1), np.float32), np.zeros((1, 9), np.float32)
    anchor, speed, drift = law.copy(), np.zeros((9, BLOCK)), np.zeros((9, BLOCK))
    gradient = np.empty((9, BLOCK))
    for step in range(1, steps + 1):
        fill_laws(law, nothing, none, genes, cells, BLOCK, laws)
        for p in range(9):
            for i in range(BLOCK):
                gradient[p, i] = pull * (anchor[i, p] - law[i, p])
        for e in range(counts.shape[0]):
            log_likelihoods(laws, counts[e], BLOCK, part, rise, best, log_p)
            slopes_of(laws, counts[e], part, rise, slope)
            for p in range(9):
                for i in range(BLOCK):
                    gradient[p, i] += mass[e, i] * slope[p, i]
        rate = 0.1 * min(1.0, 2.0 * (steps - step + 1) / steps)
        for p in range(9):
            for i in range(BLOCK):
                speed[p, i] = 0.9 * speed[p, i] + 0.1 * gradient[p, i]
                drift[p, i] = 0.99 * drift[p, i] + 0.01 * gradient[p, i] ** 2
                size = np.sqrt(drift[p, i] / (1.0 - 0.99**step)) + 1e-12
                law[i, p] += np.float32(rate * speed[p, i] / (1.0 - 0.9**step) / size)
