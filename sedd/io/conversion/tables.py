"""Write everything of a store but X: the tables of cells and genes, embeddings, what the user had in uns, what sedd adds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import zarr

import sedd
from sedd.errors import warn_user
from sedd.io.conversion.cells import JoinedCells
from sedd.io.conversion.genes import match_inputs, noted_order, unique_names
from sedd.io.conversion.inputs import Plan
from sedd.io.conversion.joins import concatenated, distinct_names, join_obsm, join_uns, own_source_column, usable
from sedd.io.conversion.statistics import Statistics
from sedd.io.format.elements import write_elements
from sedd.io.format.lacking import Lacking
from sedd.io.format.plain import read_element
from sedd.io.format.shards import consolidate
from sedd.io.format.table_blocks import write_blocks
from sedd.io.input.base import Input, check_drop
from sedd.io.input.cells import CellTable
from sedd.io.input.opening import lacking_of, opened_as
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
            labels = _labels(plan)
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


def _labels(plan: Plan) -> list[str] | None:
    """Names of the inputs, where the store says which one a cell is from."""
    paths, keys = [path for path, _, _ in plan.sources], plan.settings["keys"]
    return (keys or distinct_names(paths)) if len(paths) > 1 or keys else None


def lacking(group: zarr.Group, plan: Plan) -> Lacking | None:
    """Return which genes of the store each input of `plan` lacks; inputs of a store that does not name them have numbers for names.

    What a store that is the only input says of its own inputs holds for the new one as well.
    """
    columns = group["obs"].attrs["column-order"]
    for path, _, _ in plan.sources:
        with opened_as(path, plan.settings) as file:
            before = lacking_of(file)
        if before is not None and len(plan.sources) == 1 and before.column in columns:
            return Lacking.of(before.column, before.inputs, names := _gene_names(group), before.among(names))
        if before is not None:
            warn_user(
                f"{path}: was made of files of which some lack genes, and which cell is from which is not known here: their cells are taken to have no "
                "counts of them. Convert the files themselves."
            )
    genes, has = _gene_names(group), np.ones((len(plan.sources), plan.n_vars), bool)
    for number, own in enumerate(has):
        if os.path.exists(path := f"{plan.folder}/genes-{number}.npy"):
            new = np.load(path)
            own[:] = False
            own[new[new >= 0]] = True
    named = None if plan.settings["obs"] == [] else _labels(plan)
    column = own_source_column(columns) if named else None
    return Lacking.of(column or "", named or [str(number) for number in range(len(has))], genes, ~has)


def _gene_names(group: zarr.Group) -> list[str]:
    var = group["var"]
    names: list[str] = read_element(var[var.attrs["_index"]]).tolist()
    return names


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
    *,
    lacking: Lacking | None,
) -> None:
    """Write `uns["sedd"]`, and consolidate the metadata of the whole store.

    Parameters
    ----------
    settings : of the store
    inputs : what the store remembers of its inputs
    grown : what the store was each time before cells were appended
    lacking : genes that inputs lack, if any does
    """
    names = _gene_names(group)
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
    if lacking is not None:
        added["lacking"] = lacking.element()
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


