"""Do generated cells look like real ones: distances between two sets of cells, and the anchors to read them by.

Cells are compared as `log1p(CP10k)` in principal components that are fitted on real cells of neither side. That matters:
with components fitted on one side, real cells score as badly against real cells as a mediocre model does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import linalg, sparse
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors

from sedd.errors import UserError
from sedd.metrics.baselines import CountBaselines
from sedd.metrics.counts import Matrix, log_cp10k, to_dense

PSEUDO_COUNT = 0.01  # in counts a cell: a gene seen once in 100 cells weighs as much as one never seen
MIN_CELLS = 4
"""Cells of each kind that generation is compared on, at least."""


def fit_pca(cells: Matrix, n_components: int = 50, seed: int = 0) -> PCA:
    """Principal components of `log1p(CP10k)` of cells that take no part in the comparison.

    Parameters
    ----------
    cells : (n_cells, n_vars) counts
    n_components : int
        Lowered to what the cells allow.
    seed : int
    """
    x = log_cp10k(cells)
    return PCA(min(n_components, *x.shape), svd_solver="randomized", random_state=seed).fit(x)


def gaussian_w2(a: np.ndarray, b: np.ndarray) -> float:
    """2-Wasserstein distance between the Gaussians fitted to two point sets (the Fréchet distance).

    Parameters
    ----------
    a, b : (n, d) and (m, d) coordinates

    Returns
    -------
    distance : float, `sqrt(|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)))`
    """
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    # tr (A B)^(1/2) from the symmetric A^(1/2) B A^(1/2): real eigenvalues, no complex square root.
    values, vectors = linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    shift = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2)
    return float(np.sqrt(max(shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross, 0.0)))


def exact_w2(a: np.ndarray, b: np.ndarray) -> float:
    """2-Wasserstein distance between two equally large point sets, by optimal assignment.

    Parameters
    ----------
    a, b : (n, d) coordinates

    Returns
    -------
    distance : float, root of the mean squared distance of the best one-to-one pairing
    """
    if len(a) != len(b):
        raise UserError(f"exact W2 pairs cells one to one, got {len(a)} and {len(b)}; sample the larger set down.")
    cost = cdist(a, b, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def mmd2_unbiased(a: np.ndarray, b: np.ndarray, bandwidth: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel; around 0, also below, for equal distributions.

    Parameters
    ----------
    a, b : (n, d) and (m, d) coordinates
    bandwidth : float, optional
        Standard deviation of the kernel `exp(-d^2 / (2 bandwidth^2))`; default: the median distance between two
        different points of `a`, the reference, so that everything compared with it is measured by the same kernel.
    """
    squared = cdist(np.concatenate([a, b]), np.concatenate([a, b]), "sqeuclidean")
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(squared[: len(a), : len(a)][np.triu_indices(len(a), 1)])))
    kernel = np.exp(squared / (-2 * max(bandwidth, 1e-12) ** 2))
    n, m = len(a), len(b)
    within_a = (kernel[:n, :n].sum() - n) / (n * (n - 1))
    within_b = (kernel[n:, n:].sum() - m) / (m * (m - 1))
    return float(within_a + within_b - 2 * kernel[:n, n:].mean())


def real_or_fake_auc(real: np.ndarray, fake: np.ndarray, *, folds: int = 5, trees: int = 100, seed: int = 0) -> float:
    """Cross-validated area under the ROC curve of a random forest that tells two sets apart; 0.5 is perfect.

    Parameters
    ----------
    real, fake : (n, d) and (m, d) coordinates
    folds, trees, seed : int
    """
    x = np.concatenate([real, fake])
    y = np.repeat([0, 1], [len(real), len(fake)])
    forest = RandomForestClassifier(trees, random_state=seed, n_jobs=1)
    splits = StratifiedKFold(min(folds, len(real), len(fake)), shuffle=True, random_state=seed)
    return float(roc_auc_score(y, cross_val_predict(forest, x, y, cv=splits, method="predict_proba")[:, 1]))


