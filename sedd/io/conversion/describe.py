"""What is in an input, and what to do with it: `sedd info FILE`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import numpy as np

from sedd.errors import SeveralPartsError, UserError, without_secrets
from sedd.io.conversion.counts import LARGEST, to_counts
from sedd.io.conversion.explain import FRACTIONS, first_values, is_of_result, looks_like
from sedd.io.input.base import Input
from sedd.io.input.matrix import Matrix
from sedd.io.input.opening import open_input

_SYMBOLS = ("feature_name", "gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "SYMBOL", "Symbol", "gene_short_name")
"""Columns of `var` in which people keep symbols."""


def input_facts(path: str, modality: str | None = None) -> dict[str, Any]:
    """Everything worth knowing about an input, as plain values.

    Returns
    -------
    facts : format, shape, every matrix with its layout, type and whether it holds counts, the tables' columns, and what to do next
    """
    try:
        file = open_input(path, modality=modality)
    except SeveralPartsError as error:
        return {"path": without_secrets(path), "holds": ", ".join(error.names), "each": [input_facts(path, name) for name in error.names]}
    with file:
        chosen = {} if modality is None else {"modality": modality}
        matrices, good, fractions = _matrices(file)
        kept = file.kept_genes()
        genes = file.n_vars() if kept is None else int(kept.sum())
        names = file.var_names()
        return {
            "path": without_secrets(path),
            "format": file.kind,
            **chosen,
            "cells": file.n_obs,
            "genes": genes,
            **({} if kept is None else {"features of other types": int((~kept).sum())}),
            "matrices": matrices,
            "names of cells": _few(file.obs_names),
            "names of genes": _few(names),
            "obs": _listed(lambda: [str(name) for name in file.obs().columns]),
            "var": _listed(lambda: [str(name) for name in file.var().columns]),
            **{group: _listed(lambda group=group: _inside(file, group)) for group in ("obsm", "uns")},  # type: ignore[misc]
            "next": _next(file, path, modality, good, fractions, names),
        }


def _matrices(file: Input) -> tuple[dict[str, str], list[str], list[str]]:
    """Return what there is to say of each matrix by how it is asked for, which of these hold counts, and which counts with fractions."""
    found, good, fractions = {}, [], []
    for how, layer, raw in file.places:
        try:
            matrix = file.matrix(layer, raw)
            holds, looks = _holds(matrix)
        except UserError as error:  # one of them may be damaged
            found[how] = str(error)
            continue
        stored = "" if matrix.nnz is None else f", {matrix.nnz:,} stored"
        found[how] = f"{holds} ({matrix.shape[0]:,} x {matrix.shape[1]:,}, {matrix.layout} {matrix.dtype}{stored})"
        if not is_of_result(layer):
            good += [how] * (looks is None)
            fractions += [how] * (looks == FRACTIONS)
    return found, good, fractions


def _holds(matrix: Matrix) -> tuple[str, str | None]:
    """Return what a matrix holds, in words, and what it looks like; None if that is counts."""
    values = first_values(matrix)
    values = values[values != 0]
    if not values.size:
        return "nothing but zeros, where it was looked at", ""
    if to_counts(values, np.dtype(np.uint32)).bad < 0:
        return "counts", None
    if not np.isfinite(values).all():
        return "values that are not finite", ""
    if (largest := values.max()) > LARGEST:
        return f"values too large for counts (such as {largest:.10g}; the limit is {LARGEST})", ""
    looks = looks_like(values)
    return f"no counts: {looks}", looks


def _next(file: Input, path: str, modality: str | None, good: list[str], fractions: list[str], names: list[str]) -> str:
    """Return the command that trains on the input, or what is in its way."""
    if not good and not fractions:
        return "none of its matrices looks like counts; docs/preparing-data.md says what to do"
    words = ["sedd train --data_path", shlex.quote(path)]
    if modality is not None:
        words += ["--modality", shlex.quote(modality)]
    chosen = (good or fractions)[0]
    if chosen != "X":
        words.append(chosen)
    if not good:
        words.append("--round")
    symbols = [name for name in _SYMBOLS if names and names[0].startswith("ENS") and name in file.var()]
    hint = f"; with --gene_names {symbols[0]} to name genes by symbols" if symbols else ""
    return " ".join(words) + hint


def _few(names: list[str]) -> str:
    """Return the first names, and how many repeat."""
    repeated = len(names) - len(set(names))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") + (f"; {repeated:,} repeated" if repeated else "")


def _inside(file: Input, group: str) -> list[str]:
    return [name.removeprefix(f"{group}/") for name in file.elements() if name.startswith(f"{group}/")]


def _listed(names: Callable[[], list[str]]) -> list[str] | str:
    """Names, or why they cannot be read."""
    try:
        return names()
    except UserError as error:
        return str(error)
