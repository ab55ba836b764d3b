"""Draws from the law of a gene's count by inversion, its distribution function, tables of it: one gene of one cell at a time.

The law is described in `sedd.kernels.count_law`.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from sedd.errors import UserError

COMPONENTS = 3
LARGEST = 2**31 - 2
"""The largest count; one more is the token of the mask."""
LOG_MEAN, LOG_THETA = (-25.0, 21.4), (-5.0, 7.0)
"""Between these the logs of a mean and of a dispersion are kept."""

LOG_NODES, LOG_STEP, LOG_FROM = 141, 0.4, -52.0
"""Of the trapezoidal rule for the mean of `log1p(scale n)`."""

_SUMMED = 64.0  # up to this mean a law is summed from 0 on
_LOG_FACTORIAL = np.array([math.lgamma(k + 1.0) for k in range(256)])


@numba.njit(cache=True, nogil=True, inline="always")
def log_factorial(k: Any) -> Any:
    """Return `log(k!)`."""
    return _LOG_FACTORIAL[k] if k < 256 else math.lgamma(k + 1.0)


@numba.njit(cache=True, nogil=True)
def _digamma(x: Any) -> Any:
    """Return the derivative of the log of the gamma function, for x > 0: recurrence to 10, then its asymptotic series (DLMF 5.11.2)."""
    out = 0.0
    while x < 10.0:
        out -= 1.0 / x
        x += 1.0
    y = 1.0 / (x * x)
    return out + math.log(x) - 0.5 / x - y * (1.0 / 12 - y * (1.0 / 120 - y * (1.0 / 252 - y / 240)))


@numba.njit(cache=True, nogil=True)
def rising(theta: Any, k: Any) -> Any:
    """Return `lgamma(theta + k) - lgamma(theta)` and its derivative by theta."""
    if k <= 16:
        product, slope = 1.0, 0.0
        for i in range(k):
            product *= theta + i
            slope += 1.0 / (theta + i)
        return math.log(product), slope
    return math.lgamma(theta + k) - math.lgamma(theta), _digamma(theta + k) - _digamma(theta)


@numba.njit(cache=True, nogil=True, inline="always")
def _between(x: Any, low: Any, high: Any) -> Any:
    return min(max(x, low), high)


@numba.njit(cache=True, nogil=True, inline="always")
def _number(start: Any, readout: Any, moves: Any, j: Any, c: Any) -> Any:
    value = np.float64(start[j, c])
    for r in range(readout.shape[0]):
        value += readout[r] * moves[r, j, c]
    return value


@numba.njit(cache=True, nogil=True)
def _parameters(start: Any, readout: Any, moves: Any, raw: Any, weight: Any, mean: Any, theta: Any) -> None:
    """Weights, means and dispersions of one gene in one cell; `raw` keeps their logs before they are bounded."""
    top = -np.inf
    for j in range(COMPONENTS):
        for c in range(3):
            raw[j, c] = _number(start, readout, moves, j, c)
        top = max(top, raw[j, 0])
    total = 0.0
    for j in range(COMPONENTS):
        weight[j] = math.exp(raw[j, 0] - top)
        total += weight[j]
        mean[j] = math.exp(_between(raw[j, 1], LOG_MEAN[0], LOG_MEAN[1]))
        theta[j] = math.exp(_between(raw[j, 2], LOG_THETA[0], LOG_THETA[1]))
    for j in range(COMPONENTS):
        weight[j] /= total


@numba.njit(cache=True, nogil=True)
def _log_pmf(k: Any, mean: Any, theta: Any) -> Any:
    ratio = mean / theta
    q = math.log1p(ratio)
    if k == 0:
        return -theta * q
    return rising(theta, k)[0] - log_factorial(k) - (theta + k) * q + k * math.log(ratio)


@numba.njit(cache=True, nogil=True)
def mean_log1p(scale: Any, mean: Any, theta: Any) -> Any:
    """Return the expectation of `log1p(scale n)` of a negative binomial n: the sum itself, or for large means an integral, right to 1e-7."""
    if scale == 0.0:
        return 0.0
    up, log_none = mean / (theta + mean), -theta * math.log1p(mean / theta)
    if mean <= 1000.0 and log_none > -600.0:
        p = math.exp(log_none)
        left, total, k = 1.0 - p, 0.0, 0
        while left > 1e-9 and k < 100_000:
            p *= (theta + k) / (k + 1.0) * up
            k += 1
            left -= p
            total += p * math.log1p(scale * k)
        return total
    # log(1 + a) is the integral of (1 - exp(-a x)) exp(-x) / x over x > 0, and the mean of exp(-scale n x) is known. Of the logarithm of x
    # the integrand is analytic, so that the trapezoidal rule converges fast.
    total = 0.0
    for node in range(LOG_NODES):
        x = math.exp(LOG_FROM + LOG_STEP * node)
        none = -theta * math.log1p(mean / theta * -math.expm1(-scale * x))
        total -= math.expm1(none) * math.exp(-x)
    return total * LOG_STEP


@numba.njit(cache=True, nogil=True)
def _beta_fraction(a: Any, b: Any, x: Any) -> Any:
    """Continued fraction of the incomplete beta function (DLMF 8.17.22) by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    out = d
    for m in range(1, 200_000):
        for odd in range(2):
            if odd:
                step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
            else:
                step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
            d = 1.0 + step * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + step / c
            c = c if abs(c) > tiny else tiny
            out *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return out