def gene_correlation_error(real: Matrix, other: Matrix, n_genes: int = 500) -> float:
    """Root mean squared difference of gene-gene correlations of `log1p(CP10k)`.

    Parameters
    ----------
    real, other : (n, n_vars) and (m, n_vars) counts
    n_genes : int
        The pairs are those among the `n_genes` genes with the largest mean in `real`; a gene that is constant on one
        side has correlation 0 there.
    """
    dense = to_dense(real)
    top = np.argsort(-dense.mean(axis=0), kind="stable")[:n_genes]

    def correlations(counts: np.ndarray) -> np.ndarray:
        x = log_cp10k(counts)[:, top]
        x = x - x.mean(axis=0)
        norm = np.sqrt((x**2).sum(axis=0))
        x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
        return np.asarray((x.T @ x)[np.triu_indices(len(top), 1)])

    return float(np.sqrt(np.mean((correlations(dense) - correlations(to_dense(other))) ** 2)))


def gene_moments(counts: Matrix) -> dict[str, np.ndarray]:
    """Moments of each gene over the cells.

    Parameters
    ----------
    counts
        (n_cells, n_vars), dense or sparse.

    Returns
    -------
    moments : dict
        `mean` in counts, `variance` in squared counts and `zero_fraction`, each (n_vars,) float64.
    """
    csr = sparse.csr_array(counts).astype(np.float64)
    mean = np.asarray(csr.mean(axis=0)).ravel()
    square = np.asarray(csr.multiply(csr).mean(axis=0)).ravel()
    zero = 1 - np.asarray((csr != 0).sum(axis=0)).ravel() / csr.shape[0]
    return {"mean": mean, "variance": np.maximum(square - mean**2, 0), "zero_fraction": zero}


def gene_moment_errors(real: Matrix, other: Matrix) -> dict[str, float]:
    """How far per-gene moments are off.

    Parameters
    ----------
    real, other
        (n_cells, n_vars) counts of the same genes; the numbers of cells may differ.

    Returns
    -------
    errors : dict
        `gene_mean` and `gene_variance`: mean absolute log2 fold change with a pseudo-count of 0.01;
        `zero_fraction`: mean absolute difference.
    """
    a, b = gene_moments(real), gene_moments(other)
    fold = {k: float(np.mean(np.abs(np.log2((a[k] + PSEUDO_COUNT) / (b[k] + PSEUDO_COUNT))))) for k in a}
    return {
        "gene_mean": fold["mean"],
        "gene_variance": fold["variance"],
        "zero_fraction": float(np.mean(np.abs(a["zero_fraction"] - b["zero_fraction"]))),
    }


def library_ks(real: Matrix, other: Matrix) -> float:
    """Kolmogorov-Smirnov distance between the library sizes of two sets of cells.

    Parameters
    ----------
    real, other
        (n_cells, n_vars) counts; the numbers of cells may differ.

    Returns
    -------
    distance
        From 0 to 1.
    """
    totals = [np.asarray(sparse.csr_array(x).sum(axis=1)).ravel() for x in (real, other)]
    return float(ks_2samp(totals[0], totals[1], method="asymp").statistic)


