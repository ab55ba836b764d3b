"""What several inputs have beside counts, joined: tables of cells, embeddings, uns; names of inputs and of the column that says which is which."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from natsort import natsorted

from sedd.errors import UserError
from sedd.io.format.plain import made_unique
from sedd.io.input.cells import CellTable


def concatenated(frames: list[pd.DataFrame], obsm: list[dict[str, Any]]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Tables and embeddings one after the other, as `anndata.concat` does: categories are united, what a table lacks is missing.

    Importing anndata takes longer than to append 10,000 cells, so tables with the same columns of the same types do without.
    """
    if _are_alike(frames, obsm):
        return _plainly_concatenated(frames), {name: np.concatenate([arrays[name] for arrays in obsm]) for name in obsm[0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that repeat: they are made unique, or may
        import anndata as ad

        cells = [ad.AnnData(obs=frame, obsm=arrays) for frame, arrays in zip(frames, obsm, strict=True)]
        joined = ad.concat(cells, join="outer")
    return joined.obs, dict(joined.obsm)


def _are_alike(frames: list[pd.DataFrame], obsm: list[dict[str, Any]]) -> bool:
    """Whether all tables have the same columns of the same types (categories may differ, if they are text without an order), and the same embeddings."""
    first = frames[0]
    same = all(frame.columns.equals(first.columns) and len(frame) and _is_text(frame.index) for frame in frames) and first.columns.is_unique
    if not same or not all(_are_one_type([frame[name].dtype for frame in frames]) for name in first):
        return False
    found = [{name: (type(array), array.dtype, np.shape(array)[1:]) for name, array in arrays.items() if type(array) is np.ndarray} for arrays in obsm]
    return all(len(kinds) == len(arrays) and kinds == found[0] for kinds, arrays in zip(found, obsm, strict=True))


def _are_one_type(dtypes: list[Any]) -> bool:
    if isinstance(dtypes[0], pd.CategoricalDtype):
        return all(isinstance(own, pd.CategoricalDtype) and not own.ordered and _is_text(own.categories) for own in dtypes)
    return all(own == dtypes[0] for own in dtypes)


def _is_text(names: pd.Index) -> bool:
    """Whether an index is of text, of one type for all tables."""
    return bool(names.dtype == pd.Index(["a"]).dtype and names.inferred_type in ("string", "empty"))


def _plainly_concatenated(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables of which `_are_alike` is true, one after the other."""
    united = {}
    for name in frames[0]:
        if isinstance(frames[0][name].dtype, pd.CategoricalDtype):
            categories: list[pd.Index] = [frame[name].cat.categories for frame in frames]
            united[name] = pd.CategoricalDtype(natsorted(categories[0].append(categories[1:]).unique()))
    joined = pd.concat([frame.astype(united) for frame in frames])
    joined.columns = frames[0].columns
    return joined


def _stacked(frames: list[pd.DataFrame], obsm: list[dict[str, Any]]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Tables and embeddings one after the other; names of cells are made unique."""
    obs, arrays = concatenated(frames, obsm)
    if not obs.index.is_unique:
        obs.index = pd.Index(made_unique(obs.index.tolist()), dtype=obs.index.dtype, name=obs.index.name)
    return obs, arrays


def join_obsm(tables: list[CellTable], obsm: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Embeddings of the cells of all inputs one after the other; and what is to be said of them."""
    names = dict.fromkeys(name for arrays in obsm for name in arrays)
    widths = {name: {np.shape(arrays.get(name, ()))[1:] for arrays in obsm} for name in names}
    kept = [name for name in names if all(name in arrays for arrays in obsm) and len(widths[name]) == 1]
    left = [name for name in names if name not in kept]
    news = [f"obsm {', '.join(left)}: left out, as not all inputs have it, with the same number of columns."] if left else []
    fit = [usable(table.n_rows, {name: arrays[name] for name in kept}) for table, arrays in zip(tables, obsm, strict=True)]
    plain = [name for name in kept if all(type(arrays.get(name)) is np.ndarray for arrays in fit)]
    joined: dict[str, Any] = {name: np.concatenate([arrays[name] for arrays in fit]) for name in plain}
    if len(plain) < len(kept):
        frames = [pd.DataFrame(index=table.names(0, table.n_rows)) for table in tables]
        joined |= concatenated(frames, [{name: array for name, array in arrays.items() if name not in plain} for arrays in fit])[1]
    return {name: joined[name] for name in kept if name in joined}, news


def _source_columns() -> Iterator[str]:
    """Names for the column that says which input a cell is from."""
    yield from ("source", "sedd_source")
    yield from (f"sedd_source_{k}" for k in itertools.count())


def own_source_column(columns: Iterable[Any]) -> str | None:
    """Return the column of a store of several inputs that says which one a cell is from; names before it are the inputs' own."""
    there = set(columns)
    return next(iter(list(itertools.takewhile(there.__contains__, _source_columns()))[-1:]), None)


def source_column(frames: list[pd.DataFrame]) -> tuple[str, list[str]]:
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
) -> tuple[pd.DataFrame, dict[str, Any], list[str], tuple[str, list[str]]]:
    """Tables and embeddings of a store with those of the inputs appended; what is to be said of them; the column and names of these inputs.

    They are what a conversion of all inputs at once would make, but for embeddings: the store's are kept, with missing values where
    an input has none.

    Parameters
    ----------
    table, obsm : of the store
    known : paths of the inputs that are in it
    frames, new_obsm, paths : of the inputs
    named : whether the store says which input a cell is from
    keys : names of the inputs; their paths if empty
    """
    known_by = own_source_column(table) if named else None
    own = [] if known_by is None else [known_by]
    column, news = source_column([table.drop(columns=own), *frames])
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
        fit = {name: array for name, array in usable(len(frame), arrays).items()
               if name in obsm and np.shape(array)[1:] == np.shape(obsm[name])[1:]}  # fmt: skip
        if left := [name for name in arrays if name not in fit]:
            news.append(f"{path}: obsm {', '.join(left)} is left out, as the store has none, or of another width.")
        if empty := [name for name in obsm if name not in fit]:
            news.append(f"obsm {', '.join(empty)}: missing for the cells of {path}, which has none.")
        kept.append(fit)
    labelled = [
        frame.assign(**{column: pd.Categorical([name] * len(frame), [name])}) for frame, name in zip(frames, names, strict=True)
    ]
    return *_stacked([table, *labelled], [obsm, *kept]), news, (column, names)


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
    kept: Any = {}
    if set(uns[0]).intersection(*uns[1:]):
        import anndata as ad

        kept = ad.concat([ad.AnnData(obs=pd.DataFrame(index=[str(k)]), uns=own) for k, own in enumerate(uns)], uns_merge="same").uns
    for name in [name for name in kept if name.endswith("_colors")]:
        column = name.removesuffix("_colors")
        if column in obs and column in first and obs[column].dtype != first[column].dtype:
            del kept[name]
    left = [name for name in dict.fromkeys(name for mapping in uns for name in mapping) if name not in kept]
    return dict(kept), [f"uns {', '.join(left)}: left out, as it is not the same in all inputs."] if left else []


def usable(n_rows: int, arrays: dict[str, Any]) -> dict[str, Any]:
    """Embeddings that have a row for each cell."""
    return {key: array for key, array in arrays.items() if np.ndim(array) >= 1 and np.shape(array)[0] == n_rows}
