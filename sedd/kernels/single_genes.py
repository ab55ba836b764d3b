"""What is asked of single genes in single cells: their products with a cell's factors, and their part in a cell's sum.

As operations on tensors both would gather a matrix for each gene, hundreds of times what is computed from it; as products of matrices a sum
over the genes would go through all zeros, of which most counts are.
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


@numba.njit(cache=True, nogil=True)
def _sum_surprises(tokens: Any, mask_token: Any, usual: Any, vectors: Any, usual_sum: Any, most: Any, sums: Any, left: Any) -> None:
    n_vars = tokens.shape[1]
    for b in range(tokens.shape[0]):
        hidden, counted = 0, 0
        for g in range(n_vars):
            k = np.int64(tokens[b, g])
            hidden += k == mask_token
            counted += k != 0
        from_nothing = hidden > n_vars - hidden
        left[b] = (n_vars - hidden if from_nothing else counted) > most
        if left[b]:
            continue
        above, own = sums[b, 0], sums[b, 1]
        for d in range(vectors.shape[1]):
            above[d] = np.float32(0) if from_nothing else -usual_sum[0, d]
            own[d] = np.float32(0) if from_nothing else -usual_sum[1, d]
        for g in range(n_vars):
            k = np.int64(tokens[b, g])
            if k == mask_token:
                if from_nothing:
                    continue
                first, second = usual[g, 0], usual[g, 1]
            elif from_nothing:
                first, second = np.float32(k > 0) - usual[g, 0], log1p_of(k) - usual[g, 1]
            elif k == 0:
                continue
            else:
                first, second = np.float32(1), log1p_of(k)
            vector = vectors[g]
            for d in range(vectors.shape[1]):
                above[d] += first * vector[d]
                own[d] += second * vector[d]


def sum_surprises(
    tokens: np.ndarray, mask_token: int, usual: np.ndarray, vectors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of `surprise (outer) vector` over the visible genes of each cell, from the genes that are not zero.

    What zeros say is the same in all cells and is added once; a gene that is hidden takes its part of it back, which is no hint at
    its count. A cell of which more than a quarter of the genes would be gone through is left to a product of matrices, which is faster then.

    Parameters
    ----------
    tokens : (B, n) integers >= 0
    mask_token : int
    usual : (n, 2), vectors : (n, dim) float32

    Returns
    -------
    sums : (B, 2, dim) float32
    left : (B,) bool
        The cells whose sums were not made.
    """
    sums, left = np.empty((tokens.shape[0], 2, vectors.shape[1]), np.float32), np.empty(tokens.shape[0], bool)
    _sum_surprises(tokens, mask_token, usual, vectors, usual.T @ vectors, tokens.shape[1] // 4, sums, left)
    return sums, left
