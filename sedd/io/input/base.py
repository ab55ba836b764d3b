"""What all inputs have in common, whatever their format: matrices, tables of cells and genes, and names."""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from sedd.errors import NoSuchPartError, UserError
from sedd.io.input.cells import CellTable
from sedd.io.input.faults import READ_ERRORS
from sedd.io.input.matrix import Matrix

if TYPE_CHECKING:
    import pandas as pd  # which is imported where tables are read: the matrix can be converted meanwhile

_VERSION = re.compile(r"^((?:ENS[A-Z]*|[NXY][MR]_|LRG_)[0-9]+)\.[0-9]+")
"""An identifier of Ensembl or RefSeq with its version; what follows, as in `ENSG00000182378.15_PAR_Y`, tells genes apart."""


class Naming(NamedTuple):
    """Where the names of genes come from.

    Attributes
    ----------
    column : of the genes' table; None for its index
    strip_version : take the versions off identifiers (`ENSG00000141510.18`)
    """

    column: str | None = None
    strip_version: bool = False


def strip_versions(names: list[str]) -> list[str]:
    """Names without the versions of identifiers; others stay as they are."""
    return [_VERSION.sub(r"\1", name) for name in names]


def check_drop(path: str, there: list[str], drop: tuple[str, ...]) -> None:
    """Refuse to leave out what is not there.

    Parameters
    ----------
    there : elements of the inputs, as `Input.elements` names them
    drop : what is to be left out
    """
    for name in drop:
        if "/" in name and name not in there:
            group = name.split("/")[0]
            listed = ", ".join(dict.fromkeys(element for element in there if element.startswith(f"{group}/"))) or "nothing"
            raise UserError(f"{path}: has no {name} (--drop); there are: {listed}.")


def has_names(table: pd.DataFrame, column: str) -> bool:
    """Whether a table of genes has a column (or an index) that names may come from."""
    return column in table or column == table.index.name


def check_names(path: str, table: pd.DataFrame, naming: Naming) -> None:
    """Refuse names from a column that the genes' table does not have."""
    if naming.column is not None and not has_names(table, naming.column):
        listed = ", ".join(map(str, table.columns)) or "none"
        raise UserError(f"{path}: var has no column {naming.column!r} for --gene_names; its columns are: {listed}.")


def names_of_genes(table: pd.DataFrame, naming: Naming) -> list[str]:
    """Return the names that are asked for; a gene without one in the column has that of the index."""
    names = [str(name) for name in table.index]
    column, strip = naming
    if column is not None and column in table and column != table.index.name:
        texts = ["" if missing else str(value).strip() for value, missing in zip(table[column], table[column].isna(), strict=True)]
        names = [text or name for text, name in zip(texts, names, strict=True)]
    return strip_versions(names) if strip else names


def renamed(table: pd.DataFrame, naming: Naming) -> pd.DataFrame:
    """Return a table of genes by the names that are asked for; those of its index stay in a column where they differ."""
    names = names_of_genes(table, naming)
    if naming == Naming() or names == table.index.tolist():
        return table
    known = set(map(str, table.columns))
    own = [] if table.index.name is None else [str(table.index.name)]
    column = next(name for name in (*own, "var_names", *(f"var_names_{k}" for k in range(len(known) + 1))) if name not in known)
    table = table.assign(**{column: table.index.to_numpy()})
    table.index = table.index.__class__(names, dtype=table.index.dtype, name=None)
    return table


def own_layer(layer: str | None, layers: list[str]) -> str | None:
    """Return the layer that is meant, None for `X`: "X" is a layer only where one is called so."""
    return None if layer == "X" and layer not in layers else layer


