"""When each hidden gene of a cell becomes visible: drawn before anything else, since the schedule alone decides it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from sedd.kernels.random_bits import GOLDEN64, cell_key, mix64, stream_key


class Turns(NamedTuple):
    """Hidden genes, turn after turn; of a turn cell after cell, of a cell gene after gene.

    Attributes
    ----------
    cells, genes : (N,) int64
    u : (N,) float64 in [0, 1)
        What draws the value of each.
    here : (N,) int64
        Which of the turn's cells each belongs to.
    rows, share : (M,) int64, (M,) float64
        The cells of each turn, and the share of their genes that is hidden before it.
    ends, row_ends : (turns,) int64
        Where each turn ends. A cell's turns are its own steps that make something visible, numbered without gaps.
    """

    cells: np.ndarray
    genes: np.ndarray
    u: np.ndarray
    here: np.ndarray
    rows: np.ndarray
    share: np.ndarray
    ends: np.ndarray
    row_ends: np.ndarray


@numba.njit(cache=True, nogil=True, inline="always")
def _uniform(key: Any, g: Any) -> Any:
    return np.float64(mix64(np.uint64(key) + np.uint64(g + 1) * np.uint64(GOLDEN64)) >> np.uint64(11)) * 2.0**-53


@numba.njit(cache=True, nogil=True)
def _fill_turns(hidden: Any, names: Any, when: Any, curve: Any, turn: Any, sizes: Any) -> None:
    n_steps = curve.shape[0]
    seen = np.empty(n_steps + 1, np.int64)
    for b in range(hidden.shape[0]):
        key = cell_key(when, names[b])
        seen[:] = 0
        for g in range(hidden.shape[1]):
            if hidden[b, g]:
                u = _uniform(key, g)
                low, high = 0, n_steps  # the first step after which fewer than u are left
                while low < high:
                    middle = (low + high) // 2
                    if curve[middle] > u:
                        low = middle + 1
                    else:
                        high = middle
                turn[b, g] = low
                seen[low] += 1
        k = 0
        for s in range(n_steps + 1):
            if seen[s]:
                sizes[k] += seen[s]
                seen[s] = k
                k += 1
        for g in range(hidden.shape[1]):
            if hidden[b, g]:
                turn[b, g] = seen[turn[b, g]]


@numba.njit(cache=True, nogil=True)
def _order(hidden: Any, names: Any, value: Any, turn: Any, place: Any, cells: Any, genes: Any, u: Any) -> None:
    for b in range(hidden.shape[0]):
        key = cell_key(value, names[b])
        for g in range(hidden.shape[1]):
            if hidden[b, g]:
                i = place[turn[b, g]]
                place[turn[b, g]] = i + 1
                cells[i], genes[i], u[i] = b, g, _uniform(key, g)


def turns(hidden: np.ndarray, names: np.ndarray, curve: np.ndarray, seed: int, when: int, value: int) -> Turns:
    """Draw in which turn each hidden gene becomes visible.

    Parameters
    ----------
    hidden : (B, n_vars) bool
    names : (B,) int64
        What names the cells; draws are those of `sedd.kernels.random_bits.uniforms`.
    curve : (n_steps,) float64
        The probability that a gene is still hidden after each step; falls, and ends with 0.
    seed, when, value : int
        The seed, and the streams of the draws of the steps and of the values.
    """
    turn, sizes = np.empty(hidden.shape, np.int32), np.zeros(len(curve) + 1, np.int64)
    _fill_turns(hidden, names, np.uint64(stream_key(seed, when)), curve, turn, sizes)
    ends = np.cumsum(sizes[sizes > 0])
    n = int(ends[-1]) if len(ends) else 0
    cells, genes, u = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n)
    place = np.concatenate([[0], ends]).astype(np.int64)
    _order(hidden, names, np.uint64(stream_key(seed, value)), turn, place, cells, genes, u)
    return Turns(cells, genes, u, *_cells_of_turns(hidden, cells, ends))


def _cells_of_turns(hidden: np.ndarray, cells: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return `here`, `rows`, `share`, `ends` and `row_ends` of turns."""
    new = np.ones(len(cells), np.bool_)
    new[1:] = cells[1:] != cells[:-1]
    new[ends[:-1]] = True
    starts = np.flatnonzero(new)
    rows, sizes = cells[starts], np.diff(starts, append=len(cells))
    row_ends = np.searchsorted(starts, ends)
    turn = np.searchsorted(ends, starts, side="right")
    here = np.cumsum(new) - 1 - np.repeat(np.append(0, row_ends)[turn], sizes)
    by_cell = np.argsort(rows, kind="stable")  # of a cell turn after turn
    before = np.empty_like(sizes)
    before[by_cell] = np.cumsum(sizes[by_cell]) - sizes[by_cell]
    n_hidden = hidden.sum(1)
    earlier_cells = np.cumsum(n_hidden) - n_hidden
    share = (n_hidden[rows] - (before - earlier_cells[rows])) / hidden.shape[1]
    return here, rows, share, ends, row_ends
