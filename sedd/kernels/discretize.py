"""Counts -> bin tokens, and back.

Tokens are `0 .. n_bins - 1`. The mask is no token here: it travels as a separate boolean array, so that 256 bins fit in
one byte and the mask can never be taken for the top bin.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from sedd.errors import UserError

MAX_BINS = 1 << 16
# Counts are looked up in a table of at most this size; a larger count takes the last entry, as in the top bin.
MAX_TABLE = 1 << 22


def token_dtype(n_bins: int) -> np.dtype:
    """Return the narrowest unsigned type that holds the tokens `0 .. n_bins - 1`."""
    if not 1 <= n_bins <= MAX_BINS:
        raise UserError(f"n_bins is {n_bins}; expected 1 to {MAX_BINS}")
    return np.dtype(np.uint8 if n_bins <= 256 else np.uint16)


def check_edges(edges: np.ndarray) -> np.ndarray:
    """Return `edges` as float64, one strictly increasing row of finite numbers; anything else is an error."""
    edges = np.ascontiguousarray(edges, dtype=np.float64)
    if edges.ndim != 1 or edges.size == 0 or not bool(np.all(np.diff(edges) > 0)) or not np.isfinite(edges).all():
        raise UserError("edges must be one strictly increasing row of finite numbers; check for duplicated edges")
    return edges


@numba.njit(cache=True, nogil=True, inline="always")
def digit(value: Any, edges: Any) -> Any:
    """Count the edges <= `value`: `np.digitize` of one number, by bisection."""
    low, high = 0, edges.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if edges[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low


@numba.njit(cache=True, nogil=True)
def _bin_counts(counts: Any, edges: Any, tokens: Any) -> int:
    bad = -1
    for i in range(counts.shape[0]):
        if not counts[i] >= 0:
            bad = i
        tokens[i] = digit(np.float64(counts[i]), edges)
    return bad


def bin_counts(counts: np.ndarray, *, edges: np.ndarray) -> np.ndarray:
    """Map counts to bin tokens, as `np.digitize(counts, edges)` does.

    Parameters
    ----------
    counts : any shape and real dtype, >= 0
    edges : (n_bins - 1,) float64, strictly increasing; bin k holds edges[k-1] <= count < edges[k]

    Returns
    -------
    tokens : shape of `counts`, uint8 if n_bins <= 256, else uint16

    Raises
    ------
    ValueError
        If `edges` does not increase or a count is negative or NaN.
    """
    edges = check_edges(edges)
    counts = np.ascontiguousarray(counts)
    tokens = np.empty(counts.shape, token_dtype(edges.size + 1))
    bad = _bin_counts(counts.reshape(-1), edges, tokens.reshape(-1))
    if bad >= 0:
        raise UserError(f"value {counts.reshape(-1)[bad]} at position {bad} cannot be binned; expected numbers >= 0")
    return tokens


def unbin_tokens(tokens: np.ndarray, *, values: np.ndarray) -> np.ndarray:
    """Map bin tokens to the counts that they stand for.

    Parameters
    ----------
    tokens : any shape, integers in [0, n_bins)
    values : (n_bins,) the count that each bin stands for

    Returns
    -------
    counts : shape of `tokens`, float32

    Raises
    ------
    ValueError
        If a token is outside the bins, the mask token included.
    """
    tokens = np.asarray(tokens)
    values = np.asarray(values, dtype=np.float32)
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= values.size):
        raise UserError(
            f"tokens run from {tokens.min()} to {tokens.max()}; expected 0 to {values.size - 1} (is one still masked?)"
        )
    return values[tokens]


@numba.njit(cache=True, nogil=True)
def quantile_edges(values: Any, edges: Any) -> None:
    """Write the quantiles 0, 1/(k-1) .. 1 of sorted float64 `values` to `edges` (k,), rounded as `np.quantile` rounds."""
    last = values.shape[0] - 1
    step = 1.0 / (edges.shape[0] - 1) if edges.shape[0] > 1 else 0.0
    for k in range(edges.shape[0]):
        share = 1.0 if k == edges.shape[0] - 1 and k > 0 else k * step
        virtual = share * last
        low = min(max(int(np.floor(virtual)), 0), last)
        high = min(low + 1, last)
        weight = virtual - np.floor(virtual)
        span = values[high] - values[low]
        if weight >= 0.5:
            edges[k] = values[high] - span * (1 - weight)
        else:
            edges[k] = values[low] + span * weight
