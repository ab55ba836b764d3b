"""Peers that need nothing beyond numpy and scikit-learn, each from its published description."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.utils.extmath import randomized_svd

from sedd.metrics import log_cp10k


def knn_denoise(kept: sparse.csr_array, k: int = 10, *, root: bool, seed: int = 0) -> np.ndarray:
    """Average each cell with its `k` nearest cells in 50 principal components of log1p CP10k.

    Parameters
    ----------
    kept : (n_cells, n_vars) counts
    k : int
        Neighbours, the cell itself among them.
    root : bool
        Average square roots of shares and square the result, instead of shares themselves.
    seed : int

    Returns
    -------
    denoised : (n_cells, n_vars) float64 at the cell's own total
    """
    dense = kept.toarray().astype(np.float64)
    total = np.maximum(dense.sum(axis=1, keepdims=True), 1)
    share = np.sqrt(dense / total) if root else dense / total
    nearest = _nearest(PCA(50, random_state=seed).fit_transform(log_cp10k(kept)), k)
    mean = share[nearest].mean(axis=1) if len(dense) < 500 else np.stack([share[i].mean(axis=0) for i in nearest])
    return (mean**2 if root else mean) * total


def _nearest(x: np.ndarray, k: int) -> np.ndarray:
    square = (x**2).sum(axis=1)
    distance = square[:, None] + square[None, :] - 2 * x @ x.T
    return np.argpartition(distance, k, axis=1)[:, :k]


def knn_impute(
    train: sparse.csr_array, test: np.ndarray, hidden: np.ndarray, k: int = 50, shrink: float = 0.1
) -> np.ndarray:
    """Predict hidden genes by the mean share in the `k` training cells nearest in the visible genes.

    Parameters
    ----------
    train : (n_train, n_vars) counts
    test : (n_test, n_vars) counts, of which only those where `hidden` is False are looked at
    hidden : (n_test, n_vars) bool
    k : int
    shrink : float
        Weight of the mean over all training cells, without which a gene that no neighbour has would get the mean 0 and,
        where it is there after all, a huge penalty.

    Returns
    -------
    mean : (n_test, n_vars) float64, scaled to the visible total of the cell over the visible share of its neighbours
    """
    known = train.toarray().astype(np.float64)
    share = known / np.maximum(known.sum(axis=1, keepdims=True), 1)
    visible = np.where(hidden, 0.0, test)
    total = np.maximum(visible.sum(axis=1, keepdims=True), 1)
    # Distances between square roots of shares over the genes visible in each test cell: (a - b)^2 summed where seen,
    # training shares renormalised to those genes.
    seen = (~hidden).astype(np.float64)
    root = np.sqrt(share)
    mass = seen @ share.T
    cross = np.sqrt(visible / total) @ root.T / np.sqrt(np.maximum(mass, 1e-12))
    nearest = np.argpartition(-cross, k, axis=1)[:, :k]  # both sides have unit length, so the distance is 2 - 2 cross
    mean = (1 - shrink) * np.stack([share[rows].mean(axis=0) for rows in nearest]) + shrink * share.mean(axis=0)
    return mean * total / np.maximum((mean * seen).sum(axis=1, keepdims=True), 1e-12)


def alra(kept: sparse.csr_array, *, seed: int = 0) -> tuple[np.ndarray, int]:
    """Adaptively thresholded low-rank approximation, written from its paper (Linderman et al. 2022).

    Parameters
    ----------
    kept : (n_cells, n_vars) counts
    seed : int

    Returns
    -------
    denoised, rank : (n_cells, n_vars) float64 at the cell's own total, and the rank that was chosen
    """
    x = log_cp10k(kept)
    values = randomized_svd(x, 100, n_iter=10, random_state=seed)[1]
    gaps = values[:-1] - values[1:]
    noise = gaps[79:]
    rank = int(np.flatnonzero(gaps > noise.mean() + 6 * noise.std(ddof=1)).max()) + 1
    u, s, vt = randomized_svd(x, rank, n_iter=10, random_state=seed)
    low = (u * s) @ vt
    threshold = np.abs(np.quantile(low, 0.001, axis=0))
    kept_low = np.where(low > threshold, low, 0.0)
    out = np.zeros_like(low)
    for j in range(x.shape[1]):
        new, old = kept_low[:, j] > 0, x[:, j] > 0
        if not new.any() or not old.any():
            continue
        a, b = kept_low[new, j], x[old, j]
        spread = b.std() / a.std() if a.std() > 0 and len(b) > 1 and b.std() > 0 else 1.0
        out[new, j] = np.maximum((a - a.mean()) * spread + b.mean(), 0)
    restored = (out == 0) & (x > 0)
    out[restored] = x[restored]
    total = np.asarray(kept.sum(axis=1)).reshape(-1, 1)
    return np.expm1(out) / 1e4 * total, rank
