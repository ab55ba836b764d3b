"""Write everything of a store but X: the tables of cells and genes, embeddings, what the user had in uns, what sedd adds."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from contextlib import ExitStack
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr

import sedd
from sedd.io.conversion.genes import match_genes, unique_names
from sedd.io.conversion.inputs import Plan
from sedd.io.conversion.statistics import Gathered
from sedd.io.format.shards import consolidate
from sedd.io.h5ad import H5ad
from sedd.io.store import FORMAT

ROWS = 1 << 20
"""Rows of a column in one chunk: few files."""


def write(group: zarr.Group, plan: Plan) -> list[str]:
    """Write what the inputs of `plan` have beside X into `group`; return what is to be said of it."""
    settings, n_obs = plan.settings, plan.n_obs
    paths = [path for path, _, _ in plan.sources]
    with ExitStack() as stack:
        files = [stack.enter_context(H5ad(path)) for path in paths]
        frames = [file.var(settings["raw"]) for file in files]
        # What there is to say of genes was said when the plan was made.
        for file, frame in zip(files, frames, strict=True):
            frame.index = pd.Index(unique_names(file.path, frame.index.tolist(), aloud=False), name=frame.index.name)
        genes, _ = match_genes(paths, [f.index.tolist() for f in frames], settings["join"], settings["genes"], aloud=False)
        var = join_var(frames, pd.Index(genes, name=frames[0].index.name))
        obs, obsm = [file.obs(settings["obs"]) for file in files], [file.mapping("obsm") for file in files]
        uns = files[0].mapping("uns") if len(files) == 1 else {}
    news = [] if len(obs) > 1 or obs[0].index.is_unique else [_repeated(paths[0], obs[0].index)]
    cells = join_obs(obs, obsm, paths)
    if settings["shuffle"]:
        places = np.load(f"{plan.folder}/places.npy")
        order = np.argsort(places, kind="stable")[places.size - n_obs :]
        cells = cells[order].copy()
        cells.obs["sedd_cell"] = order
    elif n_obs < cells.n_obs:
        cells = cells[:n_obs].copy()
    uns.pop("sedd", None)
    elements = {"obs": cells.obs, "var": var, "obsm": dict(cells.obsm), "uns": uns}
    elements |= {name: {} for name in ("layers", "obsp", "varm", "varp")}
    _write(group, elements)
    return news


def _repeated(path: str, names: pd.Index) -> str:
    repeated = names[names.duplicated()]
    return f"{path}: {len(repeated)} cell names repeat (first: {repeated[0]!r}); kept as they are."


def write_added(group: zarr.Group, plan: Plan, gathered: Gathered, inputs: list[dict[str, str]]) -> None:
    """Write `uns["sedd"]`, and consolidate the metadata of the whole store.

    Parameters
    ----------
    inputs : what the store remembers of its inputs
    """
    var = group["var"]
    names = ad.io.read_elem(var[var.attrs["_index"]])
    _write(group["uns"], {"sedd": _added(plan, gathered, inputs, names.tolist())})
    consolidate(group)


def _write(group: zarr.Group, elements: dict[str, Any]) -> None:
    with ad.settings.override(auto_shard_zarr_v3=False, allow_write_nullable_strings=True):
        for key, element in elements.items():
            ad.experimental.write_dispatched(group, key, element, callback=_few_chunks)


def _added(plan: Plan, gathered: Gathered, inputs: list[dict[str, str]], names: list[str]) -> dict[str, Any]:
    """Return what goes under `uns["sedd"]`."""
    identity = json.dumps([gathered.content(), gathered.n_obs, plan.settings["values"], names])
    meta = {
        "format": FORMAT,
        "sedd": sedd.__version__,
        "n_obs": gathered.n_obs,
        "n_vars": plan.n_vars,
        "nnz": gathered.n,
        "values": plan.settings["values"],
        "max_value": gathered.max,
        "codec": plan.settings["codec"],
        "settings": plan.settings,
        "inputs": inputs,
        "rounded": gathered.rounded,
        "fingerprint": hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
    }
    cells = {"total": gathered.total, "n_genes": gathered.row_nnz, "max": gathered.largest, "hash": gathered.hashes}
    added: dict[str, Any] = {"meta": json.dumps(meta), "cells": cells, "genes": gathered.genes}
    if gathered.histogram is not None:
        added["histogram"] = gathered.histogram
    return added


def _few_chunks(func: Any, group: Any, key: str, element: Any, dataset_kwargs: Any, iospec: Any) -> None:
    """Write one element, arrays in chunks of `ROWS` rows."""
    shape: tuple[int, ...] = getattr(element, "shape", ())
    if iospec.encoding_type in ("array", "string-array") and len(shape) and 0 not in shape:
        dataset_kwargs = {**dataset_kwargs, "chunks": (min(ROWS, shape[0]), *shape[1:])}
    func(group, key, element, dataset_kwargs=dataset_kwargs)


def join_var(frames: list[pd.DataFrame], genes: pd.Index) -> pd.DataFrame:
    """Return the genes' table of the result: each gene's row from the first input that has it."""
    joined = frames[0].reindex(genes) if len(frames) == 1 or genes.isin(frames[0].index).all() else None
    if joined is None:
        joined = frames[0]
        for frame in frames[1:]:
            joined = pd.concat([joined, frame[~frame.index.isin(joined.index)]])
        joined = joined.reindex(genes)
    return joined


def join_obs(frames: list[pd.DataFrame], obsm: list[dict[str, Any]], sources: list[str]) -> ad.AnnData:
    """Tables and embeddings of the cells of all inputs one after the other, without X."""
    if len(frames) == 1:
        return ad.AnnData(obs=frames[0].copy(), obsm=_usable(frames[0], obsm[0]))
    shared = set.intersection(*(set(arrays) for arrays in obsm))
    widths = {key: {np.shape(arrays[key])[1:] for arrays in obsm} for key in shared}
    keys = sorted(key for key in shared if len(widths[key]) == 1)
    cells = [
        ad.AnnData(obs=frame.assign(source=pd.Categorical([os.path.basename(path)] * len(frame))),
                   obsm=_usable(frame, {key: arrays[key] for key in keys}))
        for frame, arrays, path in zip(frames, obsm, sources, strict=True)
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique")  # they are made so below
        joined = ad.concat(cells, join="outer")
    if not joined.obs_names.is_unique:
        joined.obs_names_make_unique()
    return joined


def _usable(frame: pd.DataFrame, arrays: dict[str, Any]) -> dict[str, Any]:
    """Embeddings that have a row for each cell."""
    return {key: array for key, array in arrays.items() if np.ndim(array) >= 1 and np.shape(array)[0] == len(frame)}
