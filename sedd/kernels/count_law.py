"""The law of a gene's count, a mixture of three negative binomials: its probabilities and their gradients.

Component j of a gene has a weight, a mean and a dispersion theta; its variance is `mean + mean**2 / theta`. A gene's own
nine numbers, `start` (n_vars, 3, 3), are moved by `readout @ moves` of the cell: along the last axis lie the logit of the
weight, the log of the mean and the log of theta. Moments are in `sedd.kernels.count_law_moments`, draws and distribution
functions in `count_law_draws`, the law of each gene by itself in `count_law_fit`.

Masked entries are taken a block at a time, number by number, so that LLVM turns the loops into vector instructions; gene by
gene, the cells of a gene one after the other, as the network's product of matrices leaves its readouts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from sedd.kernels.count_law_draws import COMPONENTS, LOG_MEAN, LOG_THETA, check_law, log_factorial, rising
from sedd.kernels.vector_math import BLOCK, exp, log, log1p

_ZERO, _ONE = np.float32(0), np.float32(1)
_SMALL = 8  # counts up to it are taken many at a time
_LOG_FACTORIALS = np.array([math.lgamma(k + 1.0) for k in range(_SMALL + 1)], np.float32)
_MEAN_LOW, _MEAN_HIGH, _THETA_LOW, _THETA_HIGH = (np.float32(x) for x in (*LOG_MEAN, *LOG_THETA))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def fill_laws(start: Any, readout: Any, moves: Any, genes: Any, cells: Any, n: Any, laws: Any) -> None:
    """Write the laws of n genes, each in a cell: logits, log means and log thetas, and what follows from them, a row each.

    Parameters
    ----------
    start : (n_vars, 9), readout : (n_vars, rank, B), moves : (rank, 9)
    genes, cells : (BLOCK,) int64
        Those whose laws are wanted.
    laws : (27, BLOCK) float32
        The nine numbers; three each of weights, thetas, ratios `mean / theta`, `log(1 + ratio)` and log weights; then two rows
        to work in and one that is 0, or not a number if any of the nine is none.
    """
    raw, weight, theta, ratio, q, log_weight = laws[:9], laws[9:12], laws[12:15], laws[15:18], laws[18:21], laws[21:24]
    total, spare, poison = laws[24], laws[25], laws[26]
    bits = np.empty(BLOCK, np.int32)
    for i in range(n):
        for p in range(9):
            raw[p, i] = start[genes[i], p]
    for p in range(9):
        for i in range(n, BLOCK):
            raw[p, i] = _ZERO
    for i in range(n, BLOCK):
        spare[i] = _ZERO
    for r in range(readout.shape[1]):
        for i in range(n):
            spare[i] = readout[genes[i], r, cells[i]]
        for p in range(9):
            move = moves[r, p]
            for i in range(BLOCK):
                raw[p, i] += spare[i] * move
    for i in range(BLOCK):
        poison[i] = _ZERO
        spare[i] = max(raw[0, i], max(raw[3, i], raw[6, i]))
        total[i] = _ZERO
    for p in range(9):
        for i in range(BLOCK):
            poison[i] += raw[p, i] * _ZERO  # not a number if one of them is not; bounds would hide it
    for j in range(COMPONENTS):
        for i in range(BLOCK):
            log_weight[j, i] = raw[3 * j, i] - spare[i]
        exp(log_weight[j], weight[j], bits)
        for i in range(BLOCK):
            total[i] += weight[j, i]
    log(total, spare, bits)
    for j in range(COMPONENTS):
        for i in range(BLOCK):
            weight[j, i] /= total[i]
            log_weight[j, i] -= spare[i]
    for j in range(COMPONENTS):
        for i in range(BLOCK):
            q[j, i] = min(max(raw[3 * j + 2, i], _THETA_LOW), _THETA_HIGH)
        exp(q[j], theta[j], bits)
        for i in range(BLOCK):
            q[j, i] = min(max(raw[3 * j + 1, i], _MEAN_LOW), _MEAN_HIGH) - q[j, i]
        exp(q[j], ratio[j], bits)
        log1p(ratio[j], q[j], bits, spare)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def log_likelihoods(laws: Any, counts: Any, n: Any, part: Any, rise: Any, best: Any, log_p: Any) -> None:
    """Write the log-probability of a count under each law, and the shares of the components in it (in `part`).

    Parameters
    ----------
    counts : (BLOCK,) int64, 0 from n on
    part, rise : (3, BLOCK), best, log_p : (BLOCK,) float32
        `rise` is theta times the derivative of `lgamma(theta + count) - lgamma(theta)`.
    """
    raw, theta, q, log_weight, total, spare = laws[:9], laws[12:15], laws[18:21], laws[21:24], laws[24], laws[25]
    bits = np.empty(BLOCK, np.int32)
    largest = np.int64(0)
    for i in range(n):
        largest = max(largest, counts[i])
    for j in range(COMPONENTS):
        for i in range(BLOCK):
            part[j, i] = log_weight[j, i] - theta[j, i] * q[j, i]
            rise[j, i] = _ZERO
    if largest > 0:
        _add_small_counts(raw, theta, q, counts, spare, total, best, log_p, part, rise)
    if largest > _SMALL:
        for i in range(n):
            k = counts[i]
            if k <= _SMALL:
                continue
            # Of a large count the terms are large and cancel: in float32 hardly a digit of their sum would be right.
            factorial = log_factorial(k)
            for j in range(COMPONENTS):
                t = np.float64(theta[j, i])
                log_ratio = np.float64(min(max(raw[3 * j + 1, i], _MEAN_LOW), _MEAN_HIGH))
                log_ratio -= min(max(raw[3 * j + 2, i], _THETA_LOW), _THETA_HIGH)
                up, slope = rising(t, k)
                log_none = math.log1p(math.exp(log_ratio))
                part[j, i] = log_weight[j, i] + np.float32(up - factorial - (t + k) * log_none + k * log_ratio)
                rise[j, i] = np.float32(t * slope)
    for i in range(BLOCK):
        best[i] = max(part[0, i], max(part[1, i], part[2, i]))
        total[i] = _ZERO
    for j in range(COMPONENTS):
        for i in range(BLOCK):
            spare[i] = part[j, i] - best[i]
        exp(spare, part[j], bits)
        for i in range(BLOCK):
            total[i] += part[j, i]
    log(total, spare, bits)
    for i in range(BLOCK):
        log_p[i] = best[i] + spare[i] + laws[26, i]
    for j in range(COMPONENTS):
        for i in range(BLOCK):
            part[j, i] /= total[i]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _add_small_counts(
    raw: Any, theta: Any, q: Any, counts: Any, factorial: Any, k: Any, product: Any, logs: Any, part: Any, rise: Any
) -> None:
    """Add to `part` what counts up to `_SMALL` have beyond a 0: `log(prod_i (1 + i / theta) / k!) + k (log mean - q)`, i < k."""
    bits = np.empty(BLOCK, np.int32)
    for i in range(BLOCK):
        here = counts[i] if counts[i] <= _SMALL else 0
        factorial[i] = _LOG_FACTORIALS[here]
        k[i] = np.float32(here)
    for j in range(COMPONENTS):
        for i in range(BLOCK):
            inverse = _ONE / theta[j, i]
            one, slope = _ONE, _ZERO  # the product, and its derivative by log theta over what follows
            for s in range(_SMALL):
                factor = _ONE + np.float32(s) * inverse
                inside = k[i] > np.float32(s)
                slope = slope * factor + one if inside else slope
                one = one * factor if inside else one
            product[i] = one
            rise[j, i] = slope / one
        log(product, logs, bits)
        for i in range(BLOCK):
            log_mean = min(max(raw[3 * j + 1, i], _MEAN_LOW), _MEAN_HIGH)
            part[j, i] += logs[i] - factorial[i] + k[i] * (log_mean - q[j, i])


@numba.njit(cache=True, nogil=True, error_model="numpy")
def slopes_of(laws: Any, counts: Any, part: Any, rise: Any, slope: Any) -> None:
    """Write the derivatives of the log-probability of `counts` by the nine numbers of each law, (9, BLOCK)."""
    raw, weight, theta, ratio, q = laws[:9], laws[9:12], laws[12:15], laws[15:18], laws[18:21]
    for j in range(COMPONENTS):
        for i in range(BLOCK):
            mean = theta[j, i] * ratio[j, i]
            pull = (np.float32(counts[i]) - mean) / (_ONE + ratio[j, i])
            slope[3 * j, i] = part[j, i] - weight[j, i]
            inside = (raw[3 * j + 1, i] >= _MEAN_LOW) & (raw[3 * j + 1, i] <= _MEAN_HIGH)
            slope[3 * j + 1, i] = part[j, i] * pull if inside else _ZERO
            inside = (raw[3 * j + 2, i] >= _THETA_LOW) & (raw[3 * j + 2, i] <= _THETA_HIGH)
            slope[3 * j + 2, i] = part[j, i] * (rise[j, i] - theta[j, i] * q[j, i] - pull) if inside else _ZERO


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _log_probs(
    readout: Any, start: Any, moves: Any, targets: Any, masked: Any, out: Any, slopes: Any, genes: Any, cells: Any, sizes: Any
) -> Any:
    laws = np.empty((27, BLOCK), np.float32)
    part, rise = np.empty((COMPONENTS, BLOCK), np.float32), np.empty((COMPONENTS, BLOCK), np.float32)
    best, log_p = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    # Zeros, most of the counts, have blocks of their own, which cost less.
    waiting = np.zeros(2, np.int64)
    gene, cell, count = np.empty((2, BLOCK), np.int64), np.empty((2, BLOCK), np.int64), np.zeros((2, BLOCK), np.int64)
    done = 0
    for g in range(masked.shape[1] + 1):
        last = g == masked.shape[1]
        for b in range(2 if last else masked.shape[0]):  # at last what is left of both kinds
            kind = np.int64(b)
            if not last:
                if not masked[b, g]:
                    continue
                k = np.int64(targets[b, g])
                kind = np.int64(k > 0)
                i = waiting[kind]
                gene[kind, i], cell[kind, i], count[kind, i] = g, b, k
                waiting[kind] = i + 1
            n = waiting[kind]
            if n < BLOCK and not (last and n > 0):
                continue
            for i in range(n, BLOCK):
                count[kind, i] = 0
            fill_laws(start, readout, moves, gene[kind], cell[kind], n, laws)
            log_likelihoods(laws, count[kind], n, part, rise, best, log_p)
            for i in range(n):
                out[cell[kind, i], gene[kind, i]] = log_p[i]
            if slopes.shape[0] > 0:
                slopes_of(laws, count[kind], part, rise, slopes[done])
                for i in range(n):
                    genes[done, i], cells[done, i] = gene[kind, i], cell[kind, i]
                sizes[done] = n
            done += 1
            waiting[kind] = 0
    return done


@numba.njit(cache=True, nogil=True, fastmath=True)
def _gradients(
    slopes: Any, genes: Any, cells: Any, sizes: Any, upstream: Any, readout: Any, moves: Any,
    to_readout: Any, to_start: Any, to_moves: Any,
) -> None:  # fmt: skip
    rank, work = moves.shape[0], np.zeros((2, BLOCK), np.float32)
    factor, value = work[0], work[1]
    for d in range(sizes.shape[0]):
        n, slope = sizes[d], slopes[d]
        for i in range(n):
            factor[i] = upstream[cells[d, i], genes[d, i]]
        for i in range(n, BLOCK):
            factor[i] = _ZERO
        for p in range(9):
            for i in range(n):
                slope[p, i] *= factor[i]
                to_start[genes[d, i], p] += slope[p, i]
            for i in range(n, BLOCK):
                slope[p, i] = _ZERO
        for r in range(rank):
            for i in range(n):
                value[i] = readout[genes[d, i], r, cells[d, i]]
            for p in range(9):
                total = _ZERO
                for i in range(BLOCK):
                    total += value[i] * slope[p, i]
                to_moves[r, p] += total
            for i in range(BLOCK):
                value[i] = _ZERO
            for p in range(9):
                for i in range(BLOCK):
                    value[i] += slope[p, i] * moves[r, p]
            for i in range(n):
                to_readout[genes[d, i], r, cells[d, i]] = value[i]


class Slopes(NamedTuple):
    """Derivatives of log-probabilities by the nine numbers of each law, a block of masked entries after the other.

    Attributes
    ----------
    by_number : (blocks, 9, BLOCK) float32
    genes, cells : (blocks, BLOCK) int32
    sizes : (blocks,) int64
        How many entries each block has.
    """

    by_number: np.ndarray
    genes: np.ndarray
    cells: np.ndarray
    sizes: np.ndarray


def by_gene(readout: np.ndarray) -> np.ndarray:
    """Lay out a readout (B, n_vars, rank) as (n_vars, rank, B) float32, as a network's product of matrices may have left it."""
    return np.ascontiguousarray(readout.transpose(1, 2, 0), np.float32)


