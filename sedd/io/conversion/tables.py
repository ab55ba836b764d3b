"""Write everything of a store but X: the tables of cells and genes, embeddings, what the user had in uns, what sedd adds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import zarr

import sedd
from sedd.io.conversion.cells import JoinedCells
from sedd.io.conversion.genes import match_inputs, noted_order, unique_names
from sedd.io.conversion.inputs import Plan
from sedd.io.conversion.joins import concatenated, distinct_names, join_obsm, join_uns, usable
from sedd.io.conversion.statistics import Statistics
from sedd.io.format.elements import write_elements
from sedd.io.format.plain import read_element
from sedd.io.format.shards import consolidate
from sedd.io.format.table_blocks import write_blocks
from sedd.io.input.base import Input, check_drop
from sedd.io.input.cells import CellTable
from sedd.io.input.opening import opened_as
from sedd.io.store import FORMAT


def write(group: zarr.Group, plan: Plan) -> list[str]:
    """Write what the inputs of `plan` have beside X into `group`; return what is to be said of it."""
    settings, n_obs = plan.settings, plan.n_obs
    paths = [path for path, _, _ in plan.sources]
    with ExitStack() as stack:
        files = [stack.enter_context(opened_as(path, settings)) for path in paths]
        drop = tuple(settings["drop"])
        if any("/" in name for name in drop):
            check_drop(paths[0], [name for file in files for name in file.elements()], drop)
        frames = [_genes_of(file, settings["raw"], drop) for file in files]
        # What there is to say of genes was said when the plan was made.
        for file, frame in zip(files, frames, strict=True):
            frame.index = pd.Index(unique_names(file.path, frame.index.tolist(), aloud=False), name=frame.index.name)
        genes = noted_order(plan.folder) or match_inputs(files, settings, aloud=False)[0]
        var = join_var(frames, pd.Index(genes, name=frames[0].index.name))
        if settings["obs"] == []:  # a conversion for the sake of the matrix alone
            tables = [CellTable(pd.DataFrame(index=pd.RangeIndex(plan.offsets[-1])))]
            obsm, uns, labels = [dict[str, Any]()], [dict[str, Any]()], None
        else:
            tables, obsm = [file.cells(settings["obs"], drop) for file in files], [file.mapping("obsm", drop) for file in files]
            uns = [file.mapping("uns", drop) for file in files]
            labels = (settings["keys"] or distinct_names(paths)) if len(files) > 1 or settings["keys"] else None
        order = None
        if settings["shuffle"] or settings["group_by"] is not None:
            places = np.load(f"{plan.folder}/places.npy")
            order = np.argsort(places, kind="stable")[places.size - n_obs :]
        cells = JoinedCells(tables, labels, n_obs, order)
        if labels is None:
            arrays, news = usable(tables[0].n_rows, obsm[0]), [f"{paths[0]}: {said}" for said in filter(None, [cells.what_repeats()])]
        else:
            arrays, news = join_obsm(tables, obsm)
            news += cells.news
        kept, lost = join_uns(uns, cells.sample, cells.first)
        if order is not None or n_obs < plan.offsets[-1]:
            arrays = {name: _rows(array, slice(n_obs) if order is None else order) for name, array in arrays.items()}
        news += lost + write_elements(group, {"var": var, "obsm": arrays, "uns": kept})
        news += write_blocks(group, "obs", sample=cells.sample, n_rows=n_obs, column=cells.column, names=cells.names)
    return news + write_elements(group, {name: {} for name in ("layers", "obsp", "varm", "varp")})


def label_codes(files: list[Input], column: str) -> np.ndarray:
    """Codes of the labels of an obs column of all inputs, joined: in the order of categories, else sorted; -1 where missing."""
    tables = [file.cells([column]) for file in files]
    frames = [pd.DataFrame({column: table.column(column, 0, table.n_rows).array}) for table in tables]
    for frame in frames:
        frame.index = frame.index.astype(str)
    labels = frames[0][column] if len(frames) == 1 else concatenated(frames, [{}] * len(frames))[0][column]
    found: np.ndarray = labels.astype("category").cat.codes.to_numpy().astype(np.int64)
    return found


def _genes_of(file: Input, raw: bool, drop: tuple[str, ...]) -> pd.DataFrame:
    frame, kept = file.var(raw, drop), file.kept_genes(raw)
    return frame if kept is None else frame[kept]


def _rows(array: Any, order: np.ndarray | slice) -> Any:
    return array.iloc[order] if isinstance(array, pd.DataFrame) else array[order]


def write_added(
    group: zarr.Group,
    settings: dict[str, Any],
    gathered: Statistics,
    inputs: list[dict[str, str]],
    grown: Sequence[dict[str, Any]] = (),
) -> None:
    """Write `uns["sedd"]`, and consolidate the metadata of the whole store.

    Parameters
    ----------
    settings : of the store
    inputs : what the store remembers of its inputs
    grown : what the store was each time before cells were appended
    """
    var = group["var"]
    names = read_element(var[var.attrs["_index"]]).tolist()
    identity = json.dumps([gathered.content(), gathered.n_obs, settings["values"], names])
    meta = {
        "format": FORMAT,
        "sedd": sedd.__version__,
        "n_obs": gathered.n_obs,
        "n_vars": len(names),
        "nnz": gathered.n,
        "values": settings["values"],
        "max_value": gathered.max,
        "codec": settings["codec"],
        "settings": settings,
        "inputs": inputs,
        "grown": list(grown),
        "rounded": gathered.rounded,
        "fingerprint": hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
    }
    cells = {"total": gathered.total, "n_genes": gathered.row_nnz, "max": gathered.largest, "hash": gathered.hashes}
    added: dict[str, Any] = {"meta": json.dumps(meta), "cells": cells, "genes": gathered.genes}
    if gathered.histogram is not None:
        added["histogram"] = gathered.histogram
    write_elements(group["uns"], {"sedd": added})
    consolidate(group)


def join_var(frames: list[pd.DataFrame], genes: pd.Index) -> pd.DataFrame:
    """Return the genes' table of the result: each gene's row from the first input that has it."""
    pieces: list[pd.DataFrame] = []
    for frame in frames:
        known = np.zeros(len(frame), bool) if not pieces else np.logical_or.reduce([frame.index.isin(p.index) for p in pieces])
        wanted = frame.index.isin(genes) & ~known
        if wanted.any():
            pieces.append(frame[wanted])
    joined = pieces[0] if len(pieces) == 1 else concatenated(pieces, [{}] * len(pieces))[0]
    return joined.reindex(genes)


