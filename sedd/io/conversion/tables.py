"""Write everything of a store but X: the tables of cells and genes, embeddings, what the user had in uns, what sedd adds."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import zarr

import sedd
from sedd.errors import UserError
from sedd.io.conversion.genes import match_inputs, unique_names
from sedd.io.conversion.inputs import Plan
from sedd.io.conversion.statistics import Statistics
from sedd.io.format.elements import write_elements
from sedd.io.format.plain import read_element
from sedd.io.format.shards import consolidate
from sedd.io.input.base import Input, check_drop
from sedd.io.input.opening import opened_as
from sedd.io.store import FORMAT

if TYPE_CHECKING:
    from anndata import AnnData  # imported only to join several inputs, as that takes long


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
        genes, _ = match_inputs(files, settings, aloud=False)
        var = join_var(frames, pd.Index(genes, name=frames[0].index.name))
        if settings["obs"] == []:  # a conversion for the sake of the matrix alone
            names = np.arange(sum(file.n_obs for file in files)).astype(str)
            obs, obsm, uns = [pd.DataFrame(index=names)], [dict[str, Any]()], [dict[str, Any]()]
        else:
            obs, obsm = [file.obs(settings["obs"], drop) for file in files], [file.mapping("obsm", drop) for file in files]
            uns = [file.mapping("uns", drop) for file in files]
    table, arrays, news = join_obs(obs, obsm, paths, settings["keys"])
    kept, lost = join_uns(uns, table, obs[0])
    news += lost
    reordered = settings["shuffle"] or settings["group_by"] is not None
    if reordered:
        places = np.load(f"{plan.folder}/places.npy")
        order = np.argsort(places, kind="stable")[places.size - n_obs :]
        table = table.iloc[order].assign(sedd_cell=order)
    else:
        order = np.arange(n_obs)
        table = table.iloc[:n_obs]
    if reordered or n_obs < sum(map(len, obs)):
        arrays = {name: _rows(array, order) for name, array in arrays.items()}
    elements = {"obs": table, "var": var, "obsm": arrays, "uns": kept}
    return news + write_elements(group, elements | {name: {} for name in ("layers", "obsp", "varm", "varp")})


def label_codes(files: list[Input], column: str) -> np.ndarray:
    """Codes of the labels of an obs column of all inputs, joined: in the order of categories, else sorted; -1 where missing."""
    frames = [file.obs([column])[[column]] for file in files]
    labels = frames[0][column] if len(frames) == 1 else _concat(frames, [{}] * len(frames)).obs[column]
    found: np.ndarray = labels.astype("category").cat.codes.to_numpy().astype(np.int64)
    return found


def _genes_of(file: Input, raw: bool, drop: tuple[str, ...]) -> pd.DataFrame:
    frame, kept = file.var(raw, drop), file.kept_genes(raw)
    return frame if kept is None else frame[kept]


def _rows(array: Any, order: np.ndarray) -> Any:
    return array.iloc[order] if isinstance(array, pd.DataFrame) else array[order]


def _repeated(path: str, names: pd.Index) -> str:
    repeated = names[names.duplicated()]
    return f"{path}: {len(repeated)} cell names repeat (first: {repeated[0]!r}); kept as they are."


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
    joined = pieces[0] if len(pieces) == 1 else _concat(pieces, [{}] * len(pieces)).obs
    return joined.reindex(genes)


def _concat(frames: list[pd.DataFrame], obsm: list[dict[str, Any]]) -> AnnData:
    """Tables one after the other, as `anndata.concat` does: categories are united, what a table lacks is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that repeat: they are made unique, or may
        import anndata as ad

        cells = [ad.AnnData(obs=frame, obsm=arrays) for frame, arrays in zip(frames, obsm, strict=True)]
        return ad.concat(cells, join="outer")