def log_probs(
    readout: np.ndarray, start: np.ndarray, moves: np.ndarray, targets: np.ndarray, masked: np.ndarray, *, slopes: bool = False
) -> tuple[np.ndarray, Slopes]:
    """Log-probabilities of counts and their derivatives by the numbers of the law.

    Parameters
    ----------
    readout : (B, n_vars, rank) float32
    start : (n_vars, 3, 3) float32
    moves : (rank, 3, 3) float32
    targets : (B, n_vars) integers >= 0
    masked : (B, n_vars) bool
        Where they are wanted.
    slopes : bool
        Whether the derivatives are.

    Returns
    -------
    log_p : (B, n_vars) float32, 0 where not wanted
    slopes : Slopes, empty if not wanted
    """
    check_law(readout, start, moves)
    out = np.zeros(masked.shape, np.float32)
    n_blocks = np.count_nonzero(masked) // BLOCK + 2 if slopes else 0
    found = Slopes(
        np.empty((n_blocks, COMPONENTS * 3, BLOCK), np.float32),
        np.empty((n_blocks, BLOCK), np.int32),
        np.empty((n_blocks, BLOCK), np.int32),
        np.empty(n_blocks, np.int64),
    )
    given = by_gene(readout), start.reshape(-1, 9), moves.reshape(-1, 9), targets, masked
    done = _log_probs(*given, out, *found)
    return out, Slopes(*(array[:done] for array in found))


def gradients(
    slopes: Slopes, upstream: np.ndarray, readout: np.ndarray, moves: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Carry the gradient of `log_probs` on to readout, start and moves, each of its own shape, float32.

    Parameters
    ----------
    slopes, readout, moves
        Of `log_probs`; the slopes are used up.
    upstream : (B, n_vars) float32
    """
    n_cells, n_vars, rank = readout.shape
    to_readout = np.zeros((n_vars, rank, n_cells), np.float32)
    to_start = np.zeros((n_vars, COMPONENTS * 3), np.float32)
    to_moves = np.zeros((rank, COMPONENTS * 3))
    _gradients(*slopes, upstream, by_gene(readout), moves.reshape(rank, -1), to_readout, to_start, to_moves)
    whole = to_readout.transpose(2, 0, 1), to_start.reshape(-1, COMPONENTS, 3), to_moves.reshape(moves.shape).astype(np.float32)
    return whole
