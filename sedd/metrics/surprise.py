"""How unusual a cell is among others of the same depth."""

from __future__ import annotations

import numpy as np

from sedd.errors import UserError

MIN_REFERENCE = 20
"""Cells to compare with, at least: of fewer a percentile says nothing."""
NEAREST = 200
"""Reference cells of about the same depth that a cell is compared with, or a fifth of the reference where that is more."""


def surprise(
    excess: np.ndarray,
    totals: np.ndarray,
    reference: np.ndarray,
    reference_totals: np.ndarray,
    itself: np.ndarray | None = None,
) -> np.ndarray:
    """Return which share of reference cells of the same depth has a smaller excess.

    The excess may follow the logarithm of the total along a parabola, which is fitted to the reference, and along its tangents
    beyond that. A cell's distance from it is compared with those of the reference cells that are nearest in depth.

    Parameters
    ----------
    excess, totals : (n,) float
        Of the cells: what they cost more than was expected of them, and their counts.
    reference, reference_totals : (m,) float
    itself : (n,) int, optional
        Which of the reference a cell is, with which it is then not compared; -1 for none.

    Returns
    -------
    surprise : (n,) float64 in (0, 1)
        Uniform if the cells are like the reference.

    Raises
    ------
    UserError
        If there are fewer reference cells than `MIN_REFERENCE`.
    """
    m = len(reference)
    if m < MIN_REFERENCE:
        raise UserError(f"there are {m} cells to compare with; expected at least {MIN_REFERENCE}.")
    x, depth = (np.log1p(np.asarray(t, np.float64)) for t in (totals, reference_totals))
    trend = _Trend(depth, reference)
    off, reference_off = excess - trend(x), reference - trend(depth)
    order = np.argsort(depth, kind="stable")
    depth, reference_off = depth[order], reference_off[order]
    place = np.full(m + 1, -1)
    place[order] = np.arange(m)
    own = np.full(len(x), -1) if itself is None else place[itself]
    k = min(m, max(NEAREST, m // 5))
    # The k nearest lie together in the order of depth.
    first = np.clip(np.searchsorted(depth, x) - k // 2, 0, m - k)
    out = np.empty(len(x))
    for i, lo in enumerate(first):
        while lo > 0 and x[i] - depth[lo - 1] < depth[lo + k - 1] - x[i]:
            lo -= 1
        while lo + k < m and depth[lo + k] - x[i] < x[i] - depth[lo]:
            lo += 1
        others = reference_off[lo : lo + k]
        if lo <= own[i] < lo + k:
            others = np.delete(others, own[i] - lo)
        below = (others < off[i]).sum() + 0.5 * (others == off[i]).sum()
        out[i] = (below + 0.5) / (len(others) + 1)
    return out


class _Trend:
    """A parabola through points, with its tangents beyond them; a line or a mean where they are of few depths."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._inside = np.polynomial.Polynomial.fit(x, y, min(2, len(np.unique(x)) - 1))
        self._slope, self._low, self._high = self._inside.deriv(), x.min(), x.max()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        near = np.clip(x, self._low, self._high)
        return np.asarray(self._inside(near) + self._slope(near) * (x - near))
