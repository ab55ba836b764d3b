"""Make a synthetic atlas: an `.h5ad` of any number of cells, written in bounded memory.

    python benchmarks/atlas.py atlas.h5ad --cells 120000 --genes 20000 --layout csr --compression none

Each count is a function of (seed, cell, gene) alone, so CSR and CSC files of one atlas hold the same matrix, and the first
cells of a large atlas are those of a small one. Gene rates are log-normal, cell types multiply some of them, cells differ in depth;
about 1,360 of 20,000 genes are seen in a cell. Cells of one type are contiguous, as in files joined from many studies.
"""

from __future__ import annotations

import time

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from flags import Flags
from numba import njit, prange

TYPES, DEPTHS, RUN = 30, 8, 4000
"""Cell types, levels of depth, and how many cells of one type come in a row."""


def rates(n_genes: int, seed: int) -> np.ndarray:
    """Poisson rate of each (type, depth, gene), float32."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(-5.3, 2.0, n_genes)
    types = base * np.exp(rng.normal(0, 1.0, (TYPES, n_genes)) * (rng.random((TYPES, n_genes)) < 0.2))
    types *= 7000 * n_genes / 20000 / types.sum(axis=1, keepdims=True) * 0.29
    depth = np.geomspace(0.4, 2.5, DEPTHS)
    return (types[:, None, :] * depth[None, :, None]).astype(np.float32)


@njit(inline="always")
def _uniform(seed, cell, gene):  # type: ignore[no-untyped-def]
    h = (np.uint64(cell) << np.uint64(32)) ^ np.uint64(gene) ^ (np.uint64(seed) << np.uint64(56))
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.float32((h >> np.uint64(40)) * (1.0 / 16777216.0))


@njit(inline="always")
def _count(u, zero, rate):  # type: ignore[no-untyped-def]
    """The Poisson count whose distribution function passes `u`; `zero` is exp(-rate)."""
    term = zero
    total = zero
    k = 0
    while u >= total and k < 4000 and (term > 1e-9 or k < rate):
        k += 1
        term *= rate / k
        total += term
    return k


@njit(parallel=True)
def count_major(first, last, by_gene, n_other, seed, rate, zero, lengths):  # type: ignore[no-untyped-def]
    for major in prange(first, last):
        n = 0
        for other in range(n_other):
            cell, gene = (other, major) if by_gene else (major, other)
            kind, depth = (cell // RUN) % rate.shape[0], (cell * 2654435761) % rate.shape[1]
            n += _uniform(seed, cell, gene) >= zero[kind, depth, gene]
        lengths[major - first] = n


@njit(parallel=True)
def fill_major(first, last, by_gene, n_other, seed, rate, zero, starts, indices, data):  # type: ignore[no-untyped-def]
    for major in prange(first, last):
        at = starts[major - first]
        for other in range(n_other):
            cell, gene = (other, major) if by_gene else (major, other)
            kind, depth = (cell // RUN) % rate.shape[0], (cell * 2654435761) % rate.shape[1]
            u = _uniform(seed, cell, gene)
            p = zero[kind, depth, gene]
            if u >= p:
                indices[at] = other
                data[at] = _count(u, p, rate[kind, depth, gene])
                at += 1


def write_atlas(
    path: str, n_cells: int, n_genes: int, layout: str = "csr", compression: str | None = None, seed: int = 0
) -> int:
    """Write the atlas; the number of non-zeros.

    Parameters
    ----------
    layout : "csr" or "csc"
    compression : of data and indices, an HDF5 filter such as "gzip", or None
    """
    rate = rates(n_genes, seed)
    zero = np.exp(-rate)
    by_gene = layout == "csc"
    n_major, n_other = (n_genes, n_cells) if by_gene else (n_cells, n_genes)
    step = max(1, (1 << 27) // n_other)
    indptr = np.zeros(n_major + 1, np.int64)
    with h5py.File(path, "w") as h5:
        h5.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        types = pd.Categorical.from_codes(np.arange(n_cells) // RUN % TYPES, [f"type {k}" for k in range(TYPES)])
        obs = pd.DataFrame({"cell_type": types}, index=[f"cell{k}" for k in range(n_cells)])
        write_elem(h5, "obs", obs)
        write_elem(h5, "var", pd.DataFrame(index=[f"gene{k}" for k in range(n_genes)]))
        for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            write_elem(h5, name, {})
        for first in range(0, n_major, step):
            last = min(n_major, first + step)
            count_major(first, last, by_gene, n_other, seed, rate, zero, indptr[first + 1 : last + 1])
        np.cumsum(indptr, out=indptr)
        group = h5.create_group("X")
        group.attrs.update({"encoding-type": f"{layout}_matrix", "encoding-version": "0.1.0", "shape": [n_cells, n_genes]})
        group["indptr"] = indptr
        chunks = {"chunks": (1 << 18,), "compression": compression} if compression else {}
        arrays = [group.create_dataset(name, (int(indptr[-1]),), dtype, **chunks) for name, dtype in
                  (("indices", np.int32), ("data", np.float32))]  # fmt: skip
        for first in range(0, n_major, step):
            last = min(n_major, first + step)
            starts = indptr[first : last + 1] - indptr[first]
            block = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
            fill_major(first, last, by_gene, n_other, seed, rate, zero, starts, *block)
            for array, values in zip(arrays, block, strict=True):
                array[indptr[first] : indptr[last]] = values
    return int(indptr[-1])


def main() -> None:
    """Write the atlas asked for on the command line."""
    parser = Flags(__doc__)
    parser.add_argument("path", help="the .h5ad to write")
    parser.add_argument("--cells", type=int, default=120_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--layout", help="layout of the matrix", choices=("csr", "csc"), default="csr")
    parser.add_argument("--compression", help="filter of HDF5", choices=("none", "gzip", "lzf"), default="none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    compression = None if args.compression == "none" else args.compression
    nnz = write_atlas(args.path, args.cells, args.genes, args.layout, compression, args.seed)
    print(f"{args.path}: {args.cells} x {args.genes}, {nnz} non-zeros ({nnz / args.cells:.0f} a cell), "
          f"{time.perf_counter() - start:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
