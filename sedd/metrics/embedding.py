"""Does an embedding keep cell types apart."""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import KNeighborsClassifier


def knn_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, k: int = 15
) -> float:
    """Share of test cells whose label is that of most of their `k` nearest training cells.

    Parameters
    ----------
    train, test : (n, d) and (m, d) coordinates
    train_labels, test_labels : (n,) and (m,)
    k : int
    """
    model = KNeighborsClassifier(min(k, len(train))).fit(train, train_labels)
    return float(np.mean(model.predict(test) == np.asarray(test_labels)))


def cluster_ari(embedding: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """Return the adjusted Rand index between the labels and k-means with as many clusters as there are labels.

    Parameters
    ----------
    embedding : (n, d) coordinates
    labels : (n,)
    seed : int
    """
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(embedding)
    return float(adjusted_rand_score(labels, clusters))