def join_obs(
    frames: list[pd.DataFrame], obsm: list[dict[str, Any]], paths: list[str], keys: list[str]
) -> tuple[pd.DataFrame, dict[str, Any], list[str]]:
    """Tables and embeddings of the cells of all inputs one after the other; and what is to be said of them.

    Parameters
    ----------
    keys : names of the inputs; their paths if empty
    """
    if len(frames) == 1 and not keys:
        return frames[0], _usable(frames[0], obsm[0]), ([] if frames[0].index.is_unique else [_repeated(paths[0], frames[0].index)])
    names = dict.fromkeys(name for arrays in obsm for name in arrays)
    widths = {name: {np.shape(arrays.get(name, ()))[1:] for arrays in obsm} for name in names}
    kept = [name for name in names if all(name in arrays for arrays in obsm) and len(widths[name]) == 1]
    news = []
    if left := [name for name in names if name not in kept]:
        news.append(f"obsm {', '.join(left)}: left out, as not all inputs have it, with the same number of columns.")
    usable = [_usable(frame, {name: arrays[name] for name in kept}) for frame, arrays in zip(frames, obsm, strict=True)]
    labels: list[Any] = [pd.Categorical([label] * len(frame), [label]) for label, frame in zip(keys or distinct_names(paths), frames, strict=True)]
    column, said = _source_column(frames)
    labelled = [frame.assign(**{column: label}) for frame, label in zip(frames, labels, strict=True)]
    return *_stacked(labelled, usable), news + said


