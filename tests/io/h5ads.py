"""Small h5ads in every layout, for the tests of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

PBMC = Path(__file__).parents[2] / "data" / "pbmc3k.h5ad"


def counts(n_obs: int = 70, n_vars: int = 40, density: float = 0.2, largest: int = 30, seed: int = 0) -> sparse.csr_matrix:
    """Random counts with an empty cell and an unseen gene."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, largest + 1, (n_obs, n_vars)) * (rng.random((n_obs, n_vars)) < density)
    dense[n_obs // 2] = 0
    dense[:, n_vars // 2] = 0
    dense[0, 0] = largest
    return sparse.csr_matrix(dense)


def write(path: Path, matrix: Any, genes: list[str] | None = None, **kwargs: Any) -> str:
    """Write an AnnData around `matrix`; the path as text."""
    n_obs, n_vars = matrix.shape
    obs = pd.DataFrame({"kind": pd.Categorical(np.array(["a", "b", "c"])[np.arange(n_obs) % 3])})
    obs.index = [f"cell{i}" for i in range(n_obs)]
    var = pd.DataFrame(index=genes or [f"gene{i}" for i in range(n_vars)])
    writing = {key: kwargs.pop(key) for key in ("compression",) if key in kwargs}
    ad.AnnData(matrix, obs=obs, var=var, **kwargs).write_h5ad(path, **writing)
    return str(path)
