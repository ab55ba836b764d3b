"""What the kernels do with the non-zeros of a row before they write: fetch them, check them, find those of a panel."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BAD_INDEX, BAD_VALUE = -1.0, -2.0
_LINE = 64  # bytes that a processor fetches at a time


@intrinsic
def _prefetch(typing_context: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of one element, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def constant(value: int) -> Any:
            return ir.Constant(ir.IntType(32), value)

        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        element = builder.gep(view.data, [arguments[1]])
        place = builder.bitcast(element, cgutils.voidptr_t)
        kinds = [cgutils.voidptr_t, *[ir.IntType(32)] * 3]
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [cgutils.voidptr_t], ir.FunctionType(ir.VoidType(), kinds)
        )
        # To read (0), into the second-level cache (2), as data (1): in the first level are the rows that are being written.
        builder.call(function, [place, constant(0), constant(2), constant(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@numba.njit(cache=True, nogil=True)
def fetch(array: Any, start: Any, stop: Any) -> None:
    """Have a part of an array fetched: that of the next row, while this one is worked on.

    Shuffled rows lie anywhere in memory, and waiting for each of them takes about as long as writing it.
    """
    for at in range(start, stop, _LINE // array.itemsize):
        _prefetch(array, at)


@intrinsic
def lowest_bit(typing_context: Any, word: Any) -> Any:
    """Place of the lowest bit of a 64-bit word that is set, 0 to 63; the word must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@numba.njit(cache=True, nogil=True)
def inside(genes: Any, n_store: Any) -> bool:
    """Tell whether all indices are inside the store: one that is not would read or write memory that is not the row's.

    Written to be vectorised: over subscripts, without an early exit, the extremes in the type of the indices.
    """
    if genes.shape[0] == 0:
        return True
    lowest = highest = genes[0]
    for i in range(genes.shape[0]):
        lowest = min(lowest, genes[i])
        highest = max(highest, genes[i])
    return not (lowest < 0 or np.uint64(highest) >= np.uint64(n_store))


@numba.njit(cache=True, nogil=True)
def check_row(genes: Any, values: Any, n_store: Any) -> float:
    """Return 0, or a negative code for an index outside the store or a value that is negative or NaN."""
    if not inside(genes, n_store):
        return BAD_INDEX
    bad = False
    for i in range(values.shape[0]):
        bad |= not values[i] >= 0
    return BAD_VALUE if bad else 0.0


@numba.njit(cache=True, nogil=True)
def choose(genes: Any, member: Any, chosen: Any) -> Any:
    """Write the places of the genes that are in the panel to `chosen`, as long as the row; return how many there are.

    `member` says 1 or 0 of each gene of the store, a byte each, so that it stays in the nearest cache.

    Every place is written and the next one overwrites it unless the gene was in the panel: which genes are is no pattern
    that a processor could predict, and each wrong guess costs more than ten such writes.
    """
    count = np.uint64(0)
    for i in range(genes.shape[0]):
        chosen[count] = i
        count += np.uint64(member[np.uint64(genes[i])])
    return np.int64(count)
