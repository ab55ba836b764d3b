"""What visible counts tell a network, made in one pass."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_LOG1P = np.log1p(np.arange(1024)).astype(np.float32)


@numba.njit(cache=True, nogil=True, inline="always")
def log1p_of(k: Any) -> Any:
    """Return `log1p` of a count, float32."""
    return _LOG1P[k] if k < 1024 else np.float32(np.log1p(np.float64(k)))


@numba.njit(cache=True, nogil=True)
def _count_features(tokens: Any, mask_token: Any, out: Any) -> None:
    for b in range(tokens.shape[0]):
        for g in range(tokens.shape[1]):
            k = np.int64(tokens[b, g])
            hidden = k == mask_token
            k = np.int64(0) if hidden else k
            out[b, 0, g] = np.float32(0) if hidden else np.float32(1)
            out[b, 1, g] = np.float32(k > 0)
            out[b, 2, g] = log1p_of(k)


def count_features(tokens: np.ndarray, mask_token: int) -> np.ndarray:
    """Whether each count is visible, whether it is above 0, and its `log1p`; all 0 where it is masked.

    Parameters
    ----------
    tokens : (B, n) integers >= 0
    mask_token : int

    Returns
    -------
    features : (B, 3, n) float32
    """
    out = np.empty((tokens.shape[0], 3, tokens.shape[1]), np.float32)
    _count_features(tokens, mask_token, out)
    return out


@numba.njit(cache=True, nogil=True)
def _count_surprises(tokens: Any, mask_token: Any, usual: Any, out: Any) -> None:
    for b in range(tokens.shape[0]):
        for g in range(tokens.shape[1]):
            k = np.int64(tokens[b, g])
            hidden = k == mask_token
            k = np.int64(0) if hidden else k
            out[b, 0, g] = np.float32(0) if hidden else np.float32(k > 0) - usual[g, 0]
            out[b, 1, g] = np.float32(0) if hidden else log1p_of(k) - usual[g, 1]


def count_surprises(tokens: np.ndarray, mask_token: int, usual: np.ndarray) -> np.ndarray:
    """Whether each visible count is above 0, and its `log1p`, less what is usual for its gene; 0 where it is masked.

    Parameters
    ----------
    tokens : (B, n) integers >= 0
    mask_token : int
    usual : (n, 2) float32

    Returns
    -------
    surprises : (B, 2, n) float32
    """
    out = np.empty((tokens.shape[0], 2, tokens.shape[1]), np.float32)
    _count_surprises(tokens, mask_token, usual, out)
    return out
