"""Line up the genes of one or several inputs."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sedd.errors import UserError, counted, warn_user
from sedd.io.files import write_json
from sedd.io.input.base import Input, Naming, check_names, strip_versions

if TYPE_CHECKING:
    import pandas as pd  # slow to import


def unique_names(path: str, names: list[str], *, aloud: bool = True) -> list[str]:
    """Gene names made unique as AnnData does (`-1`, `-2`, ...); says so in one line unless that was done before."""
    if len(set(names)) == len(names):
        return names
    from sedd.io.format.plain import made_unique  # rarely needed, and imports pandas

    if aloud:
        counts = Counter(names)
        first = next(name for name in names if counts[name] > 1)
        warn_user(
            f"{path}: {len(names) - len(counts)} gene names repeat (first: {first!r}); they were made unique as AnnData does."
        )
    return made_unique(names)


def read_gene_list(genes: str | os.PathLike[str] | list[str] | None) -> list[str] | None:
    """Gene names from a list, or from a file with one a line: the name is what stands before the first tab.

    Raises
    ------
    UserError
        If the file cannot be read, is not text, or holds no names.
    """
    if genes is None or isinstance(genes, list):
        return genes
    try:
        with open(genes, "rb") as file:
            raw = file.read()
        # Spreadsheets begin a file with a byte order mark, and may write two bytes a letter.
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except OSError as error:
        raise UserError(f"{genes}: cannot be read ({error.strerror}); expected a file with one gene name a line.") from error
    except UnicodeDecodeError as error:
        if wide:
            raise UserError(f"{genes}: is not UTF-16 text, as which it begins; expected one gene name a line. Save it as UTF-8.") from error
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            f"{genes}: is not UTF-8 text (byte 0x{raw[error.start]:02x} in line {line}); expected one gene name a line. Save it as UTF-8."
        ) from error
    names = [name for line in text.splitlines() if (name := line.split("\t")[0].strip())]
    if not names:
        raise UserError(f"{genes}: holds no gene names; expected one a line.")
    return list(dict.fromkeys(names))


def match_inputs(files: list[Input], settings: dict[str, Any], *, aloud: bool = True) -> tuple[list[str], list[np.ndarray | None]]:
    """Return what `match_genes` does of the genes of `files`, by the settings of a conversion.

    Parameters
    ----------
    aloud : say what is made unique, left out or not found
    """
    raw, drop = settings["raw"], tuple(settings["drop"])
    lacking = [file for file in files if not file.has_gene_names(raw, drop)]
    if len(lacking) == len(files):
        check_names(files[0].path, files[0].var(raw, drop), files[0].naming)
    for file in lacking if aloud else []:
        warn_user(f"{file.path}: var has no column {file.naming.column!r}; the names of its index are used.")
    names, kept = [], []
    for file in files:
        own, mask = file.var_names(raw, drop), file.kept_genes(raw)
        if mask is not None:
            own = [name for name, taken in zip(own, mask, strict=True) if taken]
            if aloud:
                warn_user(f"{file.path}: {len(mask) - len(own)} of {len(mask)} features are of another type and are left out; see --modality.")
        elif aloud and settings["genes"] is None:
            _say_types(file.path, file.var(raw, drop))
        names.append(unique_names(file.path, own, aloud=aloud))
        kept.append(mask)
    if len(files) > 1 and settings["join"] != "wanted":
        _check_overlap(files, names, settings)
    genes, maps = match_genes([file.path for file in files], names, settings["join"], settings["genes"], aloud=aloud)
    for k, mask in enumerate(kept):
        if mask is not None:
            whole = np.full(mask.size, -1, np.int32)
            own_map = maps[k]
            whole[mask] = np.arange(mask.sum(), dtype=np.int32) if own_map is None else own_map
            maps[k] = whole
    return genes, maps


def _say_types(path: str, table: pd.DataFrame) -> None:
    """Say that features of several types, such as genes and antibodies, are all taken as genes."""
    types = [] if "feature_types" not in table else table["feature_types"].dropna().astype(str).value_counts().index.tolist()
    if len(types) > 1:
        warn_user(
            f"{path}: var['feature_types'] names {len(types)} types of features ({', '.join(types[:4])}), which are all taken as genes. To take one alone: "
            f"adata[:, adata.var['feature_types'] == {types[0]!r}]."
        )


LEAST_OVERLAP, FEW = 0.1, 0.5
"""Shares of the smaller panel that two inputs must, and should, have in common."""


def _check_overlap(files: list[Input], names: list[list[str]], settings: dict[str, Any]) -> None:
    """Refuse inputs that have hardly a gene in common, of those asked for, and mention few."""
    asked = None if settings["genes"] is None else set(settings["genes"])
    panels = [set(own) if asked is None else set(own) & asked for own in names]
    for file, panel, own in zip(files[1:], panels[1:], names[1:], strict=True):
        common, smaller = len(panel & panels[0]), min(len(panel), len(panels[0]))
        if common >= FEW * smaller:
            continue
        # Names of one kind, of which others are asked for in each.
        if settings["join"] == "outer" and len(set(own) & set(names[0])) >= FEW * min(len(own), len(names[0])):
            continue
        count = f"{common} of its {len(panel)} genes" if common else "no gene"
        text = f"{file.path}: has {count} in common with the {len(panels[0])} of {files[0].path} (for example {own[0]!r} and {names[0][0]!r})"
        raw, drop = settings["raw"], tuple(settings["drop"])
        hints = [
            name_hint(one.path, one.var(raw, drop), one.naming, theirs, strip_both=True)
            for one, theirs in ((file, names[0]), (files[0], own))
        ]
        hint = hints[0] or hints[1]
        if common < LEAST_OVERLAP * smaller:
            way_out = "If that is meant, name the genes by --genes." if asked is None else "Leave an input out, or name genes that both have."
            raise UserError(f"{text}. {hint or 'Do both use the same kind of names, symbols or Ensembl identifiers?'} {way_out}")
        warn_user(f"{text}. {hint}".rstrip())


def name_hint(path: str, table: pd.DataFrame, naming: Naming, theirs: list[str], *, strip_both: bool = False) -> str:
    """Return how genes could be named to be more like others; empty if no way helps.

    Parameters
    ----------
    path, table, naming : of the genes, and how they are named now
    theirs : the names to be like
    strip_both : whether versions would be taken off these too
    """
    known, own = set(theirs), [str(name) for name in table.index]
    best, most = "", len(known & set(own))
    if not naming.strip_version:
        n = len((set(strip_versions(theirs)) if strip_both else known) & set(strip_versions(own)))
        if n > max(2 * most, 1):
            best, most = "Pass --strip_version, which leaves the versions of identifiers out.", n
    for column in table.columns:
        if column == naming.column or getattr(table[column].dtype, "kind", "O") in "biufcmM":
            continue
        n = len(known & set(table[column].dropna().astype(str)))
        if n > max(2 * most, 1):
            best, most = f"Pass --gene_names {column}, to take the names from var[{str(column)!r}] of {path}.", n
    return best or _spelling_hint(path, own, theirs, most)


_PREFIX = re.compile(r"[^_]+_+")
"""What references of several species put before each name, as in GRCh38_CD4 or mm10___Cd4."""


def _spelling_hint(path: str, own: list[str], theirs: list[str], most: int) -> str:
    """Return in what the spelling of names differs, of which more than twice `most` would be alike; empty if they do not."""

    def alike(fold: Callable[[str], str], fold_theirs: Callable[[str], str]) -> int:
        return len(set(map(fold, own)) & set(map(fold_theirs, theirs)))

    def bare(name: str) -> str:
        return _PREFIX.sub("", name, count=1)

    if (n := alike(str.upper, str.upper)) > max(2 * most, 1):
        return (
            f"{counted(n, 'name')} of {path} would be found if capitals did not matter; mouse genes are written Cd4, human ones CD4. "
            "If they are the same genes to you, write them alike, for instance by adata.var_names = adata.var_names.str.upper()."
        )
    if (n := alike(bare, str)) > max(2 * most, 1):
        known = set(theirs)
        first = next(name for name in own if bare(name) in known)
        prefix = first.removesuffix(bare(first))
        return f"{counted(n, 'name')} of {path} would be found without what stands before: adata.var_names = adata.var_names.str.removeprefix({prefix!r})."
    if (n := alike(str, bare)) > max(2 * most, 1):
        known = set(own)
        first = next(name for name in theirs if bare(name) in known)
        return f"{counted(n, 'name')} of {path} would be found with {first.removesuffix(bare(first))!r} before it."
    return ""


def match_genes(
    paths: list[str], names: list[list[str]], join: str, wanted: list[str] | None, *, aloud: bool = True
) -> tuple[list[str], list[np.ndarray | None]]:
    """Return the genes of the result, and for each input the new number of each of its genes (-1: left out).

    Parameters
    ----------
    paths : of the inputs, for messages
    names : unique gene names of each input
    join : "inner" keeps genes that all inputs have, "outer" those that any has, "wanted" all that are wanted, whether any has them
    wanted : keep only these, in this order
    aloud : say which of them are not there

    Returns
    -------
    genes : names of the result
    maps : one (genes of the input,) int32 each, or None where nothing changes
    """
    if join not in ("inner", "outer", "wanted"):
        raise UserError(f"--join must be inner or outer, not {join!r}.")
    genes = names[0]
    for other in names[1:]:
        theirs, ours = set(other), set(genes)
        if join == "inner":
            genes = [name for name in genes if name in theirs]
        else:
            genes = genes + [name for name in other if name not in ours]
    if not genes:
        raise UserError(
            f"{', '.join(paths)}: have no gene in common that each of them has, which is all that --join inner keeps. Pass --join outer, or "
            "leave an input out."
        )
    if aloud and join == "inner" and wanted is None and (lost := set().union(*names).difference(genes)):
        first = next(name for theirs in names for name in theirs if name in lost)
        without = next(path for path, theirs in zip(paths, names, strict=True) if first not in theirs)
        warn_user(
            f"{', '.join(paths)}: {len(lost)} of their {len(lost) + len(genes)} genes are left out, as not all have them (first: {first!r}, which {without} "
            "lacks). --join outer keeps them, unknown where they are lacking."
        )
    if wanted is not None:
        there = set(genes)
        kept = wanted if join == "wanted" else list(dict.fromkeys(name for name in wanted if name in there))
        if there.isdisjoint(kept):
            raise UserError(f"{paths[0]}: has none of the {len(wanted)} genes asked for (for example {wanted[0]!r}).")
        if aloud and len(kept) < len(wanted):
            absent = next(name for name in wanted if name not in there)
            warn_user(f"{paths[0]}: {len(wanted) - len(kept)} of the {len(wanted)} genes asked for are not there (first: {absent!r}).")
        genes = kept
    for path, own in zip(paths, names, strict=True) if aloud and join == "outer" else ():
        there = set(own)
        if lacking := [name for name in genes if name not in there]:
            warn_user(f"{path}: lacks {len(lacking)} of the {len(genes)} genes (first: {lacking[0]!r}); in its cells they are unknown, not 0.")
    number = {name: k for k, name in enumerate(genes)}
    maps = [None if own == genes else np.array([number.get(name, -1) for name in own], np.int32) for own in names]
    return genes, maps


def by_frequency(genes: list[str], maps: list[np.ndarray | None], seen: np.ndarray) -> tuple[list[str], list[np.ndarray | None]]:
    """Return genes and maps as from `match_genes`, those first that were seen in most cells of the first input; ties stay in order.

    Gaps between the genes of a cell are then short and its first counts large, which encodes in fewer bytes.

    Parameters
    ----------
    seen : (genes of the first input,) in how many cells
    """
    own = maps[0]
    frequency = np.zeros(len(genes), np.int64)
    frequency[np.arange(len(genes)) if own is None else own[own >= 0]] = seen if own is None else seen[own >= 0]
    order = np.argsort(-frequency, kind="stable")
    if (order == np.arange(order.size)).all():
        return genes, maps
    place = np.empty(order.size, np.int32)
    place[order] = np.arange(order.size)
    moved: list[np.ndarray | None] = [place.copy() if one is None else np.where(one >= 0, place[one], np.int32(-1)) for one in maps]
    return [genes[k] for k in order], moved


def note_order(folder: str, genes: list[str]) -> None:
    """Note, in the folder of a conversion, which order its genes have."""
    write_json(f"{folder}/genes.json", genes)


def noted_order(folder: str) -> list[str] | None:
    """Return what `note_order` noted; None if the order is as from `match_inputs`."""
    try:
        with open(f"{folder}/genes.json") as file:
            found: list[str] = json.load(file)
    except FileNotFoundError:
        return None
    return found
