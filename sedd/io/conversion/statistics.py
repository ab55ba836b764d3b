"""What was counted in all shards of a conversion, or in several stores, put together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from sedd.io.conversion.inputs import Plan
from sedd.io.conversion.shard import n_entries, result_path
from sedd.io.format.histogram import KeyCounter, with_zeros
from sedd.io.format.shards import n_shards
from sedd.io.store import CellStore


class Statistics:
    """What a store says of its cells and genes.

    Attributes
    ----------
    n, n_obs : entries and cells
    row_nnz, total, largest, hashes : of each cell
    genes : `sum`, `sum_sq`, `nnz`, `max` of each gene
    histogram : (n_vars, max + 1) of counts, None for real values
    rounded : values that were not quite integers
    """

    n: int
    n_obs: int
    row_nnz: np.ndarray
    total: np.ndarray
    largest: np.ndarray
    hashes: np.ndarray
    genes: dict[str, np.ndarray]
    histogram: sparse.csr_array | None
    rounded: int

    @property
    def max(self) -> int | float:
        """The largest value."""
        return self.largest.max().item()

    def content(self) -> str:
        """Return a hash of the matrix: of every cell's entries, in order."""
        return hashlib.blake2b(self.hashes.data, digest_size=16).hexdigest()


class OfStores(Statistics):
    """Statistics of the cells of stores of the same genes, one store after the other, from what each has of its own."""

    def __init__(self, stores: Sequence[CellStore]) -> None:
        self.n, self.n_obs = sum(store.nnz for store in stores), sum(store.n_obs for store in stores)
        cells, genes = [store.cell_table() for store in stores], [store.gene_stats() for store in stores]
        self.row_nnz, self.total, self.largest, self.hashes = (
            np.concatenate([table[name] for table in cells]) for name in ("n_genes", "total", "max", "hash")
        )
        self.rounded = sum(int(store.uns_sedd["rounded"]) for store in stores)
        self.histogram = None
        if stores[0].is_counts:
            own = [store.gene_histogram()[:, 1:].tocsr() for store in stores]
            width = max(part.shape[1] for part in own)
            for part in own:
                part.resize((part.shape[0], width))
            nonzero = sparse.csr_array(sum(own[1:], own[0]))
            self.histogram = with_zeros(nonzero, self.n_obs)
            table = _of_genes(nonzero)
        else:
            rules: dict[str, Any] = {"sum": np.sum, "sum_sq": np.sum, "nnz": np.sum, "max": np.max}
            table = np.stack([rule([of[name].to_numpy() for of in genes], axis=0) for name, rule in rules.items()])
        self.genes = _named(table)


class Gathered(Statistics):
    """Statistics of the shards of a conversion.

    Attributes
    ----------
    dtype : the narrowest type that holds all values
    dtypes : of the values of each shard as they are now
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
        self.histogram = None
        if real_values:
            real[3] = np.where(real[2] < self.n_obs, np.maximum(real[3], 0), real[3])  # absent entries are zeros
        else:
            nonzero = counter.histogram(int(self.max))
            self.histogram = with_zeros(nonzero, self.n_obs)
            real = _of_genes(nonzero)
        self.genes = _named(real)


def _named(table: np.ndarray) -> dict[str, np.ndarray]:
    genes = dict(zip(("sum", "sum_sq", "nnz", "max"), table, strict=True))
    genes["nnz"] = genes["nnz"].astype(np.int64)
    return genes


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
