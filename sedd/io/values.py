"""Say in one line why a matrix does not hold counts, what its values look like, and where the counts may be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sedd.io import pack
from sedd.io.h5ad import H5ad, Matrix

SAMPLE = 1 << 16
"""Values looked at to tell counts from the rest."""


def explain(
    file: H5ad, matrix: Matrix, values: np.ndarray, bad: int, place_of: Callable[[int], tuple[int, int]]
) -> str:
    """The error message for `values[bad]`, which is no count.

    Parameters
    ----------
    values : (nnz,) a block of the matrix as stored
    place_of : maps a position in `values` to (cell, gene)
    """
    value = float(values[bad])
    cell, gene = place_of(bad)
    first = f"first: {value:.6g} at cell {cell} ({file.name('obs', cell)}), gene {file.gene_name(matrix, gene)}"
    head = f"{file.path}: {matrix.name} has"
    if not np.isfinite(value):
        what = "NaN" if np.isnan(value) else "infinite"
        return f"{head} {what} values ({first}). Drop or replace them, for instance with np.nan_to_num."
    if value > np.iinfo(np.uint32).max:
        return f"{head} values too large for counts ({first}; the limit is {np.iinfo(np.uint32).max})."
    fractions = bool((values != np.rint(values)).any())
    if value < 0 and not fractions:
        return f"{head} negative values ({first}); counts are >= 0. {_way_out(file, matrix)}"
    kind = "negative" if value < 0 else "non-integer"
    return f"{head} {kind} values ({first}); {looks_like(values)}. {_way_out(file, matrix)}"


def looks_like(values: np.ndarray) -> str:
    """A guess at what was done to counts to give these values."""
    sample = values[:SAMPLE].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if sample.size and sample.min() < 0:
        return "it looks scaled (z-scores)"
    if sample.size and sample.max() < 20:
        return "it looks log-normalised"
    return "it looks normalised, without a logarithm"


def holds_counts(matrix: Matrix) -> bool:
    """Whether the first stored values of a matrix are all counts."""
    if matrix.layout == "dense":
        rows = max(1, SAMPLE // max(1, matrix.shape[1]))
        values = matrix.read_dense(0, min(rows, matrix.shape[0])).reshape(-1)
    else:
        values = matrix.data.read(0, min(SAMPLE, matrix.nnz or 0))
    return values.size > 0 and pack.to_counts(values, np.dtype(np.uint32)).bad < 0


def _way_out(file: H5ad, matrix: Matrix) -> str:
    """Name the matrices of the file that do hold counts."""
    places = [(f"--layer {name}", name, False) for name in file.layers] + ([("--raw", None, True)] if file.has_raw else [])
    if matrix.name != "X" and "X" in file.h5:
        places.append(("X (no --layer)", None, False))
    good = []
    for flag, layer, raw in places:
        try:
            other = file.matrix(layer, raw)
            if other.name != matrix.name and holds_counts(other):
                good.append(flag)
        except ValueError:  # a damaged layer is no way out
            continue
    if good:
        return f"Pass {' or '.join(good)}, which holds counts; {_REAL}."
    listed = ", ".join(file.layers) or "none"
    return f"Pass --layer with the counts (layers: {listed}; none of them looks like counts); {_REAL}."


_REAL = "or keep real values, by --values real of sedd convert or --binning log of sedd train"
