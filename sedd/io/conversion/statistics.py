"""What was counted in all shards of a conversion, put together."""

from __future__ import annotations

import hashlib

import numpy as np
from scipy import sparse

from sedd.io.conversion.inputs import Plan
from sedd.io.conversion.shard import n_entries, result_path
from sedd.io.format.histogram import KeyCounter, with_zeros
from sedd.io.format.shards import n_shards


class Gathered:
    """What the shards say of the whole.

    Attributes
    ----------
    n, n_obs : entries and cells
    dtype : the narrowest type that holds all values
    dtypes : of the values of each shard as they are now
    row_nnz, total, largest, hashes : of each cell
    genes : `sum`, `sum_sq`, `nnz`, `max` of each gene
    histogram : (n_vars, max + 1) of counts, None for real values
    """

    def __init__(self, plan: Plan) -> None:
        real_values = plan.settings["values"] == "real"
        self.n, self.n_obs = n_entries(plan), plan.n_obs
        self.row_nnz, self.hashes = np.zeros(self.n_obs, np.int32), np.zeros(self.n_obs, np.uint64)
        self.total = np.zeros(self.n_obs, np.float64 if real_values else np.int64)
        self.largest = np.full(self.n_obs, -np.inf, np.float32) if real_values else np.zeros(self.n_obs, np.uint32)
        counter = KeyCounter(plan.n_vars)
        real = np.concatenate([np.zeros((3, plan.n_vars)), np.full((1, plan.n_vars), -np.inf)])
        self.dtypes: list[np.dtype] = []
        self.rounded = 0
        for number in range(n_shards(self.n)):
            with np.load(result_path(plan, number)) as result:
                first = int(result["row"])
                rows = slice(first, first + result["row_nnz"].size)
                self.row_nnz[rows] += result["row_nnz"].astype(np.int32)  # a cell may be in two shards
                self.total[rows] += result["total"]
                self.hashes[rows] += result["hashes"]
                np.maximum(self.largest[rows], result["largest"], out=self.largest[rows])
                self.rounded += int(result["rounded"])
                self.dtypes.append(np.dtype(str(result["dtype"])))
                if real_values:
                    real[:3] += result["gene_real"][:3]
                    np.maximum(real[3], result["gene_real"][3], out=real[3])
                else:
                    counter.add(result["keys"], result["numbers"])
        empty = np.dtype(np.float32) if real_values else np.dtype(plan.narrow)
        self.dtype = max(self.dtypes, key=lambda dtype: dtype.itemsize, default=empty)
        self.largest[self.row_nnz == 0] = 0
        self.max = self.largest.max().item()
        self.histogram: sparse.csr_array | None = None
        if real_values:
            real[3] = np.where(real[2] < self.n_obs, np.maximum(real[3], 0), real[3])  # absent entries are zeros
        else:
            nonzero = counter.histogram(int(self.max))
            self.histogram = with_zeros(nonzero, self.n_obs)
            real = _of_genes(nonzero)
        self.genes = dict(zip(("sum", "sum_sq", "nnz", "max"), real, strict=True))
        self.genes["nnz"] = self.genes["nnz"].astype(np.int64)

    def content(self) -> str:
        """Return a hash of the matrix: of every cell's entries, in order."""
        return hashlib.blake2b(self.hashes.tobytes(), digest_size=16).hexdigest()


def _of_genes(nonzero: sparse.csr_array) -> np.ndarray:
    """Sum, sum of squares, number and largest of the non-zeros of each gene, from their histogram.

    Entry by entry: a table of all numbers up to the largest count may not fit into memory.
    """
    entries = nonzero.tocoo()
    n_vars, counts = nonzero.shape[0], entries.col.astype(np.int64) + 1
    highest = np.zeros(n_vars, np.int64)
    np.maximum.at(highest, entries.row, counts)
    weighted = counts * entries.data
    largest = int(highest.max(initial=0))
    exact = np.dtype(np.int64 if largest**2 * int(nonzero.sum()) < 1 << 63 else np.float64)
    sums = np.zeros((3, n_vars), exact)
    for own, weights in zip(sums, (weighted, weighted.astype(exact) * counts, entries.data), strict=True):
        np.add.at(own, entries.row, weights)
    return np.concatenate([sums, highest[None]])
