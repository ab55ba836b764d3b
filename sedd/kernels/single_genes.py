"""What a sampler asks of single genes in single cells: their products with a cell's factors, and their part in a cell's sum.

As operations on tensors both would gather a matrix for each gene, hundreds of times what is computed from it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from sedd.kernels.features import log1p_of


@numba.njit(cache=True, nogil=True, fastmath=True)
def _products(vectors: Any, factors: Any, genes: Any, cells: Any, out: Any) -> None:
    rank, dim = factors.shape[1], factors.shape[2]
    for i in range(genes.shape[0]):
        vector, own = vectors[genes[i]], factors[cells[i]]
        for r in range(rank):
            total = np.float32(0)
            for d in range(dim):
                total += vector[d] * own[r, d]
            out[i, r] = total


def products(vectors: np.ndarray, factors: np.ndarray, genes: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return `factors[cell] @ vectors[gene]` of each pair.

    Parameters
    ----------
    vectors : (n_vars, dim) float32
    factors : (B, rank, dim) float32
    genes, cells : (N,) int64

    Returns
    -------
    products : (N, rank) float32
    """
    out = np.empty((genes.shape[0], factors.shape[1]), np.float32)
    _products(vectors, factors, genes, cells, out)
    return out


@numba.njit(cache=True, nogil=True)
def _add_surprises(sums: Any, vectors: Any, usual: Any, genes: Any, cells: Any, counts: Any) -> None:
    for i in range(genes.shape[0]):
        g, k = genes[i], np.int64(counts[i])
        vector, above, own = vectors[g], sums[cells[i], 0], sums[cells[i], 1]
        first, second = np.float32(k > 0) - usual[g, 0], log1p_of(k) - usual[g, 1]
        for d in range(vectors.shape[1]):
            above[d] += first * vector[d]
            own[d] += second * vector[d]


def add_surprises(
    sums: np.ndarray, vectors: np.ndarray, usual: np.ndarray, genes: np.ndarray, cells: np.ndarray, counts: np.ndarray
) -> None:
    """Add `surprise (outer) vector` of each gene that becomes visible to the sums of its cell, in place.

    Parameters
    ----------
    sums : (B, 2, dim) float32
    vectors : (n_vars, dim), usual : (n_vars, 2) float32
    genes, cells, counts : (N,) int64
        The surprises are those of `sedd.kernels.features.count_surprises`.
    """
    _add_surprises(sums, vectors, usual, genes, cells, counts)