def nearest_distance(cells: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Distance of each cell to its nearest training cell.

    Parameters
    ----------
    cells, train
        (n_cells, n_components) and (n_train, n_components), in the same coordinates.

    Returns
    -------
    distance : (n_cells,) float64
        Euclidean, in the units of the coordinates.
    """
    return np.asarray(NearestNeighbors(n_neighbors=1).fit(train).kneighbors(cells)[0][:, 0])


def generation_metrics(
    real: Matrix, other: Matrix, *, pca: PCA, train: Matrix | None = None, seed: int = 0, trees: int = 100
) -> dict[str, float]:
    """Every generation metric of one set of cells against real held-out cells.

    Parameters
    ----------
    real, other : (n, n_vars) and (m, n_vars) counts
    pca : from `fit_pca`, on cells of neither side
    train : (k, n_vars) counts, optional
        Cells for `nearest_ratio`: the median distance of `other` to its nearest training cell over that of `real`;
        1 is right, well below 1 is memorisation.
    seed, trees : int
        Of the random forest.

    Returns
    -------
    metrics : dict with `w2`, `w2_exact`, `mmd2`, `auc`, `correlation`, `gene_mean`, `gene_variance`, `zero_fraction`,
        `library_ks` and, with `train`, `nearest_ratio`
    """
    a, b = pca.transform(log_cp10k(real)), pca.transform(log_cp10k(other))
    rng = np.random.default_rng(seed)
    n = min(len(a), len(b))
    pick_a, pick_b = (x if len(x) == n else x[rng.choice(len(x), n, replace=False)] for x in (a, b))
    out = {
        "w2": gaussian_w2(a, b),
        "w2_exact": exact_w2(pick_a, pick_b),
        "mmd2": mmd2_unbiased(a, b),
        "auc": real_or_fake_auc(a, b, seed=seed, trees=trees),
        "correlation": gene_correlation_error(real, other),
        **gene_moment_errors(real, other),
        "library_ks": library_ks(real, other),
    }
    if train is not None:
        anchor = pca.transform(log_cp10k(train))
        reference = float(np.median(nearest_distance(a, anchor)))
        out["nearest_ratio"] = float(np.median(nearest_distance(b, anchor))) / max(reference, 1e-12)
    return out


def generation_split(n_train: int, n_test: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Deal training cells into those for the anchor and those for the components.

    Parameters
    ----------
    n_train, n_test
        Numbers of training and of test cells.
    seed
        Of the random choice.

    Returns
    -------
    anchor, outside : sorted int64 arrays
        At most `n_test` cells, and at least half of the training cells.
    """
    order = np.random.default_rng(seed).permutation(n_train)
    size = min(n_test, n_train // 2)
    return np.sort(order[:size]), np.sort(order[size:])


def generation_table(
    generated: Matrix, real: Matrix, train: Matrix, *, seed: int = 0, max_cells: int = 2000, trees: int = 100
) -> dict[str, dict[str, Any]]:
    """Return the generated cells against held-out cells, beside a baseline and two anchors.

    Parameters
    ----------
    generated, real, train : counts on the same genes: what the model made, held-out cells, training cells
    seed : int
        Seed of the samples and of the random forest.
    max_cells : int
        Larger sets are sampled down to this many cells first (training cells to five times as many), since exact
        distances cost the square or the cube of it.
    trees : int
        Of the random forest.

    Returns
    -------
    rows : {metric: {"sedd": value, "baselines": {"gene marginals": value}, "anchors": {...}}}
        The baseline `gene marginals` draws each gene independently. The anchor `real cells` are training cells, scored
        like generated ones: the value that a perfect model gets. The anchor `training cells copied` draws those with
        replacement: what a model gets that only remembers. The components are fitted on the other training cells.
    """
    rng = np.random.default_rng(seed)
    sets = []
    for counts, limit in ((generated, max_cells), (real, max_cells), (train, 5 * max_cells)):
        csr = sparse.csr_array(counts)
        if csr.shape[0] < MIN_CELLS:
            raise UserError(f"generation is compared on at least {MIN_CELLS} cells a side, got {csr.shape[0]}.")
        sets.append(csr if csr.shape[0] <= limit else csr[np.sort(rng.choice(csr.shape[0], limit, replace=False))])
    fake, held_out, known = sets
    anchor, outside = generation_split(known.shape[0], held_out.shape[0], seed)
    pca = fit_pca(known[outside], seed=seed)
    candidates = {
        "sedd": fake,
        "real cells": known[anchor],
        "training cells copied": known[anchor[rng.integers(len(anchor), size=len(anchor))]],
        "gene marginals": CountBaselines.fit(known, seed=seed).sample(held_out.shape[0], seed),
    }
    scores = {}
    for name, cells in candidates.items():
        others = known[outside] if name == "real cells" else known  # a training cell is not its own neighbour
        scores[name] = generation_metrics(held_out, cells, pca=pca, train=others, seed=seed, trees=trees)
    return {
        metric: {
            "sedd": value,
            "baselines": {"gene marginals": scores["gene marginals"][metric]},
            "anchors": {name: scores[name][metric] for name in ("real cells", "training cells copied")},
        }
        for metric, value in scores["sedd"].items()
    }
