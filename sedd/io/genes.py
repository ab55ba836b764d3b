"""Line up the genes and the tables of one or several inputs."""

from __future__ import annotations

import os
import warnings
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata.utils import make_index_unique

from sedd.errors import UserError, warn_user


def unique_names(path: str, index: pd.Index) -> pd.Index:
    """Gene names made unique as AnnData does (`-1`, `-2`, ...); says so in one line."""
    index = index.astype(str)
    if index.is_unique:
        return index
    repeated = index[index.duplicated()]
    warn_user(f"{path}: {len(repeated)} gene names repeat (first: {repeated[0]!r}); they were made unique as AnnData does.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_index_unique(index)


def read_gene_list(genes: str | os.PathLike[str] | list[str] | None) -> list[str] | None:
    """Gene names from a list, or from a file with one a line."""
    if genes is None or isinstance(genes, list):
        return genes
    try:
        with open(genes) as file:
            names = [line.split()[0] for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"{genes}: cannot be read ({error.strerror}); expected a file with one gene name a line.") from error
    if not names:
        raise UserError(f"{genes}: holds no gene names; expected one a line.")
    return list(dict.fromkeys(names))


def match_genes(
    paths: list[str], names: list[pd.Index], join: str, wanted: list[str] | None
) -> tuple[pd.Index, list[np.ndarray | None]]:
    """The genes of the result, and for each input the new number of each of its genes (-1: left out).

    Parameters
    ----------
    paths : of the inputs, for messages
    names : unique gene names of each input
    join : "inner" keeps genes that all inputs have, "outer" those that any has
    wanted : keep only these, in this order

    Returns
    -------
    genes : names of the result
    maps : one (genes of the input,) int32 each, or None where nothing changes
    """
    if join not in ("inner", "outer"):
        raise UserError(f"--join must be inner or outer, not {join!r}.")
    genes = names[0]
    for path, other in zip(paths[1:], names[1:], strict=True):
        if not genes.intersection(other, sort=False).size:
            raise UserError(
                f"{path}: has no gene in common with {paths[0]} (for example {other[0]!r} and {names[0][0]!r}). "
                "Do both use the same kind of names, symbols or Ensembl identifiers?"
            )
        genes = genes[genes.isin(other)] if join == "inner" else genes.append(other[~other.isin(genes)])
    if wanted is not None:
        kept = pd.Index([name for name in wanted if name in set(genes)])
        if not len(kept):
            raise UserError(f"{paths[0]}: has none of the {len(wanted)} genes asked for (for example {wanted[0]!r}).")
        if len(kept) < len(wanted):
            absent = next(name for name in wanted if name not in set(kept))
            warn_user(f"{paths[0]}: {len(wanted) - len(kept)} of the {len(wanted)} genes asked for are not there (first: {absent!r}).")
        genes = kept
    maps = [genes.get_indexer(own).astype(np.int32) for own in names]
    return genes, [None if np.array_equal(new, np.arange(len(genes))) else new for new in maps]


def join_var(frames: list[pd.DataFrame], genes: pd.Index) -> pd.DataFrame:
    """The genes' table of the result: each gene's row from the first input that has it."""
    joined = frames[0].reindex(genes) if len(frames) == 1 or genes.isin(frames[0].index).all() else None
    if joined is None:
        joined = frames[0]
        for frame in frames[1:]:
            joined = pd.concat([joined, frame[~frame.index.isin(joined.index)]])
        joined = joined.reindex(genes)
    return joined


def join_obs(frames: list[pd.DataFrame], obsm: list[dict[str, Any]], sources: list[str]) -> ad.AnnData:
    """Tables and embeddings of the cells of all inputs one after the other, without X."""
    parts = []
    for frame, arrays in zip(frames, obsm, strict=True):
        frame = frame.copy()
        if not frame.index.is_unique and len(frames) == 1:
            repeated = frame.index[frame.index.duplicated()]
            warn_user(f"{sources[0]}: {len(repeated)} cell names repeat (first: {repeated[0]!r}); kept as they are.")
        parts.append((frame, arrays))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if len(parts) == 1:
            return ad.AnnData(obs=parts[0][0], obsm=_usable(*parts[0]))
        shared = set.intersection(*(set(arrays) for _, arrays in parts))
        widths = {key: {np.shape(arrays[key])[1:] for _, arrays in parts} for key in shared}
        keys = sorted(key for key in shared if len(widths[key]) == 1)
        cells = [
            ad.AnnData(obs=frame.assign(source=pd.Categorical([os.path.basename(path)] * len(frame))),
                       obsm=_usable(frame, {key: arrays[key] for key in keys}))
            for (frame, arrays), path in zip(parts, sources, strict=True)
        ]  # fmt: skip
        joined = ad.concat(cells, join="outer")
        if not joined.obs_names.is_unique:
            joined.obs_names_make_unique()
        return joined


def _usable(frame: pd.DataFrame, arrays: dict[str, Any]) -> dict[str, Any]:
    """Embeddings that have a row for each cell."""
    return {key: array for key, array in arrays.items() if np.ndim(array) >= 1 and np.shape(array)[0] == len(frame)}