@numba.njit(cache=True, nogil=True)
def _above(k: Any, mean: Any, theta: Any) -> Any:
    """Return P(more than k), the regularised incomplete beta function `I_q(k + 1, theta)`, right where it is small."""
    a = k + 1.0
    q = mean / (theta + mean)
    log_front = rising(theta, k + 1)[0] - log_factorial(k + 1) + a * math.log(q) - theta * math.log1p(mean / theta)
    if q < (a + 1.0) / (a + theta + 2.0):
        return math.exp(log_front) * _beta_fraction(a, theta, q)
    return 1.0 - math.exp(log_front) * a / theta * _beta_fraction(theta, a, 1.0 - q)


@numba.njit(cache=True, nogil=True)
def _quantile(u: Any, mean: Any, theta: Any) -> Any:
    """Return the smallest count whose distribution function is above u."""
    if mean <= _SUMMED:
        p = math.exp(-theta * math.log1p(mean / theta))
        up, below, k = mean / (theta + mean), p, 0
        while below <= u and k < 256:
            p *= (theta + k) / (k + 1.0) * up
            k += 1
            below += p
        if below > u and 1.0 - u > 1e-9:  # so far out the sum has lost its digits
            return k
    rest = 1.0 - u
    high = np.int64(1)
    while high < LARGEST and _above(high, mean, theta) >= rest:
        high *= 2
    low, high = np.int64(-1), min(high, np.int64(LARGEST))
    while high - low > 1:
        middle = (low + high) // 2
        if _above(middle, mean, theta) >= rest:
            low = middle
        else:
            high = middle
    return high


@numba.njit(cache=True, nogil=True)
def _draw(readout: Any, start: Any, moves: Any, genes: Any, u: Any, out: Any) -> None:
    weight = np.empty(COMPONENTS)
    for i in range(genes.shape[0]):
        own, top, total = start[genes[i]], -np.inf, 0.0
        for j in range(COMPONENTS):
            weight[j] = _number(own, readout[i], moves, j, 0)
            top = max(top, weight[j])
        for j in range(COMPONENTS):
            weight[j] = math.exp(weight[j] - top)
            total += weight[j]
        rest, j = u[i] * total, 0
        while j < COMPONENTS - 1 and rest >= weight[j]:
            rest -= weight[j]
            j += 1
        log_mean, log_theta = _number(own, readout[i], moves, j, 1), _number(own, readout[i], moves, j, 2)
        if not np.isfinite(total + log_mean + log_theta):
            out[i] = -1
            continue
        mean = math.exp(_between(log_mean, LOG_MEAN[0], LOG_MEAN[1]))
        theta = math.exp(_between(log_theta, LOG_THETA[0], LOG_THETA[1]))
        out[i] = _quantile(min(max(rest / weight[j], 0.0), 1.0 - 2.0**-53) if weight[j] > 0 else 0.0, mean, theta)