class Input(ABC):
    """An open input; a context manager.

    Attributes
    ----------
    path : as given
    kind : what the file is, for messages
    naming : where the names of genes come from
    """

    kind: ClassVar[str]

    def __init__(self, path: str, naming: Naming = Naming()) -> None:  # noqa: B008 (a tuple does not change)
        self.path, self.naming = path, naming

    def close(self) -> None:  # noqa: B027 (a folder holds nothing open)
        """Close the file."""

    def __enter__(self) -> Input:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def places(self) -> list[tuple[str, str | None, bool]]:
        """The matrices there are: how one is asked for, its layer, whether it is raw."""
        found: list[tuple[str, str | None, bool]] = [("X", None, False)] if self.has_x else []
        found += [(f"--layer {shlex.quote(name)}", name, False) for name in self.layers]
        return found + ([("--raw", None, True)] if self.has_raw else [])

    @property
    def modalities(self) -> list[str]:
        """What `modality` may be where one is taken without a choice; empty where there is none to make."""
        return []

    @property
    def has_x(self) -> bool:
        """Whether there is a main matrix."""
        return True

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return []

    @property
    def has_raw(self) -> bool:
        """Whether the file keeps a `.raw` matrix."""
        return False

    def matrix(self, layer: str | None = None, raw: bool = False) -> Matrix:
        """Open `X`, a layer or `.raw.X`.

        Parameters
        ----------
        layer : its name; "X" is that of `X` itself, where no layer is called so

        Raises
        ------
        UserError
            If it is not there (the message lists what is), or its shape disagrees with the tables.
        """
        if layer is not None and raw:
            raise UserError("give --layer or --raw, not both.")
        matrix = self._matrix(own_layer(layer, self.layers), raw)
        n_obs, n_vars = self.n_obs, self.n_vars(raw)
        if matrix.shape != (n_obs, n_vars):
            raise UserError(
                f"{self.path}: {matrix.name} is {matrix.shape[0]} x {matrix.shape[1]} but obs has {n_obs} rows and var {n_vars}."
            )
        return matrix

    @abstractmethod
    def _matrix(self, layer: str | None, raw: bool) -> Matrix:
        """Open a matrix, or raise what `_no_matrix` returns."""

    def _no_matrix(self, name: str) -> UserError:
        return NoSuchPartError(f"{self.path}: has no {name}; it has {', '.join(how for how, _, _ in self.places) or 'no matrix at all'}.")

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return len(self.obs())

    def n_vars(self, raw: bool = False) -> int:
        """Return the number of genes (of `.raw`)."""
        return len(self._var(raw))

    def obs(self, columns: list[str] | None = None, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        """Return the cells' table, or only some `columns` of it; elements in `drop`, such as `obs/NAME`, are not read."""
        frame = self._obs(drop)
        return frame if columns is None else frame[self._wanted(columns, list(frame.columns))]

    def cells(self, columns: list[str] | None = None, drop: tuple[str, ...] = ()) -> CellTable:
        """Return what `obs` returns, to be read in blocks of rows."""
        return CellTable(self.obs(columns, drop))

    def _wanted(self, columns: list[str] | None, there: list[Any]) -> list[Any]:
        """Return which columns of obs to take, all of them for None; refuses those that are not there."""
        if columns is None:
            return there
        missing = [name for name in columns if name not in there]
        if missing:
            raise UserError(f"{self.path}: obs has no column {missing[0]!r}; it has {', '.join(map(str, there))}.")
        return columns

    def var(self, raw: bool = False, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        """Return the genes' table by the names that are asked for, of which some may repeat.

        Names of the index that others take the place of are kept in a column.
        """
        table = renamed(self._var(raw, self._but_names(drop)), self.naming)
        return table.drop(columns=self.naming.column) if f"var/{self.naming.column}" in drop and self.naming.column in table else table

    def _but_names(self, drop: tuple[str, ...]) -> tuple[str, ...]:
        """Return what is left out, but for the column that names are taken from."""
        return drop if self.naming.column is None else tuple(name for name in drop if name != f"var/{self.naming.column}")

    def has_gene_names(self, raw: bool = False, drop: tuple[str, ...] = ()) -> bool:
        """Whether the genes' table has the column that names are to come from."""
        return self.naming.column is None or has_names(self._var(raw, self._but_names(drop)), self.naming.column)

    @abstractmethod
    def _obs(self, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        """Read the cells' table."""

    @abstractmethod
    def _var(self, raw: bool = False, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        """Read the genes' table by the names of its index."""

    @property
    def obs_names(self) -> list[str]:
        """Names of the cells."""
        return [str(name) for name in self._obs().index]

    def var_names(self, raw: bool = False, drop: tuple[str, ...] = ()) -> list[str]:
        """Names of the genes; they may repeat."""
        return names_of_genes(self._var(raw, self._but_names(drop)), self.naming)

    def kept_genes(self, raw: bool = False) -> np.ndarray | None:
        """Which genes are taken where the file holds others too, (n_vars,) bool; None for all."""
        return None

    def mapping(self, name: str, drop: tuple[str, ...] = ()) -> dict[str, Any]:
        """`obsm`, `varm` or `uns` as a dict, without the elements in `drop`; empty when absent."""
        return {}

    def elements(self) -> list[str]:
        """Names of what `drop` can leave out: `obsm/X_pca`, `obs/batch`, ..."""
        frames = [f"obs/{name}" for name in self._obs().columns] + [f"var/{name}" for name in self._var().columns]
        return [*frames, *(f"{group}/{name}" for group in ("obsm", "uns") for name in self.mapping(group))]

    def name(self, table: str, row: int, raw: bool = False) -> str:
        """Name of row `row` of "obs" or "var", for messages."""
        try:
            return repr(str((self._obs() if table == "obs" else self._var(raw)).index[row]))
        except (*READ_ERRORS, UserError):  # the message matters more than the name in it
            return "?"

    def gene_name(self, matrix: Matrix, column: int) -> str:
        """Name of a column of one of the matrices, for messages."""
        return self.name("var", column, matrix.name.startswith("raw"))
