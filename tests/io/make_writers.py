"""Makes the files in `written/`: what every version of anndata writes of the same cells. `tests/io/writers.py` reads them.

Each file is made by the real package. In an environment of its own, `python tests/io/make_writers.py tests/io/written` with

| anndata | Python | beside it |
|---|---|---|
| 0.6.22.post1 | 3.7 | `pandas<1 h5py<3 numpy<1.20 scipy<1.6` |
| 0.7.8 | 3.8 | `pandas<1.4 h5py<3.2 numpy<1.22` |
| 0.8.0 | 3.9 | `pandas<1.6 h5py<3.9 numpy<1.24` |
| 0.10.9 | 3.10 | `pandas<2.3 h5py<3.12 numpy<2` |
| 0.12.19 | 3.11 | what `constraints/3.11.txt` says |
| 0.13.4 | 3.13 | the newest of the day (pandas 3.1.1) |

This file imports nothing of the project and has no newer syntax than the oldest of these Pythons knows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

N_OBS, N_VARS, N_RAW = 45, 20, 26
CELLS = [f"cell-é{i}" for i in range(N_OBS)]
GENES = [f"G{j}/S" if j == 3 else f"G{j}" for j in range(N_RAW)]
TYPES = ["unused", "T", "B", "NK"]

TABLE = {
    "cell_type": [None if i % 7 == 2 else TYPES[1 + i % 3] for i in range(N_OBS)],
    "stage": [("early", "late")[i % 2] for i in range(N_OBS)],
    "donor": [f"d{i % 4}" for i in range(N_OBS)],
    "library": [f"lib ü{i}" for i in range(N_OBS)],
    "passed": [i % 3 > 0 for i in range(N_OBS)],
    "plate": [i % 5 - 1 for i in range(N_OBS)],
    "depth": [None if i % 11 == 4 else i / 4 for i in range(N_OBS)],
}
"""The columns of obs; None is a missing value. `cell_type` and `stage` (which is ordered) are categories."""

LATER = {
    "batch": [None if i % 6 == 1 else i % 3 for i in range(N_OBS)],
    "doublet": [None if i % 8 == 5 else i % 2 == 0 for i in range(N_OBS)],
}
"""Columns with types of pandas that anndata can write since 0.8."""

SYMBOLS = [f"symbol{j}" for j in range(N_RAW)]
COLORS = ["#000000", "#ff0000", "#00ff00", "#0000ff"]


def numbers(shift=0, n_vars=N_VARS):
    """Counts from 0 to 5, most of them 0, that differ between places; cell 5 and gene 7 have none."""
    i, j = np.arange(N_OBS)[:, None], np.arange(n_vars)[None]
    counts = np.maximum((i * 31 + j * 17 + i * j + shift) % 13 - 7, 0).astype(np.float32)
    counts[5], counts[:, 7] = 0, 0
    return counts


def embedding():
    """The array in obsm."""
    return np.arange(N_OBS * 3, dtype=np.float32).reshape(N_OBS, 3) / 8


def obs(later):
    """The table of cells; with the columns of `LATER`, or not."""
    table = {
        name: np.array(values) for name, values in TABLE.items() if name in ("donor", "library", "passed", "plate")
    }
    table["cell_type"] = pd.Categorical(TABLE["cell_type"], categories=TYPES)
    table["stage"] = pd.Categorical(TABLE["stage"], categories=["early", "late"], ordered=True)
    table["depth"] = np.array([np.nan if value is None else value for value in TABLE["depth"]])
    if later:
        table["batch"] = pd.array(LATER["batch"], dtype="Int64")
        table["doublet"] = pd.array(LATER["doublet"], dtype="boolean")
    return pd.DataFrame(table, index=CELLS, columns=[*TABLE, *(LATER if later else [])])


def var(n_vars=N_VARS):
    """The table of genes."""
    return pd.DataFrame({"symbol": SYMBOLS[:n_vars], "variable": np.arange(n_vars) % 2 == 0}, index=GENES[:n_vars])


def write(path, later):
    """Write what is above: X as CSR; as layers a CSC and a dense matrix; raw with more genes."""
    whole = ad.AnnData(sparse.csr_matrix(numbers(3, N_RAW)), obs=obs(later), var=var(N_RAW))
    cells = ad.AnnData(sparse.csr_matrix(numbers()), obs=obs(later), var=var())
    cells.raw = whole
    cells.layers["by_gene"] = sparse.csc_matrix(numbers(1))
    cells.layers["dense"] = numbers(2)
    cells.obsm["X_pca"] = embedding()
    cells.uns["cell_type_colors"] = np.array(COLORS)
    cells.uns["title"] = "ünï"
    cells.write(path)


if __name__ == "__main__":
    version = ".".join(ad.__version__.split(".")[:2])
    write(Path(sys.argv[1]) / f"anndata-{version}.h5ad", later=version not in ("0.6", "0.7"))
