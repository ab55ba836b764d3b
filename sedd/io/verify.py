"""Prove that a store is whole, and that it holds what its input holds."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from sedd.errors import UserError, without_secrets
from sedd.io.conversion.counts import LargeSumError, clean_rows
from sedd.io.conversion.genes import match_inputs
from sedd.io.conversion.runner import TaskRunner
from sedd.io.format.reader import ChunkReader
from sedd.io.format.tally import cell_hashes
from sedd.io.input.base import Input
from sedd.io.input.matrix import Matrix
from sedd.io.input.opening import input_fingerprint, opened_as
from sedd.io.store import CellStore, close_stores, span_hashes

BLOCK = 1 << 22
"""Entries compared at once."""


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | list[str] | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Check a store: every chunk's checksum, every cell's hash and, with `against`, every entry of the input's matrix.

    Parameters
    ----------
    path : of the store
    against : the input that it was made from (all of them, in order, when there were several)
    workers : threads
    progress : show a bar

    Returns
    -------
    report : `path`, `chunks` and `cells` checked, `nonzeros`, `against`, `changed` (inputs whose fingerprint differs)

    Raises
    ------
    UserError
        At the first thing that is wrong, naming array, chunk and file, or cell, gene and the two values.
    """
    close_stores()
    store = CellStore(path)
    runner = TaskRunner(workers=workers, scheduler=None, progress=progress)
    for name in store.x_arrays:
        if store.x_arrays[name].shape[0] != (store.n_obs + 1 if name == "indptr" else store.nnz):
            raise UserError(f"{path}: X/{name} has {store.x_arrays[name].shape[0]} entries, which is not what uns says.")
    spans = store.spans(BLOCK)
    parts = runner.run(span_hashes, [(store.path, *s) for s in spans], [hi - lo for lo, hi in spans], title="verify")
    hashes = np.concatenate(parts)
    wrong = np.flatnonzero(hashes != store.cell_hashes())
    if wrong.size:
        raise UserError(f"{path}: cell {wrong[0]} is not what was written there. Convert the input again.")
    _check_layers(store, runner)
    if len(store.obs) != store.n_obs or len(store.var) != store.n_vars:
        raise UserError(f"{path}: obs or var does not have the length of X. Convert the input again.")
    changed: list[str] = []
    inputs = [str(against)] if isinstance(against, str | os.PathLike) else [str(name) for name in against or []]
    if inputs:
        changed = [
            name
            for name, record in zip(inputs, store.uns_sedd["inputs"], strict=False)
            if input_fingerprint(name) != record["fingerprint"]
        ]
        _compare(store, inputs, hashes, runner)
    n_chunks = sum(-(-array.shape[0] // array.chunks[0]) for array in store.x_arrays.values())
    return {
        "path": store.path,
        "chunks": n_chunks,
        "cells": store.n_obs,
        "nonzeros": store.nnz,
        "against": inputs,
        "changed": changed,
    }


def _check_layers(store: CellStore, runner: TaskRunner) -> None:
    """Read every chunk of the layers that are kept beside X."""

    def check(reader: ChunkReader, first: int, last: int) -> None:
        chunks = np.arange(first, last)
        reader.read(chunks, np.empty(chunks.size * reader.chunk, reader.dtype), (chunks - first) * reader.chunk)

    for name, arrays in store.layer_arrays.items():
        for part, array in arrays.items():
            reader = ChunkReader(array, name=f"{store.path}/layers/{name}/{part}")
            step = max(1, BLOCK // reader.chunk)
            spans = [(reader, k, min(k + step, reader.n_chunks)) for k in range(0, reader.n_chunks, step)]
            runner.run(check, spans, [0] * len(spans), title=f"verify {name}")


class _Step(NamedTuple):
    """A conversion, or an append to it: which of the inputs and of the cells it made, and its settings."""

    inputs: slice
    cells: slice
    settings: dict[str, Any]


def _steps(store: CellStore) -> list[_Step]:
    ends = [(0, 0), *((then["inputs"], then["n_obs"]) for then in store.grown), (len(store.uns_sedd["inputs"]), store.n_obs)]
    genes = {"genes": store.var_names.tolist()}
    settings = [store.uns_sedd["settings"], *({**then["appended"], **genes} for then in store.grown)]
    return [_Step(slice(lo[0], hi[0]), slice(lo[1], hi[1]), own) for lo, hi, own in zip(ends[:-1], ends[1:], settings, strict=True)]


def _compare(store: CellStore, inputs: list[str], hashes: np.ndarray, runner: TaskRunner) -> None:
    if len(inputs) != len(store.uns_sedd["inputs"]):
        raise UserError(f"{store.path}: was made from {len(store.uns_sedd['inputs'])} files; name all of them, in order.")
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about gene names: said at the conversion
        files: list[Input] = []
        matrices: list[Matrix] = []
        maps: list[np.ndarray | None] = []
        cells: list[np.ndarray] = []  # numbers in the inputs, one after the other
        for step in _steps(store):
            names = inputs[step.inputs]
            own_files = [stack.enter_context(opened_as(name, step.settings)) for name in names]
            own_matrices = [file.matrix(step.settings["layer"], step.settings["raw"]) for file in own_files]
            genes, own_maps = match_inputs(own_files, step.settings)
            names_here = store.var_names.tolist()
            if step.settings.get("gene_order") == "frequent" and sorted(genes) == sorted(names_here):
                genes, own_maps = match_inputs(own_files, {**step.settings, "genes": names_here})
            if genes != names_here:
                raise UserError(f"{store.path}: has other genes than {names[0]}.")
            n, n_there = step.cells.stop - step.cells.start, sum(matrix.shape[0] for matrix in own_matrices)
            if n > n_there or (n < n_there and step.settings["limit_cells"] is None):
                raise UserError(f"{store.path}: has {n} cells of {', '.join(names)}, which has {n_there}.")
            local = np.arange(n)
            if store.is_reordered:
                local = store.obs["sedd_cell"].to_numpy()[step.cells] - step.cells.start
            cells.append(sum(matrix.shape[0] for matrix in matrices) + local)
            files, matrices, maps = files + own_files, matrices + own_matrices, maps + own_maps
        places = np.concatenate(cells)
        own = [_input_hashes(*both, store, runner) for both in zip(matrices, maps, strict=True)]
        expected = np.concatenate(own)[places]
        wrong = np.flatnonzero(hashes != expected)
        if wrong.size:
            raise UserError(_difference(store, int(wrong[0]), int(places[wrong[0]]), matrices, maps))
        obs_names = np.concatenate([np.array(file.obs_names, str) for file in files])[places]
        if len(inputs) == 1 and not np.array_equal(obs_names, store.obs.index.to_numpy(str)):
            raise UserError(f"{store.path}: has other cell names than {inputs[0]}.")


def _input_hashes(matrix: Matrix, genes: np.ndarray | None, store: CellStore, runner: TaskRunner) -> np.ndarray:
    """Return a hash for each cell of an input matrix, as its cells would have in the store."""
    hashes = np.zeros(matrix.shape[0], np.uint64)

    def add(lo: int, hi: int) -> np.ndarray:
        if matrix.layout == "csc":
            indptr, rows, raw = matrix.read_major(lo, hi)
            indices = np.repeat(np.arange(lo, hi), np.diff(indptr))
            order = np.argsort(rows, kind="stable")
            indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=matrix.shape[0]))])
            indices, raw = indices[order], raw[order]
        else:
            indptr, indices, raw = matrix.read_rows(lo, hi)
        values = raw.astype(np.float32) if not store.is_counts else np.rint(raw.astype(np.float64)).astype(np.uint32)
        try:
            indptr, indices, values, _ = clean_rows(indptr, indices, values, store.n_vars, genes)
        except LargeSumError as error:
            raise UserError(f"{matrix.path}: entries of one cell and gene add up to {error.value}, which no store holds, so {store.path} has another value there.") from error
        return cell_hashes(indptr, indices, values)

    spans = matrix.spans(BLOCK)
    if matrix.layout != "csc":
        parts = runner.run(add, spans, [hi - lo for lo, hi in spans], title=f"read {os.path.basename(without_secrets(matrix.path))}")
        return np.concatenate(parts)
    for lo, hi in spans:  # every block of columns touches all cells: one at a time
        hashes += add(lo, hi)
    return hashes


def _difference(store: CellStore, row: int, cell: int, matrices: list[Matrix], maps: list[np.ndarray | None]) -> str:
    """Where one cell of the store differs from its input."""
    number, local = 0, cell
    while local >= matrices[number].shape[0]:
        local -= matrices[number].shape[0]
        number += 1
    there = np.zeros(store.n_vars)
    _, indices, raw = matrices[number].read_rows(local, local + 1)
    genes = maps[number]
    target = indices if genes is None else genes[indices]
    np.add.at(there, target[target >= 0], raw[target >= 0])
    here = np.zeros(store.n_vars)
    _, own_indices, own_values = store.read_rows(row, row + 1)
    here[own_indices] = own_values
    gene = int(np.argmax(np.abs(here - there)))
    return (
        f"{store.path}: cell {row} ({store.obs.index[row]!r}), gene {str(store.var_names[gene])!r} is {here[gene]:g}, "
        f"in {matrices[number].path} it is {there[gene]:g}. Convert the file again."
    )
