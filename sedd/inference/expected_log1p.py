"""Posterior predictive expectations: counts that are Poisson around a rate with a gamma posterior, so negative binomial."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from sedd.errors import UserError

LARGE = 100.0
"""Mean above which the expectation is taken from its expansion around the mean, right to 1e-3 there."""

REST, MOST = 1e-8, 50_000
"""The sum ends when the counts that are left are less probable than the first, or at the second."""


@numba.njit(cache=True, nogil=True)
def _expected_log1p(shape: Any, rate: Any, scale: Any, out: Any) -> None:
    for row in range(shape.shape[0]):
        for gene in range(shape.shape[1]):
            a, b, c = shape[row, gene], rate[row, gene], scale[row]
            mean = a / b
            variance = mean * (1 + 1 / b)
            if mean > LARGE:
                out[row, gene] = np.log1p(c * mean) - 0.5 * variance * (c / (1 + c * mean)) ** 2
                continue
            p = np.exp(-a * np.log1p(1 / b))  # of no molecule; that of n follows from that of n - 1
            total, n, left = 0.0, 0, 1 - p
            while left > REST and n < MOST:
                p *= (a + n) / ((n + 1) * (1 + b))
                n += 1
                left -= p
                total += p * np.log1p(c * n)
            out[row, gene] = total


def expected_log1p(shape: np.ndarray, rate: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the expectation of `log1p(scale * n)` of a negative binomial n: Poisson around a rate that has a gamma posterior.

    Parameters
    ----------
    shape, rate : (B, n_vars) float64, positive, of the gamma posterior; its mean is `shape / rate`
    scale : (B,) float64, of each row

    Returns
    -------
    expected : (B, n_vars) float64

    Raises
    ------
    ValueError
        If the arrays do not fit together or a shape or rate is not positive.
    """
    if shape.ndim != 2 or rate.shape != shape.shape or scale.shape != shape.shape[:1]:
        raise UserError(f"shapes {shape.shape}, {rate.shape} and {scale.shape} disagree; expected (B, n), (B, n) and (B,)")
    if not (np.all(shape > 0) and np.all(rate > 0) and np.all(scale >= 0)):
        raise UserError("a gamma posterior needs a positive shape and rate; the scale must not be negative")
    out = np.empty(shape.shape)
    _expected_log1p(shape.astype(np.float64), rate.astype(np.float64), scale.astype(np.float64), out)
    return out
