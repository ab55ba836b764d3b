"""What is in an input, and what to do with it: `sedd info FILE`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sedd.errors import SeveralPartsError, UserError
from sedd.io.conversion.counts import to_counts
from sedd.io.conversion.explain import first_values, looks_like
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
        return {"path": path, "holds": ", ".join(error.names), "each": [input_facts(path, name) for name in error.names]}
    with file:
        chosen = {} if modality is None else {"modality": modality}
        matrices, good = _matrices(file)
        kept = file.kept_genes()
        genes = file.n_vars() if kept is None else int(kept.sum())
        names = file.var_names()
        return {
            "path": path,
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
            "next": _next(file, path, modality, good, names),
        }


def _matrices(file: Input) -> tuple[dict[str, str], list[str]]:
    """Return what there is to say of each matrix by how it is asked for, and which of these hold counts."""
    found, good = {}, []
    for how, layer, raw in file.places:
        try:
            matrix = file.matrix(layer, raw)
            holds, counts = _holds(matrix)
        except UserError as error:  # one of them may be damaged
            found[how] = str(error)
            continue
        stored = "" if matrix.nnz is None else f", {matrix.nnz:,} stored"
        found[how] = f"{holds} ({matrix.shape[0]:,} x {matrix.shape[1]:,}, {matrix.layout} {matrix.dtype}{stored})"
        good += [how] * counts
    return found, good


def _holds(matrix: Matrix) -> tuple[str, bool]:
    values = first_values(matrix)
    values = values[values != 0]
    if not values.size:
        return "nothing but zeros, where it was looked at", False
    if to_counts(values, np.dtype(np.uint32)).bad < 0:
        return "counts", True
    if not np.isfinite(values).all():
        return "values that are not finite", False
    return f"no counts: {looks_like(values)}", False


def _next(file: Input, path: str, modality: str | None, good: list[str], names: list[str]) -> str:
    """Return the command that trains on the input, or what is in its way."""
    if not good:
        return "none of its matrices looks like counts; docs/preparing-data.md says what to do"
    words = ["sedd train --data_path", f"'{path}'" if " " in path else path]
    if modality is not None:
        words += ["--modality", f"'{modality}'" if " " in modality else modality]
    if good[0] != "X":
        flag, _, name = good[0].partition(" ")
        words.append(f"{flag} '{name}'" if " " in name else good[0])
    symbols = [name for name in _SYMBOLS if names and names[0].startswith("ENS") and name in file.var()]
    hint = f"; with --gene_names {symbols[0]} to name genes by symbols" if symbols else ""
    return " ".join(words) + hint


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _inside(file: Input, group: str) -> list[str]:
    return [name.removeprefix(f"{group}/") for name in file.elements() if name.startswith(f"{group}/")]


def _listed(names: Callable[[], list[str]]) -> list[str] | str:
    """Names, or why they cannot be read."""
    try:
        return names()
    except UserError as error:
        return str(error)
