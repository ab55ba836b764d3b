"""Which genes the inputs of a store lack: nobody counted them in their cells, so an entry that is not there is no zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Lacking:
    """Genes that some inputs of a store lack, by name: so it holds for chosen cells and genes of the store too.

    Attributes
    ----------
    column
        Of obs: which input a cell is from.
    inputs : list of str
        Names of the inputs that lack some.
    genes : (k,) str
        What one of them or several lack.
    table : (inputs, k) bool
        Which of these genes each lacks.
    """

    column: str
    inputs: list[str]
    genes: np.ndarray
    table: np.ndarray

    @classmethod
    def of(cls, column: str, inputs: Sequence[str], genes: Sequence[str], table: np.ndarray) -> Lacking | None:
        """Return what inputs lack of the genes of a store, all of both given; None if nothing."""
        rows, columns = np.flatnonzero(table.any(1)), np.flatnonzero(table.any(0))
        if not rows.size:
            return None
        return cls(column, [inputs[k] for k in rows.tolist()], np.asarray(genes, dtype=object)[columns], table[rows][:, columns])

    @classmethod
    def read(cls, element: Any) -> Lacking | None:
        """Return what `element` made, from what a file or an AnnData has in its place; None if that is nothing of the kind."""
        if not isinstance(element, Mapping) or not {"column", "inputs", "genes", "table"} <= set(element):
            return None
        inputs, genes, table = (np.asarray(element[name]) for name in ("inputs", "genes", "table"))
        if table.shape != (inputs.size, genes.size) or inputs.ndim != 1 or genes.ndim != 1:
            return None
        names = np.array([str(name) for name in genes.tolist()], dtype=object)
        if len(set(names)) < names.size:
            return None
        return cls(str(element["column"]), [str(name) for name in inputs.tolist()], names, table.astype(bool))

    def element(self) -> dict[str, Any]:
        """Return what a store keeps of it."""
        return {"column": self.column, "inputs": np.asarray(self.inputs, dtype=object), "genes": self.genes, "table": self.table}

    def among(self, genes: Sequence[str] | np.ndarray) -> np.ndarray:
        """Which of these genes each input lacks, (inputs, genes) bool."""
        return self.rows(genes)[:-1]

    def rows(self, genes: Sequence[str] | np.ndarray) -> np.ndarray:
        """Which of these genes a cell lacks, by the number that `codes` gives it: (inputs + 1, genes) bool, the last row of one that lacks none."""
        at = pd.Index(self.genes).get_indexer(pd.Index(np.asarray(genes, dtype=object)))
        return np.concatenate([self.table[:, at] & (at >= 0), np.zeros((1, at.size), bool)])

    def codes(self, labels: pd.Series | np.ndarray) -> np.ndarray:
        """Return the number of the input of each cell among `inputs`, (n_cells,) int64; -1 for one that lacks nothing."""
        named = pd.Series(labels).astype("category")
        number = {name: k for k, name in enumerate(self.inputs)}
        table = np.array([*(number.get(str(label), -1) for label in named.cat.categories), -1], np.int64)
        return table[named.cat.codes.to_numpy()]


def together(column: str, genes: Sequence[str], parts: Sequence[tuple[Lacking | None, Mapping[str, str]]]) -> Lacking | None:
    """Return what the inputs of several stores lack, of one that has the cells of all.

    Parameters
    ----------
    column : of the store of all
    genes : of all of them
    parts : of each store what its inputs lack, and what they are called in the store of all if otherwise
    """
    known = [(own, names) for own, names in parts if own is not None]
    if not known:
        return None
    inputs = [names.get(name, name) for own, names in known for name in own.inputs]
    return Lacking.of(column, inputs, genes, np.concatenate([own.among(genes) for own, _ in known]))
