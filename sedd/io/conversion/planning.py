"""Decide how the inputs become shards, from their shapes and a look at their values; or say what that would be, and cost."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from sedd.errors import UserError
from sedd.io.conversion.counts import dense_rows, index_dtype, to_counts
from sedd.io.conversion.explain import SAMPLE, no_counts
from sedd.io.conversion.genes import by_frequency, match_inputs, note_order
from sedd.io.conversion.inputs import Plan, row_of
from sedd.io.format import tally
from sedd.io.format.shards import CHUNK, Encoder, shard_length
from sedd.io.input.base import Input
from sedd.io.input.matrix import Matrix
from sedd.io.input.opening import one_of, opened_as

LARGEST_BLOCK = 1 << 23
"""Stored values that a task reads at once at most; more does not make it more efficient."""

SAMPLES = 8
"""Places looked at to guess the type of the counts; shards made too narrow are encoded again."""

PARTS = 16
"""Parts of the spill in a shard, or more: those at its two ends are read again for its neighbours."""


class _Opened(NamedTuple):
    """Inputs held open, and what a look at them says.

    Attributes
    ----------
    files, matrices : of the inputs
    genes, maps : as from `match_genes`
    narrow : the type that seems to hold the counts
    stored : values, zeros of dense matrices included
    """

    files: list[Input]
    matrices: list[Matrix]
    genes: list[str]
    maps: list[np.ndarray | None]
    narrow: np.dtype[Any]
    stored: int


def _open(stack: ExitStack, paths: list[str], settings: dict[str, Any], *, aloud: bool = True) -> _Opened:
    """Open the inputs, closed with `stack`; refuses empty ones and what is no count."""
    files, matrices = [], []
    for path in paths:
        with one_of(paths):
            file = stack.enter_context(opened_as(path, settings))
            matrix = file.matrix(settings["layer"], settings["raw"])
        for name in settings["keep_layers"]:
            file.matrix(name)
        for count, what in zip(matrix.shape, ("cells", "genes"), strict=True):
            if count == 0:
                way_out = " Leave it out." if len(paths) > 1 else ""
                raise UserError(f"{path}: has no {what}; there is nothing to convert.{way_out}")
        files.append(file)
        matrices.append(matrix)
    genes, maps = match_inputs(files, settings, aloud=aloud)
    kinds = [_sample(file, matrix, settings) for file, matrix in zip(files, matrices, strict=True)]
    stored = sum(matrix.nnz if matrix.nnz is not None else matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    return _Opened(files, matrices, genes, maps, max(kinds, key=lambda dtype: dtype.itemsize), stored)


def make_plan(
    folder: str,
    paths: list[str],
    fingerprints: list[str],
    settings: dict[str, Any],
    *,
    memory: float,
    direct_allowed: bool,
    aloud: bool = True,
) -> Plan:
    """Decide on the parts, and write the plan and what goes with it into `folder`.

    Parameters
    ----------
    folder : of the conversion
    paths, fingerprints : of the inputs
    settings : of the store
    memory : bytes that one task may hold
    direct_allowed : whether shards may come straight from the input where it seems tidy
    aloud : say what there is to be said of the genes
    """
    with ExitStack() as stack:
        files, matrices, genes, maps, narrow, stored = _open(stack, paths, settings, aloud=aloud)
        frequent = settings["gene_order"] == "frequent"
        if frequent:  # of the first input, so that a store grows into what it would be if all had been converted together
            genes, maps = by_frequency(genes, maps, _seen(matrices[0]))
        offsets = np.concatenate([[0], np.cumsum([matrix.shape[0] for matrix in matrices])])
        n_all = int(offsets[-1])
        n_obs = min(n_all, settings["limit_cells"] or n_all)
        tidy = all(matrix.layout == "csr" for matrix in matrices) and all(new is None for new in maps)
        order = _order(files, settings, n_obs)
        direct = direct_allowed and tidy and order is None
        block = _block(matrices, len(genes), memory)
        spans = [
            (number, lo, min(hi, n_obs - int(offsets[number])) if matrix.layout != "csc" else hi)
            for number, matrix in enumerate(matrices)
            for lo, hi in matrix.spans(block)
            if not direct and (matrix.layout == "csc" or offsets[number] + lo < n_obs)
        ]
        part = min(block, shard_length(stored) // PARTS)
        step = max(1, int(n_all * part / max(1, stored)))
        taken = [int(matrix.indptr[int(np.clip(n_obs - offset, 0, matrix.shape[0]))])
                 for matrix, offset in zip(matrices, offsets, strict=False)] if direct else []  # fmt: skip
    for name in ("shards", "spill"):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
    if frequent:
        note_order(folder, genes)
    for number, new in enumerate(maps):
        if new is not None:
            np.save(f"{folder}/genes-{number}.npy", new)
    if order is not None or (n_obs < n_all and not direct):
        places = np.full(n_all, -1, np.int64)
        places[order if order is not None else slice(n_obs)] = np.arange(n_obs)
        np.save(f"{folder}/places.npy", places)
    plan = Plan(
        folder=folder,
        id=secrets.token_hex(4),
        sources=tuple((path, settings["layer"], settings["raw"]) for path in paths),
        fingerprints=tuple(fingerprints),
        settings=settings,
        n_obs=n_obs,
        n_vars=len(genes),
        direct=direct,
        narrow=narrow.name,
        block=block,
        spans=tuple(spans),
        step=step,
        offsets=tuple(int(n) for n in offsets),
        entries=tuple(int(n) for n in np.concatenate([[0], np.cumsum(taken, dtype=np.int64)])),
    )
    plan.save()
    return plan


def _order(files: list[Input], settings: dict[str, Any], n_obs: int) -> np.ndarray | None:
    """Return the numbers of the first `n_obs` cells in the order of the store, None where that is the order of the inputs."""
    if settings["shuffle"]:
        return np.random.default_rng(settings["seed"]).permutation(n_obs)
    if settings["group_by"] is None:
        return None
    from sedd.io.conversion.tables import label_codes  # imports pandas

    codes = label_codes(files, settings["group_by"])[:n_obs]
    return np.argsort(np.where(codes < 0, codes.max() + 1, codes), kind="stable")


def _seen(matrix: Matrix) -> np.ndarray:
    """In how many cells each gene of an input was seen, of those looked at."""
    n_obs, n_vars = matrix.shape
    if matrix.layout == "csc":
        return np.diff(matrix.indptr)
    seen = np.zeros(n_vars, np.int64)
    if matrix.layout == "dense":
        rows = max(1, SAMPLE // n_vars)
        for lo in range(0, n_obs, max(rows, n_obs // SAMPLES)):
            seen += np.count_nonzero(matrix.read_dense(lo, min(lo + rows, n_obs)), axis=0)
        return seen
    nnz = matrix.nnz or 0
    for lo in range(0, nnz, max(SAMPLE, nnz // SAMPLES)):
        for _, own in matrix.slices("indices", lo, min(lo + SAMPLE, nnz)):
            inside = own[(own >= 0) & (own < n_vars)]  # others are named when their turn comes
            seen += np.bincount(inside.astype(np.int64), minlength=n_vars)
    return seen


def _sample(file: Input, matrix: Matrix, settings: dict[str, Any]) -> np.dtype[Any]:
    """Look at some values: refuse what is no count, guess the type that holds them."""
    narrow = np.dtype(np.uint8)
    if settings["values"] == "real":
        return narrow
    if matrix.layout == "dense":
        indptr, indices, raw = dense_rows(matrix.read_dense(0, min(max(1, SAMPLE // matrix.shape[1]), matrix.shape[0])))
    else:
        indptr, indices, raw = matrix.read_major(*matrix.spans(SAMPLE)[0])
    counts = to_counts(raw, narrow, rounding=settings["round"])
    if counts.bad >= 0:
        raise no_counts(file, matrix, raw, counts.bad, lambda k: _place(matrix, indptr, indices, k))
    kinds = [counts.values.dtype]
    nnz = matrix.nnz or 0
    for at in range(0, nnz, max(SAMPLE, nnz // SAMPLES)):
        counts = to_counts(matrix.data.read(at, min(at + SAMPLE, nnz)), narrow, rounding=settings["round"])
        kinds += [counts.values.dtype] * (counts.bad < 0)  # what is no count is named when its turn comes
    return max(kinds, key=lambda dtype: dtype.itemsize)


def _place(matrix: Matrix, indptr: np.ndarray, indices: np.ndarray, k: int) -> tuple[int, int]:
    major, minor = row_of(indptr, k), int(indices[k])
    return (minor, major) if matrix.layout == "csc" else (major, minor)


def _block(matrices: list[Matrix], n_vars: int, memory: float) -> int:
    """Return the stored values that one task may hold: half its memory, by what an entry takes from file to shard."""
    stored = max(m.dtype.itemsize + (m.indices.dtype.itemsize if m.layout != "dense" else 8) for m in matrices)
    return int(min(LARGEST_BLOCK, memory / 2 / (stored + 4 * (index_dtype(n_vars).itemsize + 4))))


def forecast(paths: list[str], output: str, settings: dict[str, Any], workers: int) -> str:
    """Return what the conversion would do, as text: sizes, types, bytes and a time measured on a sample."""
    with ExitStack() as stack:
        files, matrices, genes, _, narrow, stored = _open(stack, paths, settings)
        reordered = _order(files, settings, 1) is not None or settings["gene_order"] == "frequent"
        lines = [
            f"{m.path}: {m.name} is {m.layout} {m.dtype}, {m.shape[0]:,} cells x {m.shape[1]:,} genes" for m in matrices
        ]
        seconds, n_bytes = _rehearse(matrices[0], narrow, settings)
    n_obs = sum(matrix.shape[0] for matrix in matrices)
    n_obs = min(n_obs, settings["limit_cells"] or n_obs)
    if settings["keep_layers"]:
        lines.append(f"kept beside it, each converted in the same way: {', '.join(settings['keep_layers'])}")
    passes = 1 if all(matrix.layout == "csr" for matrix in matrices) and not reordered else 2
    kind = "float32" if settings["values"] == "real" else narrow.name
    lines += [
        f"{output}: {n_obs:,} cells x {len(genes):,} genes, {'at most ' if passes == 2 else ''}{stored:,} non-zeros",
        f"  values as {kind} or wider, genes as {index_dtype(len(genes)).name}, codec {settings['codec']}",
        f"  about {n_bytes * stored / 1e6:,.0f} MB, about {passes * seconds * stored / workers:,.0f} s with {workers} workers",
    ]
    return "\n".join(lines)


def _rehearse(matrix: Matrix, narrow: np.dtype[Any], settings: dict[str, Any]) -> tuple[float, float]:
    """Seconds of one core and bytes in the store, per stored value, measured on about a million values."""
    start = time.perf_counter()
    lo, hi = matrix.spans(1 << 20)[0]
    if matrix.layout == "dense":
        indptr, indices, raw = dense_rows(matrix.read_dense(lo, hi))
    else:
        indptr, indices, raw = matrix.read_major(lo, hi)
    counts = to_counts(raw, narrow, rounding=settings["round"])
    kind = index_dtype(matrix.shape[1])
    tally.tally(indptr, indices.astype(kind), counts.values, matrix.shape[1 if matrix.layout != "csc" else 0])
    n_bytes = 0
    for name, array in (("data", counts.values), ("indices", indices.astype(kind))):
        encoder = Encoder(name, array.dtype, settings["codec"])
        n_bytes += sum(len(encoder.encode(array[k : k + CHUNK])) for k in range(0, array.size, CHUNK))
    size = max(1, (matrix.nnz and indices.size) or (hi - lo) * matrix.shape[1])
    return (time.perf_counter() - start) / size, n_bytes / size
