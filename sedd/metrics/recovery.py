"""How well hidden entries are recovered, and how likely held-out cells are.

A hidden entry is one (cell, gene) pair that the model did not see. All functions take flat arrays, one element per
hidden entry, so a caller may stream cells and concatenate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import spearmanr

from sedd.likelihood import confidence_interval
from sedd.metrics.baselines import CountBaselines
from sedd.metrics.counts import Matrix, to_dense

Rows = dict[str, dict[str, Any]]


def negative_log_score(log_prob: np.ndarray) -> float:
    """Mean of `-log p(true value)`: a proper score, so only the true distribution is best.

    Parameters
    ----------
    log_prob
        Natural logarithms of the probabilities that were given to the true values, any shape.

    Returns
    -------
    score
        In nats per entry; lower is better.
    """
    return float(-np.mean(np.asarray(log_prob, np.float64)))


def mean_absolute_error(true: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of `|true - predicted|`. On sparse counts all zeros is hard to beat: never read it alone.

    Parameters
    ----------
    true
        Counts, any shape.
    predicted
        Expected counts, the same shape.

    Returns
    -------
    error
        In counts.
    """
    return float(np.mean(np.abs(np.asarray(true, np.float64) - predicted)))


def nonzero_mean_absolute_error(true: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of `|true - predicted|` over the entries whose true count is not zero.

    Parameters
    ----------
    true
        Counts, any shape.
    predicted
        Expected counts, the same shape.

    Returns
    -------
    error
        In counts; NaN if all true counts are zero.
    """
    expressed = np.asarray(true) > 0
    return mean_absolute_error(true[expressed], predicted[expressed]) if expressed.any() else float("nan")


def rmse_log1p(true: np.ndarray, predicted: np.ndarray) -> float:
    """Root mean squared error of `log1p(count)`.

    Parameters
    ----------
    true
        Counts, any shape.
    predicted
        Expected counts, the same shape.

    Returns
    -------
    error
        In natural logarithms of 1 + count.
    """
    return float(np.sqrt(np.mean((np.log1p(np.asarray(true, np.float64)) - np.log1p(predicted)) ** 2)))


def spearman(true: np.ndarray, predicted: np.ndarray) -> float:
    """Spearman rank correlation over all entries.

    Parameters
    ----------
    true
        Counts, any shape.
    predicted
        Expected counts, the same shape.

    Returns
    -------
    correlation
        From -1 to 1; NaN if either side is constant.
    """
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    return float(spearmanr(true, predicted).statistic)


def interval_coverage(cdf_below: np.ndarray, cdf: np.ndarray, level: float) -> float:
    """Share of true values inside the central interval of probability `level`; `level` itself when calibrated.

    Parameters
    ----------
    cdf_below, cdf : (k,) predicted `P(X < true)` and `P(X <= true)`
    level : float in (0, 1)

    Returns
    -------
    coverage : float

    Notes
    -----
    A count has no exact 50 % interval: [0, 0] may hold 95 %. So an entry counts with the share of its probability
    step `[cdf_below, cdf]` that lies in the central `level`: the non-randomised probability integral transform of
    Czado, Gneiting and Held (2009), for which a calibrated forecast covers exactly `level` on average.
    """
    below, upto = np.asarray(cdf_below, np.float64), np.asarray(cdf, np.float64)
    low, high = (1 - level) / 2, (1 + level) / 2
    step = upto - below
    inside = np.clip(np.minimum(upto, high) - np.maximum(below, low), 0, None)
    point = (below >= low) & (below <= high)  # a step too small for float: a point
    return float(np.mean(np.where(step > 1e-12, inside / np.maximum(step, 1e-12), point)))


def calibration_histogram(cdf_below: np.ndarray, cdf: np.ndarray, n_bins: int = 20) -> np.ndarray:
    """Non-randomised probability-integral-transform histogram; all ones when calibrated.

    Parameters
    ----------
    cdf_below, cdf : (k,) predicted `P(X < true)` and `P(X <= true)`
    n_bins : int

    Returns
    -------
    density : (n_bins,) float64, mean 1
    """
    below, upto = np.asarray(cdf_below, np.float64), np.asarray(cdf, np.float64)
    edges = np.linspace(0, 1, n_bins + 1)
    step = np.maximum(upto - below, 1e-12)
    reached = np.array([np.mean(np.clip((edge - below) / step, 0, 1)) for edge in edges])
    reached[0], reached[-1] = 0.0, 1.0
    return np.asarray(np.diff(reached) * n_bins)


def recovery_metrics(
    true: np.ndarray,
    predicted: np.ndarray,
    *,
    log_prob: np.ndarray | None = None,
    cdf_below: np.ndarray | None = None,
    cdf: np.ndarray | None = None,
) -> dict[str, float]:
    """Every recovery metric of one method.

    Parameters
    ----------
    true, predicted : (k,) true counts and predicted means of the hidden entries
    log_prob : (k,), optional
        Log probability of the true count; adds `nll`.
    cdf_below, cdf : (k,), optional
        Predicted `P(X < true)` and `P(X <= true)`; add `coverage_50` and `coverage_90`.

    Returns
    -------
    metrics : dict with `nll`, `mae`, `rmse_log1p`, `mae_nonzero`, `spearman`, `coverage_50`, `coverage_90`
    """
    out: dict[str, float] = {} if log_prob is None else {"nll": negative_log_score(log_prob)}
    out["mae"] = mean_absolute_error(true, predicted)
    out["rmse_log1p"] = rmse_log1p(true, predicted)
    out["mae_nonzero"] = nonzero_mean_absolute_error(true, predicted)
    out["spearman"] = spearman(true, predicted)
    if cdf_below is not None and cdf is not None:
        out["coverage_50"] = interval_coverage(cdf_below, cdf, 0.5)
        out["coverage_90"] = interval_coverage(cdf_below, cdf, 0.9)
    return out


def recovery_table(
    baselines: CountBaselines,
    *,
    gene: np.ndarray,
    true: np.ndarray,
    predicted: np.ndarray,
    log_prob: np.ndarray | None = None,
    cdf_below: np.ndarray | None = None,
    cdf: np.ndarray | None = None,
    library: np.ndarray | None = None,
    top: int | None = None,
) -> Rows:
    """Recovery of the model beside every trivial baseline, on the same hidden entries.

    Parameters
    ----------
    baselines : fitted on training cells
    gene, true, predicted : (k,) panel index, true count and predicted mean of each hidden entry
    log_prob, cdf_below, cdf : (k,), optional
        As in `recovery_metrics`.
    library : (k,), optional
        An estimate of the panel total of the entry's cell, from its visible genes only (`visible_library`); adds the
        library-scaled negative binomial.
    top : int, optional
        Counts of `top` and more are one outcome of the model, and then also of the baselines.

    Returns
    -------
    rows : {metric: {"sedd": value, "baselines": {name: value}}}
    """
    ours = recovery_metrics(true, predicted, log_prob=log_prob, cdf_below=cdf_below, cdf=cdf)
    log_probs = baselines.log_probs(gene, true, library, top)
    cdfs = baselines.cdfs(gene, true, library)
    mean = baselines.mean[gene]
    points = dict.fromkeys(log_probs, mean)
    if library is not None:
        points["NB, library-scaled"] = library * baselines.share[gene]
    theirs = {"all zeros": recovery_metrics(true, np.zeros(len(true)))}
    for name, lp in log_probs.items():
        theirs[name] = recovery_metrics(true, points[name], log_prob=lp, cdf_below=cdfs[name][0], cdf=cdfs[name][1])
    return {
        metric: {"sedd": value, "baselines": {name: row[metric] for name, row in theirs.items() if metric in row}}
        for metric, value in ours.items()
    }


def visible_library(counts: Matrix, hidden: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Estimate each cell's panel total from the genes that are visible in it.

    Parameters
    ----------
    counts : (n_cells, n_vars) true counts
    hidden : (n_cells, n_vars) bool
    share : (n_vars,) expected share of each gene, `CountBaselines.share`

    Returns
    -------
    library : (n_cells,) visible molecules divided by the share that the visible genes hold on average
    """
    visible = np.where(hidden, 0, to_dense(counts)).sum(axis=1)
    expected = (~hidden) @ share
    return np.asarray(visible / np.maximum(expected, 1e-12))


def likelihood_table(
    baselines: CountBaselines,
    nelbo: np.ndarray,
    counts: Matrix,
    *,
    top: int | None = None,
    chunk: int = 1024,
) -> Rows:
    """Held-out likelihood beside the baselines that, like the model, are given nothing of a cell.

    Parameters
    ----------
    baselines : fitted on training cells
    nelbo : (n_cells,) nats per cell of the model
    counts : (n_cells, n_vars) the same cells' counts
    top : int, optional
        Counts of `top` and more are one outcome.
    chunk : int
        Cells scored at once.

    Returns
    -------
    rows : `nats_per_cell` and `nats_per_gene`, each with `sedd`, `ci` (95 %, Student's t over cells) and `baselines`
    """
    csr = sparse.csr_array(counts)
    n_cells, n_vars = csr.shape
    gene = np.arange(n_vars)[None, :]
    totals: dict[str, float] = {}
    for start in range(0, n_cells, chunk):
        block = csr[start : start + chunk].toarray().astype(np.int64)
        for name, log_p in baselines.log_probs(gene, block, top=top).items():
            totals[name] = totals.get(name, 0.0) - float(log_p.sum())
    mean, (low, high) = float(np.mean(nelbo)), confidence_interval(np.asarray(nelbo, np.float64))
    per_cell = {name: total / n_cells for name, total in totals.items()}
    return {
        "nats_per_cell": {"sedd": mean, "ci": (low, high), "baselines": per_cell},
        "nats_per_gene": {
            "sedd": mean / n_vars,
            "ci": (low / n_vars, high / n_vars),
            "baselines": {name: value / n_vars for name, value in per_cell.items()},
        },
    }