def draw(readout: np.ndarray, start: np.ndarray, moves: np.ndarray, genes: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Draw counts by inversion: one uniform number chooses the component and, stretched, the count within it.

    Parameters
    ----------
    readout : (N, rank) float32
    start, moves
        As in `log_probs`.
    genes : (N,) int64
    u : (N,) float64 in [0, 1)

    Returns
    -------
    drawn : (N,) int64, -1 where a law is not a number
    """
    check_law(readout, start, moves)
    out = np.empty(genes.shape, np.int64)
    _draw(readout, start, moves, genes, u, out)
    return out


@numba.njit(cache=True, nogil=True)
def _mixed(k: Any, weight: Any, mean: Any, theta: Any) -> Any:
    """Return `log P(k)`, also where P is too small for a float64."""
    log_p = -np.inf
    for j in range(COMPONENTS):
        part = math.log(max(weight[j], 1e-300)) + _log_pmf(k, mean[j], theta[j])
        high, low = max(part, log_p), min(part, log_p)
        log_p = high + math.log1p(math.exp(low - high))
    return log_p


@numba.njit(cache=True, nogil=True)
def _best(readout: Any, start: Any, moves: Any, genes: Any, out: Any) -> None:
    raw = np.empty((COMPONENTS, 3))
    weight, mean, theta = np.empty(COMPONENTS), np.empty(COMPONENTS), np.empty(COMPONENTS)
    p, up = np.empty(COMPONENTS), np.empty(COMPONENTS)
    for i in range(genes.shape[0]):
        _parameters(start[genes[i]], readout[i], moves, raw, weight, mean, theta)
        # Beyond the largest mode every component falls, and with them the mixture.
        last = 0.0
        for j in range(COMPONENTS):
            last = max(last, mean[j] * (theta[j] - 1.0) / theta[j])
        if last <= _SUMMED:
            best, k = 0.0, 0
            for j in range(COMPONENTS):
                p[j] = weight[j] * math.exp(-theta[j] * math.log1p(mean[j] / theta[j]))
                up[j] = mean[j] / (theta[j] + mean[j])
            while k <= last + 1.0:
                best = max(best, p[0] + p[1] + p[2])
                for j in range(COMPONENTS):
                    p[j] *= (theta[j] + k) / (k + 1.0) * up[j]
                k += 1
            out[i] = math.log(best)
            continue
        out[i] = _mixed(np.int64(0), weight, mean, theta)
        for j in range(COMPONENTS):  # far out, components are so wide that the mode of one is that of the mixture, near enough
            mode = np.int64(max(0.0, mean[j] * (theta[j] - 1.0) / theta[j]))
            out[i] = max(out[i], _mixed(mode, weight, mean, theta))


def best(readout: np.ndarray, start: np.ndarray, moves: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """Log-probability of the most probable count, (N,) float64; arguments as in `draw`.

    Where a mode lies above 64 it is that of the best mode of a component, which may be a little less.
    """
    check_law(readout, start, moves)
    out = np.empty(genes.size)
    _best(readout, start, moves, genes, out)
    return out


@numba.njit(cache=True, nogil=True)
def _distribution(
    readout: Any, start: Any, moves: Any, genes: Any, counts: Any, log_p: Any, below: Any, expected: Any
) -> None:
    raw = np.empty((COMPONENTS, 3))
    weight, mean, theta = np.empty(COMPONENTS), np.empty(COMPONENTS), np.empty(COMPONENTS)
    for i in range(genes.shape[0]):
        _parameters(start[genes[i]], readout[i], moves, raw, weight, mean, theta)
        k, above = np.int64(counts[i]), 0.0
        log_p[i] = _mixed(k, weight, mean, theta)
        for j in range(COMPONENTS):
            above += weight[j] * (_above(k - 1, mean[j], theta[j]) if k > 0 else 1.0)
            expected[i] += weight[j] * mean[j]
        below[i] = 1.0 - above


def distribution(
    readout: np.ndarray, start: np.ndarray, moves: np.ndarray, genes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`log P(count)`, `P(less than count)` and the mean, each (N,) float64; arguments as in `draw`."""
    check_law(readout, start, moves)
    log_p, below, expected = (np.zeros(genes.shape) for _ in range(3))
    _distribution(readout, start, moves, genes, counts, log_p, below, expected)
    return log_p, np.clip(below, 0, 1), expected


@numba.njit(cache=True, nogil=True)
def _table(readout: Any, start: Any, moves: Any, genes: Any, out: Any) -> None:
    raw = np.empty((COMPONENTS, 3))
    weight, mean, theta = np.empty(COMPONENTS), np.empty(COMPONENTS), np.empty(COMPONENTS)
    for i in range(genes.shape[0]):
        _parameters(start[genes[i]], readout[i], moves, raw, weight, mean, theta)
        for k in range(out.shape[1]):
            out[i, k] = _mixed(k, weight, mean, theta)


@numba.njit(cache=True, nogil=True)
def _reach(readout: Any, start: Any, moves: Any, genes: Any, rest: Any, out: Any) -> None:
    raw = np.empty((COMPONENTS, 3))
    weight, mean, theta = np.empty(COMPONENTS), np.empty(COMPONENTS), np.empty(COMPONENTS)
    for i in range(genes.shape[0]):
        _parameters(start[genes[i]], readout[i], moves, raw, weight, mean, theta)
        largest = np.int64(0)
        for j in range(COMPONENTS):
            if weight[j] > rest:
                largest = max(largest, _quantile(1.0 - rest / weight[j], mean[j], theta[j]))
        out[i] = 1 + largest


def table(readout: np.ndarray, start: np.ndarray, moves: np.ndarray, genes: np.ndarray, n: int) -> np.ndarray:
    """Log-probabilities of the counts 0 .. n - 1, (N, n) float64; arguments as in `draw`."""
    check_law(readout, start, moves)
    out = np.empty((genes.size, n))
    _table(readout, start, moves, genes, out)
    return out


def reach(readout: np.ndarray, start: np.ndarray, moves: np.ndarray, genes: np.ndarray, rest: float) -> np.ndarray:
    """How many counts, from 0 on, leave less than `rest` of each law, (N,) int64; arguments as in `draw`."""
    check_law(readout, start, moves)
    out = np.empty(genes.size, np.int64)
    _reach(readout, start, moves, genes, rest, out)
    return out


def check_law(readout: np.ndarray, start: np.ndarray, moves: np.ndarray) -> None:
    """Check that the arrays of a law fit together; else a `UserError`."""
    rank = readout.shape[-1]
    if start.shape[1:] != (COMPONENTS, 3) or moves.shape != (rank, COMPONENTS, 3):
        raise UserError(
            f"a law of {start.shape[1:]} numbers a gene, moved by {moves.shape}; expected ({COMPONENTS}, 3) and "
            f"({rank}, {COMPONENTS}, 3)"
        )
