"""Count matrices, dense or sparse, and the scale on which cells are compared."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from scipy import sparse

Matrix: TypeAlias = Any  # (n_cells, n_vars): a numpy array or any scipy sparse matrix or array


def to_dense(counts: Matrix) -> np.ndarray:
    """Return a float64 array of a dense or sparse matrix.

    Parameters
    ----------
    counts
        (n_cells, n_vars), an array or a SciPy matrix of any format.

    Returns
    -------
    dense : (n_cells, n_vars) float64
    """
    return np.asarray(counts.toarray() if sparse.issparse(counts) else counts, dtype=np.float64)


def log_cp10k(counts: Matrix, target: float = 1e4) -> np.ndarray:
    """`log1p` of counts scaled to `target` a cell; a cell without counts stays zero.

    Parameters
    ----------
    counts : (n_cells, n_vars) non-negative
    target : float
        Total of a cell after scaling.

    Returns
    -------
    log_counts : (n_cells, n_vars) float64
    """
    dense = to_dense(counts)
    total = dense.sum(axis=1, keepdims=True)
    return np.log1p(np.divide(dense * target, total, out=np.zeros_like(dense), where=total > 0))
