"""Line up the genes of one or several inputs."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from sedd.errors import UserError, warn_user


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
    paths: list[str], names: list[list[str]], join: str, wanted: list[str] | None, *, aloud: bool = True
) -> tuple[list[str], list[np.ndarray | None]]:
    """Return the genes of the result, and for each input the new number of each of its genes (-1: left out).

    Parameters
    ----------
    paths : of the inputs, for messages
    names : unique gene names of each input
    join : "inner" keeps genes that all inputs have, "outer" those that any has
    wanted : keep only these, in this order
    aloud : say which of them are not there

    Returns
    -------
    genes : names of the result
    maps : one (genes of the input,) int32 each, or None where nothing changes
    """
    if join not in ("inner", "outer"):
        raise UserError(f"--join must be inner or outer, not {join!r}.")
    genes = names[0]
    for path, other in zip(paths[1:], names[1:], strict=True):
        theirs, ours = set(other), set(genes)
        if theirs.isdisjoint(ours):
            raise UserError(
                f"{path}: has no gene in common with {paths[0]} (for example {other[0]!r} and {names[0][0]!r}). "
                "Do both use the same kind of names, symbols or Ensembl identifiers?"
            )
        if join == "inner":
            genes = [name for name in genes if name in theirs]
        else:
            genes = genes + [name for name in other if name not in ours]
    if wanted is not None:
        there = set(genes)
        kept = list(dict.fromkeys(name for name in wanted if name in there))
        if not kept:
            raise UserError(f"{paths[0]}: has none of the {len(wanted)} genes asked for (for example {wanted[0]!r}).")
        if aloud and len(kept) < len(wanted):
            absent = next(name for name in wanted if name not in there)
            warn_user(f"{paths[0]}: {len(wanted) - len(kept)} of the {len(wanted)} genes asked for are not there (first: {absent!r}).")
        genes = kept
    number = {name: k for k, name in enumerate(genes)}
    maps = [None if own == genes else np.array([number.get(name, -1) for name in own], np.int32) for own in names]
    return genes, maps
