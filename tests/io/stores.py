"""Small stores that the loader's tests read."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from sedd.errors import SeddWarning
from sedd.io.convert import convert

N_OBS, N_VARS = 3000, 400


@cache
def counts() -> np.ndarray:
    """The matrix of `small_store`: cell 7 and the last cell are empty, one count is large."""
    rng = np.random.default_rng(0)
    dense = rng.poisson(rng.gamma(0.3, 1.0, N_VARS), size=(N_OBS, N_VARS)).astype(np.int32)
    dense[[7, N_OBS - 1]] = 0
    dense[11, 5] = 700
    return dense


@cache
def small_store() -> Path:
    """A store sorted by `cell_type`, with a label `donor` that some cells lack."""
    n = np.arange(N_OBS)
    donor = pd.Series(np.where(n % 3 == 0, "a", "b"), dtype=object)
    donor[n % 10 == 0] = np.nan
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(n * 20 // N_OBS, [f"type{i:02d}" for i in range(20)]),
            "donor": donor.array,
        }
    ).set_index(pd.Index([f"cell{i}" for i in n]))
    var = pd.DataFrame(index=[f"gene{i}" for i in range(N_VARS)])
    folder = Path(mkdtemp(prefix="sedd-test-"))
    ad.AnnData(sp.csr_matrix(counts().astype(np.float32)), obs=obs, var=var).write_h5ad(folder / "small.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SeddWarning)  # two cells are empty
        convert(str(folder / "small.h5ad"), str(folder / "small.zarr"), progress=False)
    return folder / "small.zarr"
