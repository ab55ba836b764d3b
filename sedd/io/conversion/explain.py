"""What is said of values that are no counts: what they look like, and which way out there is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sedd.errors import NegativeValuesError, NotCountsError, UserError
from sedd.io.conversion.counts import LARGEST, to_counts
from sedd.io.input.base import Input
from sedd.io.input.matrix import Matrix

SAMPLE = 1 << 16
"""Values looked at to tell counts from the rest."""

WHOLE_AMONG_COUNTS = 0.1
"""Share of whole numbers from which values look like counts of which some are fractions; normalised ones are hardly ever whole."""


def no_counts(
    file: Input, matrix: Matrix, values: np.ndarray, bad: int, place_of: Callable[[int], tuple[int, int]]
) -> NotCountsError:
    """Return the error for `values[bad]`, which is no count; one of its own where values are negative."""
    kind = NegativeValuesError if (values[np.isfinite(values)] < 0).any() else NotCountsError
    return kind(explain(file, matrix, values, bad, place_of))


def explain(
    file: Input, matrix: Matrix, values: np.ndarray, bad: int, place_of: Callable[[int], tuple[int, int]]
) -> str:
    """Return the message for `values[bad]`, which is no count.

    Parameters
    ----------
    values : (nnz,) a block of the matrix as stored
    place_of : maps a position in `values` to (cell, gene)
    """
    value = float(values[bad])
    cell, gene = place_of(bad)
    first = f"first: {value:.10g} at cell {cell} ({file.name('obs', cell)}), gene {file.gene_name(matrix, gene)}"
    head = f"{file.path}: {matrix.name} has"
    if not np.isfinite(value):
        what = "NaN" if np.isnan(value) else "infinite"
        return f"{head} {what} values ({first}). Drop or replace them, for instance with np.nan_to_num."
    if value > LARGEST:
        return f"{head} values too large for counts ({first}; the limit is {LARGEST})."
    look = looks_like(values)
    kind = "negative" if value < 0 else "non-integer"
    return f"{head} {kind} values ({first}); {look}. {way_out(file, matrix, look)}"


def sum_too_large(file: Input, matrix: Matrix, value: int, cell: int, gene: int) -> UserError:
    """Return the error for entries of one cell and gene that are counts, and whose sum is none."""
    return UserError(
        f"{file.path}: {matrix.name} has several entries of cell {cell} ({file.name('obs', cell)}) and gene {file.gene_name(matrix, gene)}, "
        f"which add up to {value}, too large for a count (the limit is {LARGEST}). Correct or remove them."
    )


SCALED = "it looks scaled (z-scores)"
FRACTIONS = "it looks like counts of which some are fractions, as SoupX or EM leave them"
NEGATIVE = "it looks like counts of which some are negative, and counts are 0 or more"


def looks_like(values: np.ndarray) -> str:
    """Return a guess at what was done to counts to give these values."""
    sample = values.reshape(-1)[:SAMPLE].astype(np.float64)
    sample = sample[np.isfinite(sample) & (sample != 0)]
    whole = sample.size > 0 and (sample == np.rint(sample)).mean() > WHOLE_AMONG_COUNTS
    if sample.size and sample.min() < 0:
        return NEGATIVE if whole else SCALED
    if whole:
        return FRACTIONS
    if sample.size and sample.max() < 20:
        return "it looks log-normalised"
    return "it looks normalised, without a logarithm"


def is_of_result(layer: str | None) -> bool:
    """Whether a layer is one that a task of sedd made: `sedd_hidden` holds whole numbers, which are no counts."""
    return layer is not None and layer.startswith("sedd_")


def are_counts(values: np.ndarray) -> bool:
    """Whether values are all counts, of which one is not 0."""
    return bool((values != 0).any()) and to_counts(values, np.dtype(np.uint32)).bad < 0


def first_values(matrix: Matrix) -> np.ndarray:
    """Return about `SAMPLE` values of a matrix as stored; zeros too where it is dense."""
    if matrix.layout == "dense":
        rows = max(1, SAMPLE // max(1, matrix.shape[1]))
        return matrix.read_dense(0, min(rows, matrix.shape[0])).reshape(-1)
    return matrix.data.read(0, min(SAMPLE, matrix.nnz or 0))


def others_with_counts(file: Input, matrix: Matrix) -> list[str]:
    """Ways to ask for the other matrices of the file that do hold counts."""
    good = []
    for how, layer, raw in file.places:
        try:
            other = file.matrix(layer, raw)
            if other.name != matrix.name and not is_of_result(layer) and are_counts(first_values(other)):
                good.append("--layer X" if how == "X" else how)
        except ValueError:  # a damaged layer is no way out
            continue
    return good


def way_out(file: Input, matrix: Matrix, look: str) -> str:
    """Return what to do about values that look so."""
    ways = []
    if good := others_with_counts(file, matrix):
        ways.append(f"pass {' or '.join(good)}, which holds counts")
    elif look not in (FRACTIONS, NEGATIVE) and file.layers:
        ways.append(f"pass --layer with the counts (layers: {', '.join(file.layers)}; none of them looks like counts)")
    elif look not in (FRACTIONS, NEGATIVE):
        ways.append("pass a file that holds the counts: in this one is no other matrix with them")
    if look == FRACTIONS:
        ways.append("pass --round to round them")
    if look == NEGATIVE:
        ways.append("find out what the negative values stand for, and set them to 0 or leave those cells out")
    elif look == SCALED:
        ways.append("take the file from before it was scaled: a model is of values that are 0 or more")
    else:
        ways.append("keep real values, by --values real of sedd convert or --binning log of sedd train")
    text = ", or ".join(ways)
    return f"{text[0].upper()}{text[1:]}."