def _stacked(frames: list[pd.DataFrame], obsm: list[dict[str, Any]]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Tables and embeddings one after the other; names of cells are made unique."""
    joined = _concat(frames, obsm)
    if not joined.obs_names.is_unique:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that end like those it makes
            joined.obs_names_make_unique()
    return joined.obs, dict(joined.obsm)


def _source_columns() -> Iterator[str]:
    """Names for the column that says which input a cell is from."""
    yield from ("source", "sedd_source")
    yield from (f"sedd_source_{k}" for k in itertools.count())


def _source_column(frames: list[pd.DataFrame]) -> tuple[str, list[str]]:
    """Return the first such name that the inputs leave free, and what is to be said of it."""
    column = next(name for name in _source_columns() if not any(name in frame for frame in frames))
    said = f"obs['source'] is the inputs' own; which input a cell is from is in obs[{column!r}]."
    return column, [said] if column != "source" else []


def append_obs(
    table: pd.DataFrame,
    obsm: dict[str, Any],
    known: list[str],
    frames: list[pd.DataFrame],
    new_obsm: list[dict[str, Any]],
    paths: list[str],
    *,
    named: bool,
    keys: list[str],
) -> tuple[pd.DataFrame, dict[str, Any], list[str]]:
    """Tables and embeddings of a store with those of the inputs appended; and what is to be said of them.

    They are what `join_obs` makes of all inputs at once, but for embeddings: the store's are kept, with missing values where
    an input has none.

    Parameters
    ----------
    table, obsm : of the store
    known : paths of the inputs that are in it
    frames, new_obsm, paths : of the inputs
    named : whether the store says which input a cell is from
    keys : names of the inputs; their paths if empty
    """
    chain = list(itertools.takewhile(lambda name: name in table, _source_columns()))
    own = chain[-1:] if named else []  # the names before it are the inputs' own
    column, news = _source_column([table.drop(columns=own), *frames])
    if named:
        table = table.rename(columns=dict.fromkeys(own, column))
        taken = [str(name) for name in pd.Categorical(table[column]).categories] if own else []
        names = keys or _names_beside(taken, paths)
        if both := sorted({*names} & {*taken}):
            raise UserError(f"--keys {both[0]}: is the name of an input that is in the store; expected another.")
    else:
        first, *names = distinct_names([*known, *paths])
        if keys:
            first, names = distinct_names(known)[0], keys
        table = table.assign(**{column: pd.Categorical([first] * len(table), [first])})
    kept = []
    for frame, arrays, path in zip(frames, new_obsm, paths, strict=True):
        fit = {name: array for name, array in _usable(frame, arrays).items()
               if name in obsm and np.shape(array)[1:] == np.shape(obsm[name])[1:]}  # fmt: skip
        if left := [name for name in arrays if name not in fit]:
            news.append(f"{path}: obsm {', '.join(left)} is left out, as the store has none, or of another width.")
        if empty := [name for name in obsm if name not in fit]:
            news.append(f"obsm {', '.join(empty)}: missing for the cells of {path}, which has none.")
        kept.append(fit)
    labelled = [
        frame.assign(**{column: pd.Categorical([name] * len(frame), [name])}) for frame, name in zip(frames, names, strict=True)
    ]
    return *_stacked([table, *labelled], [obsm, *kept]), news


def _names_beside(taken: list[str], paths: list[str]) -> list[str]:
    """Return names of files that tell them apart, and from those that are `taken`: ends of their paths, or numbered."""
    depth, longest = 1, max(path.count("/") for path in paths) + 1
    while True:
        names = ["/".join(path.rstrip("/").split("/")[-depth:]) for path in paths]
        if len({*names, *taken}) == len(names) + len(set(taken)) or depth >= longest:
            break
        depth += 1
    found: list[str] = []
    for name in names:
        free = (name if k == 0 else f"{name} ({k + 1})" for k in itertools.count())
        found.append(next(one for one in free if one not in taken and one not in found))
    return found


def append_uns(uns: dict[str, Any], table: pd.DataFrame, before: pd.DataFrame, new: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Which keys of the store's `uns` hold no longer when cells are appended, and what is to be said.

    The store's `uns` stays, but for the colours of a column whose categories changed.

    Parameters
    ----------
    uns : of the store
    table, before : obs, with what is appended and without
    new : `uns` of the inputs
    """
    stale = []
    for name in uns:
        column = str(name).removesuffix("_colors")
        if column != name and column in table and column in before and table[column].dtype != before[column].dtype:
            stale.append(name)
    news = [f"uns {', '.join(stale)}: left out, as the categories changed."] if stale else []
    same, _ = join_uns([dict(uns), *map(dict, new)], table, before)
    left = dict.fromkeys(name for mapping in new for name in mapping if name not in same and name != "sedd" and name not in stale)
    return stale, news + ([f"uns {', '.join(left)}: stays as the store has it; what the appended files have there is left out."] if left else [])


def distinct_names(paths: list[str]) -> list[str]:
    """Return names of files that tell them apart: the last part of each path, or as many as are needed."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return paths


def join_uns(uns: list[dict[str, Any]], obs: pd.DataFrame, first: pd.DataFrame) -> tuple[dict[str, Any], list[str]]:
    """Return what all inputs have in uns with the same value, and what is to be said of the rest.

    The colours of a column are kept while its categories are those of the `first` input.
    """
    for mapping in uns:
        mapping.pop("sedd", None)
    if len(uns) == 1:
        return uns[0], []
    import anndata as ad

    kept = ad.concat([ad.AnnData(obs=pd.DataFrame(index=[str(k)]), uns=own) for k, own in enumerate(uns)], uns_merge="same").uns
    for name in [name for name in kept if name.endswith("_colors")]:
        column = name.removesuffix("_colors")
        if column in obs and column in first and obs[column].dtype != first[column].dtype:
            del kept[name]
    left = [name for name in dict.fromkeys(name for mapping in uns for name in mapping) if name not in kept]
    return dict(kept), [f"uns {', '.join(left)}: left out, as it is not the same in all inputs."] if left else []


def _usable(frame: pd.DataFrame, arrays: dict[str, Any]) -> dict[str, Any]:
    """Embeddings that have a row for each cell."""
    return {key: array for key, array in arrays.items() if np.ndim(array) >= 1 and np.shape(array)[0] == len(frame)}
