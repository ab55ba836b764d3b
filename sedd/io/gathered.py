"""Statistics of all parts of a conversion, put together."""

from __future__ import annotations

import hashlib

import numpy as np
from scipy import sparse

from sedd.io.parts import load_plan, part_path
from sedd.io.stats import KeyCounter, with_zeros


class Gathered:
    """What the parts in `folder` say of the whole.

    Attributes
    ----------
    n, n_obs : entries and cells
    first : (n_parts + 1,) int64, place of each part's first entry
    dtype : the narrowest type that holds all values
    dtypes : of the values of each part as they are now
    row_nnz, total, largest, hashes : of each cell
    genes : `sum`, `sum_sq`, `nnz`, `max` of each gene
    histogram : (n_vars, max + 1) of counts, None for real values
    """

    def __init__(self, folder: str) -> None:
        plan = load_plan(folder)
        real_values = plan.settings["values"] == "real"
        columns: dict[str, list[np.ndarray]] = {"row_nnz": [], "total": [], "largest": [], "hashes": []}
        counter = KeyCounter(plan.n_vars)
        real = np.concatenate([np.zeros((3, plan.n_vars)), np.full((1, plan.n_vars), -np.inf)])
        self.dtypes: list[np.dtype] = []
        self.rounded = 0
        first = []
        for part in range(plan.n_parts):
            with np.load(f"{part_path(folder, part)}.npz") as meta:
                for key, column in columns.items():
                    column.append(meta[key])
                first.append(int(meta["first"]))
                self.n = first[-1] + int(meta["n"])
                self.rounded += int(meta["rounded"])
                self.dtypes.append(meta["data_edges"].dtype)
                if real_values:
                    real[:3] += meta["gene_real"][:3]
                    np.maximum(real[3], meta["gene_real"][3], out=real[3])
                else:
                    counter.add(meta["keys"], meta["numbers"])
        self.first = np.array([*first, self.n])
        self.row_nnz, self.total, self.largest, self.hashes = (np.concatenate(column) for column in columns.values())
        self.n_obs = self.row_nnz.size
        self.dtype = max(self.dtypes, key=lambda dtype: dtype.itemsize)
        self.max = self.largest.max().item()
        self.histogram: sparse.csr_array | None = None
        if real_values:
            real[3] = np.where(real[2] < self.n_obs, np.maximum(real[3], 0), real[3])  # absent entries are zeros
        else:
            nonzero = counter.histogram(int(self.max))
            self.histogram = with_zeros(nonzero, self.n_obs)
            counts = np.arange(self.histogram.shape[1], dtype=np.int64)
            seen = self.n_obs - self.histogram[:, [0]].toarray().reshape(-1)
            highest = np.zeros(plan.n_vars, np.int64)
            entries = self.histogram.tocoo()
            np.maximum.at(highest, entries.row, entries.col)
            real = np.stack([self.histogram @ counts, self.histogram @ counts**2, seen, highest])
        self.genes = dict(zip(("sum", "sum_sq", "nnz", "max"), real, strict=True))
        self.genes["nnz"] = self.genes["nnz"].astype(np.int64)

    def content(self) -> str:
        """A hash of the matrix: of every cell's entries, in order."""
        return hashlib.blake2b(self.hashes.tobytes(), digest_size=16).hexdigest()
