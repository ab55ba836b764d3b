"""Pretrained gene vectors, read from a file and matched to a panel by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from sedd.errors import UserError, warn_user


def read_gene_vectors(path: str | Path, genes: list[str]) -> np.ndarray:
    """Vectors of the genes of a panel.

    Parameters
    ----------
    path
        An .npz with `genes` (n,) of str and `vectors` (n, d) of float, or a .csv or .tsv of a gene name and its numbers.
    genes
        The panel; a gene that the file lacks gets the mean of those it has.

    Returns
    -------
    vectors : (len(genes), d) float32

    Raises
    ------
    UserError
        If the file cannot be read, holds other than finite numbers, or knows fewer than half of the genes.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                names, vectors = [str(gene) for gene in file["genes"]], np.asarray(file["vectors"], np.float32)
        else:
            table = pd.read_csv(path, sep="\t" if path.suffix in (".tsv", ".txt") else ",", header=None, index_col=0)
            names, vectors = [str(gene) for gene in table.index], table.to_numpy(np.float32)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, pd.errors.ParserError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as gene vectors ({reason[:150]}); expected an .npz with `genes` and `vectors`, or a "
            ".csv or .tsv of a gene name and numbers."
        ) from error
    if vectors.ndim != 2 or len(names) != len(vectors) or not np.isfinite(vectors).all():
        raise UserError(f"{path}: holds {len(names)} names and numbers of shape {vectors.shape}; expected finite (genes, d).")
    row = {name: i for i, name in enumerate(names)}
    where = np.array([row.get(gene, -1) for gene in genes])
    found = int((where >= 0).sum())
    if found < len(genes) / 2:
        raise UserError(
            f"{path}: has vectors for {found} of the {len(genes)} genes; expected at least half (its names look like {names[:2]})."
        )
    if found < len(genes):
        warn_user(f"{path}: {len(genes) - found} of {len(genes)} genes have no vector; they get the mean vector.")
    out = np.where(where[:, None] >= 0, vectors[where], vectors[where[where >= 0]].mean(0))
    return np.ascontiguousarray(out, np.float32)
