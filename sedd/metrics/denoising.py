"""Denoising by molecular cross-validation: hide some molecules of every cell, predict them from the rest.

The protocol is that of Batson, Royer and Webber (2019) and of the Open Problems benchmark, with the arguments of the
Poisson likelihood the right way round: the prediction is the rate, the held-out counts are the data.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from sedd.errors import UserError
from sedd.metrics.counts import Matrix, log_cp10k, to_dense


def split_molecules(
    counts: Matrix, fraction: float, rng: np.random.Generator
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Deal each molecule to one of two halves, at random.

    Parameters
    ----------
    counts : (n_cells, n_vars) non-negative integers, dense or sparse
    fraction : float in (0, 1)
        Probability that a molecule goes to the first part.
    rng : numpy.random.Generator

    Returns
    -------
    kept, held_out : (n_cells, n_vars) int64 CSR; their sum is `counts`
    """
    if not 0 < fraction < 1:
        raise UserError(f"fraction is {fraction!r}; expected a share between 0 and 1.")
    csr = sparse.csr_array(counts)
    values = csr.data.astype(np.int64)
    if not np.array_equal(values, csr.data) or values.min(initial=0) < 0:
        raise UserError("only whole, non-negative counts have molecules to split; pass raw counts.")
    first = rng.binomial(values, fraction)
    parts = [sparse.csr_array((v, csr.indices.copy(), csr.indptr.copy()), csr.shape) for v in (first, values - first)]
    for part in parts:
        part.eliminate_zeros()
    return parts[0], parts[1]


def mse_log_cp10k(predicted: Matrix, held_out: Matrix, *, predicted_is_log: bool = False) -> float:
    """Mean squared error of `log1p(CP10k)`, over all cells and genes.

    Parameters
    ----------
    predicted : (n_cells, n_vars)
        Denoised counts on any per-cell scale or, with `predicted_is_log`, an estimate of `log1p(CP10k)` itself, which
        is the better thing to submit: the error rewards the posterior mean in the log domain.
    held_out : (n_cells, n_vars) held-out counts
    predicted_is_log : bool
    """
    estimate = to_dense(predicted) if predicted_is_log else log_cp10k(predicted)
    return float(np.mean((estimate - log_cp10k(held_out)) ** 2))


def poisson_nll(predicted: Matrix, held_out: Matrix, kept: Matrix, epsilon: float = 1e-6) -> float:
    """Poisson negative log likelihood of the held-out counts, without the constant `log(count!)`.

    Parameters
    ----------
    predicted : (n_cells, n_vars)
        Denoised counts on any per-cell scale.
    held_out, kept : (n_cells, n_vars) counts
        Each cell of `predicted` is scaled to its total in `kept`, then by `sum(held_out) / sum(kept)`: the rate at
        which held-out molecules are expected.
    epsilon : float
        Added to the rate inside the logarithm, so that a molecule where none was predicted costs a finite 13.8 nats.

    Returns
    -------
    nll : float, nats per cell and gene
    """
    rate, data, seen = to_dense(predicted), to_dense(held_out), to_dense(kept)
    if rate.min(initial=0) < 0:
        raise UserError("predicted has negative values; a Poisson rate is at least 0 (clip the prediction first).")
    total = rate.sum(axis=1, keepdims=True)
    scale = np.divide(seen.sum(axis=1, keepdims=True), total, out=np.zeros_like(total), where=total > 0)
    rate = rate * scale * (data.sum() / seen.sum())
    return float(np.mean(rate - data * np.log(rate + epsilon)))


def expected_log_cp10k(rate: Matrix, depth: np.ndarray, target: float = 1e4) -> np.ndarray:
    """Return the expectation of `log1p(CP10k)` of counts that are Poisson with these rates, in cells of known depth.

    Parameters
    ----------
    rate : (n_cells, n_vars) expected counts, non-negative
    depth : (n_cells,) positive totals that the counts will be divided by
    target : float

    Returns
    -------
    log_counts : (n_cells, n_vars) float64, the prediction that minimises `mse_log_cp10k` if the rates are right

    Notes
    -----
    At a depth of 100 molecules a single one is 100 CP10k, so the expected logarithm lies far below the logarithm of the
    expectation. The mean squared error rewards whoever submits the former; the benchmark gives it to every method.
    """
    rates = to_dense(rate)
    scale = target / np.asarray(depth, np.float64)[:, None]
    out, probability = np.zeros_like(rates), np.exp(-rates)
    reach = float(rates.max(initial=0))
    for count in range(1, int(reach + 8 * np.sqrt(reach) + 12)):
        probability = probability * rates / count
        out += probability * np.log1p(count * scale)
    return out


def denoising_metrics(
    predicted: Matrix, held_out: Matrix, kept: Matrix, *, predicted_log: Matrix | None = None
) -> dict[str, float]:
    """Score one method on molecules that it did not see.

    Parameters
    ----------
    predicted
        (n_cells, n_vars) denoised counts on any per-cell scale.
    held_out, kept
        (n_cells, n_vars) counts: the molecules that were taken away, and those that the method saw.
    predicted_log
        If given, (n_cells, n_vars) expected log1p(CP10k), which `mse` scores in place of `predicted`.

    Returns
    -------
    metrics : dict
        `mse` as of `mse_log_cp10k`, and `poisson` as of `poisson_nll`, in nats per cell and gene; both are lower where better.
    """
    return {
        "mse": mse_log_cp10k(predicted, held_out)
        if predicted_log is None
        else mse_log_cp10k(predicted_log, held_out, predicted_is_log=True),
        "poisson": poisson_nll(predicted, held_out, kept),
    }


def denoising_table(
    predicted: Matrix,
    held_out: Matrix,
    kept: Matrix,
    train_mean: np.ndarray,
    *,
    predicted_log: Matrix | None = None,
) -> dict[str, dict[str, object]]:
    """Denoising of the model beside doing nothing and the gene mean.

    Parameters
    ----------
    predicted, held_out, kept, predicted_log : as in `denoising_metrics`
    train_mean : (n_vars,) mean training count of each gene

    Returns
    -------
    rows : {metric: {"sedd": value, "baselines": {"no denoising": value, "gene mean": value}}}
    """
    ours = denoising_metrics(predicted, held_out, kept, predicted_log=predicted_log)
    average = np.broadcast_to(train_mean, to_dense(held_out).shape)
    theirs = {
        "no denoising": denoising_metrics(kept, held_out, kept),
        "gene mean": denoising_metrics(average, held_out, kept),
    }
    return {
        metric: {"sedd": value, "baselines": {name: row[metric] for name, row in theirs.items()}}
        for metric, value in ours.items()
    }
