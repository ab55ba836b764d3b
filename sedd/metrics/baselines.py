"""What a model without any knowledge of the other genes would say: the baselines beside every number.

Each baseline is learned from training counts alone. Point estimates are `all zeros` and `gene mean`; distributions are
the Poisson and the negative binomial of each gene, the latter also scaled by the cell's library size, and the product
of the genes' marginals (a smoothed histogram per gene).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.special import digamma, gammaln
from scipy.stats import nbinom, poisson

from sedd.binning import smoothed_log_shares
from sedd.metrics.counts import Matrix

MAX_DISPERSION = 1e6  # beyond this a negative binomial is a Poisson to float precision
_MIN_MEAN = 1e-8  # a gene never seen in training still has to give a finite score when it is seen later
_BISECTIONS = 50
_MOST_ENTRIES = 1 << 24


def count_histogram(counts: Matrix, n_values: int | None = None) -> np.ndarray:
    """How often each gene takes each count.

    Parameters
    ----------
    counts : (n_cells, n_vars) non-negative integers, dense or sparse
    n_values : int, optional
        Number of columns; counts of `n_values - 1` and more share the last one. Default: the largest count + 1.

    Returns
    -------
    histogram : (n_vars, n_values) int64, each row sums to n_cells
    """
    csc = sparse.csc_array(counts)
    csc.eliminate_zeros()
    values = csc.data.astype(np.int64)
    width = int(values.max(initial=0)) + 1 if n_values is None else n_values
    gene = np.repeat(np.arange(csc.shape[1]), np.diff(csc.indptr))
    flat = np.bincount(gene * width + np.minimum(values, width - 1), minlength=csc.shape[1] * width)
    histogram = flat.reshape(csc.shape[1], width).astype(np.int64)
    histogram[:, 0] += csc.shape[0] - np.diff(csc.indptr)
    return histogram


def nb_log_prob(
    counts: np.ndarray, mean: np.ndarray, dispersion: np.ndarray | float, top: int | None = None
) -> np.ndarray:
    """Log probability of counts under a negative binomial with variance `mean + mean**2 / dispersion`.

    Parameters
    ----------
    counts, mean, dispersion : broadcastable arrays
    top : int, optional
        Counts of `top` and more are one outcome, which gets the mass of the whole tail.

    Returns
    -------
    log_p : float64, the broadcast shape
    """
    x, mu, theta = np.broadcast_arrays(
        np.asarray(counts, np.float64),
        np.maximum(np.asarray(mean, np.float64), _MIN_MEAN),
        np.asarray(dispersion, np.float64),
    )
    log_p = (
        gammaln(x + theta)
        - gammaln(theta)
        - gammaln(x + 1)
        - theta * np.log1p(mu / theta)
        + x * (np.log(mu) - np.log(theta + mu))
    )
    poissonian = theta >= MAX_DISPERSION  # gammaln(x + theta) - gammaln(theta) cancels catastrophically there
    log_p = np.where(poissonian, x * np.log(mu) - mu - gammaln(x + 1), log_p)
    if top is not None:
        tail = x >= top
        with np.errstate(divide="ignore"):
            log_p = np.where(tail, np.maximum(nbinom.logsf(top - 1, theta, theta / (theta + mu)), -745.0), log_p)
    return log_p


def nb_cdf(counts: np.ndarray, mean: np.ndarray, dispersion: np.ndarray) -> np.ndarray:
    """Probability of at most so many counts under a negative binomial.

    Parameters
    ----------
    counts
        Any shape; below zero the probability is 0.
    mean, dispersion
        As of `nb_log_prob`, of a shape that goes with `counts`.

    Returns
    -------
    probability
        The shape of `counts`.
    """
    mu = np.maximum(mean, _MIN_MEAN)
    return np.asarray(nbinom.cdf(counts, dispersion, dispersion / (dispersion + mu)))


def fit_nb_dispersion(counts: Matrix, library: np.ndarray | None = None) -> np.ndarray:
    """Maximum-likelihood dispersion of each gene, the mean being `gene mean` or `library share x library`.

    Parameters
    ----------
    counts : (n_cells, n_vars) non-negative integers, dense or sparse
    library : (n_cells,) positive, optional
        Totals that scale the means; the mean of gene j in cell i is then `library[i] * sum_j / sum(library)`.

    Returns
    -------
    dispersion : (n_vars,) float64; `MAX_DISPERSION` where a gene is no more variable than a Poisson

    Notes
    -----
    Bisection on the derivative of the log likelihood with respect to log dispersion, all genes at once. Zero counts
    add nothing to the digamma terms, so only non-zeros are visited there.
    """
    csc = sparse.csc_array(counts).astype(np.float64)
    n_cells, n_vars = csc.shape
    size = np.ones(n_cells) if library is None else np.asarray(library, np.float64)
    share = np.asarray(csc.sum(axis=0)).ravel() / max(size.sum(), _MIN_MEAN)
    gene = np.repeat(np.arange(n_vars), np.diff(csc.indptr))
    levels, multiplicity = np.unique(size, return_counts=True)
    expected = levels[:, None] * share[None, :]
    observed_at = size[csc.indices] * share[gene]

    def slope(theta: np.ndarray) -> np.ndarray:
        per_gene = theta[gene]
        nonzero = digamma(csc.data + per_gene) - digamma(per_gene) - csc.data / (per_gene + observed_at)
        total = np.bincount(gene, nonzero, minlength=n_vars)
        rest = np.log(theta) - np.log(theta + expected) + expected / (theta + expected)
        return np.asarray(total + multiplicity @ rest)

    low, high = np.full(n_vars, np.log(1e-4)), np.full(n_vars, np.log(MAX_DISPERSION))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        rising = slope(np.exp(middle)) > 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    dispersion = np.exp((low + high) / 2)
    dispersion[(share <= 0) | (dispersion > 0.5 * MAX_DISPERSION)] = MAX_DISPERSION
    return dispersion


@dataclass(frozen=True)
class CountBaselines:
    """Per-gene distributions learned from training counts; make one with `CountBaselines.fit`.

    Attributes
    ----------
    mean : (n_vars,) mean training count
    histogram : (n_vars, n_values) how many training cells have each count
    log_p : (n_vars, n_values) smoothed log marginals; counts of `n_values - 1` and more share the last value
    dispersion : (n_vars,) of the negative binomial with mean `mean`
    share : (n_vars,) share of a cell's molecules; `library * share` is the library-scaled mean
    dispersion_scaled : (n_vars,) of the library-scaled negative binomial
    """

    mean: np.ndarray
    histogram: np.ndarray
    log_p: np.ndarray
    dispersion: np.ndarray
    share: np.ndarray
    dispersion_scaled: np.ndarray

    @classmethod
    def fit(
        cls, train: Matrix, *, n_values: int | None = None, max_cells: int = 20_000, seed: int = 0
    ) -> CountBaselines:
        """Learn the baselines.

        Parameters
        ----------
        train : (n_cells, n_vars) training counts on the gene panel
        n_values : int, optional
            Number of distinct values of the marginals; default: the largest training count + 2, so that a larger count
            in a test cell has a (small) probability. Where the table would have more than 2**24 entries, as of reads in the
            millions, the largest counts share the last value, which favours this baseline.
        max_cells : int
            More cells than this are sampled down for the negative binomials, which then change in the third digit only.
        seed : int
            Seed of that sampling.
        """
        csr = sparse.csr_array(train)
        csr.eliminate_zeros()
        width = n_values or min(int(csr.data.max(initial=0)) + 2, max(256, _MOST_ENTRIES // max(1, csr.shape[1])))
        histogram = count_histogram(csr, width)
        mean = np.asarray(csr.sum(axis=0)).ravel() / csr.shape[0]
        if csr.shape[0] > max_cells:
            csr = csr[np.sort(np.random.default_rng(seed).choice(csr.shape[0], max_cells, replace=False))]
        library = np.asarray(csr.sum(axis=1)).ravel()
        csr, library = csr[library > 0], library[library > 0]
        return cls(
            mean=mean,
            histogram=histogram,
            log_p=smoothed_log_shares(histogram, 1.0 / (1.0 + np.arange(histogram.shape[1]))),
            dispersion=fit_nb_dispersion(csr),
            share=mean / max(mean.sum(), _MIN_MEAN),
            dispersion_scaled=fit_nb_dispersion(csr, library),
        )

    def log_probs(
        self, gene: np.ndarray, counts: np.ndarray, library: np.ndarray | None = None, top: int | None = None
    ) -> dict[str, np.ndarray]:
        """Log probability of each entry under each distribution.

        Parameters
        ----------
        gene, counts : broadcastable integer arrays: which gene, which count
        library : broadcastable, optional
            The total of the entry's cell as far as it is known; adds the library-scaled negative binomial.
        top : int, optional
            Counts of `top` and more are one outcome (the last bin of a model with fewer bins than counts).

        Returns
        -------
        log_p : dict of name -> float64 array
        """
        gene, counts = np.broadcast_arrays(gene, counts)
        last = self.log_p.shape[1] - 1
        out = {
            "gene mean (Poisson)": nb_log_prob(counts, self.mean[gene], MAX_DISPERSION, top),
            "NB per gene": nb_log_prob(counts, self.mean[gene], self.dispersion[gene], top),
        }
        if library is not None:
            scaled = np.asarray(library, np.float64) * self.share[gene]
            out["NB, library-scaled"] = nb_log_prob(counts, scaled, self.dispersion_scaled[gene], top)
        out["gene marginals"] = self.log_p[gene, np.minimum(counts, last if top is None else min(top, last))]
        return out

    def cdfs(
        self, gene: np.ndarray, counts: np.ndarray, library: np.ndarray | None = None
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """`P(X < count)` and `P(X <= count)` of each entry under each distribution, named as in `log_probs`."""
        gene, counts = np.broadcast_arrays(gene, counts)
        mean = np.maximum(self.mean[gene], _MIN_MEAN)
        cumulative = np.concatenate([np.zeros((len(self.mean), 1)), np.exp(self.log_p).cumsum(axis=1)], axis=1)
        clipped = np.minimum(counts, self.log_p.shape[1] - 1)
        out = {
            "gene mean (Poisson)": (poisson.cdf(counts - 1, mean), poisson.cdf(counts, mean)),
            "NB per gene": tuple(nb_cdf(counts - k, self.mean[gene], self.dispersion[gene]) for k in (1, 0)),
        }
        if library is not None:
            scaled = np.asarray(library, np.float64) * self.share[gene]
            out["NB, library-scaled"] = tuple(nb_cdf(counts - k, scaled, self.dispersion_scaled[gene]) for k in (1, 0))
        out["gene marginals"] = (cumulative[gene, clipped], cumulative[gene, clipped + 1])
        return out

    def sample(self, n_cells: int, seed: int = 0) -> np.ndarray:
        """Cells whose genes are independent draws from the training counts: `(n_cells, n_vars)` int64.

        Smoothing would be wrong here: a uniform floor under every count gives silent genes large counts now and then.
        """
        rng = np.random.default_rng(seed)
        out = np.empty((n_cells, len(self.mean)), dtype=np.int64)
        for j, row in enumerate(self.histogram.cumsum(axis=1)):
            out[:, j] = np.searchsorted(row, rng.integers(row[-1], size=n_cells), side="right")
        return out
