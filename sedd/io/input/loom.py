"""Inputs in the Loom format: dense genes x cells, with attributes of rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sedd.io.input.base import Input, Naming
from sedd.io.input.faults import reading
from sedd.io.input.matrix import Matrix
from sedd.io.input.slices import is_array

if TYPE_CHECKING:
    import pandas as pd

NAMES = {"obs": ("CellID", "obs_names", "cell_names", "barcode"), "var": ("Gene", "var_names", "gene_names", "Accession")}
"""Attributes that may hold the names of cells and genes, those tried first in front."""

_ATTRIBUTES = {"obs": "col_attrs", "var": "row_attrs"}


class LoomFile(Input):
    """A `.loom` file.

    Parameters
    ----------
    root : the open file
    close : called when it is let go
    remote : whether each read costs a round trip over a network
    """

    kind = ".loom"

    def __init__(self, path: str, root: Any, naming: Naming, close: Callable[[], None], *, remote: bool = False) -> None:
        super().__init__(path, naming)
        self._root, self._close, self._remote = root, close, remote

    def close(self) -> None:
        """Close the file."""
        self._close()

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        with reading(self.path, "layers"):
            return list(_arrays_in(self._root.get("layers")))

    def _matrix(self, layer: str | None, raw: bool) -> Matrix:
        name = "raw" if raw else "matrix" if layer is None else f"layers/{layer}"
        with reading(self.path, name):
            if raw or name not in self._root:
                raise self._no_matrix(name)
            return Matrix(self.path, self._root[name], name, remote=self._remote, transposed=True)

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return int(self._shape[1])

    def n_vars(self, raw: bool = False) -> int:
        """Return the number of genes."""
        return int(self._shape[0])

    @property
    def _shape(self) -> tuple[int, int]:
        with reading(self.path, "matrix"):
            rows, columns = self._root["matrix"].shape
            return rows, columns

    def _attributes(self, table: str, drop: tuple[str, ...], *, wide: bool) -> dict[str, np.ndarray]:
        """Attributes of cells or genes, vectors or those with columns."""
        found: dict[str, np.ndarray] = {}
        place = _ATTRIBUTES[table]
        length = self.n_obs if table == "obs" else self.n_vars()
        with reading(self.path, place):
            for name, node in _arrays_in(self._root.get(place)).items():
                if f"{table}m/{name}" in drop or f"{table}/{name}" in drop:
                    continue
                with reading(self.path, f"{place}/{name}", f"Leave it out with --drop {table}{'m' * wide}/{name}."):
                    if node.shape[:1] == (length,) and (node.ndim > 1) == wide:
                        found[name] = _plain(node[:])
        return found

    def _frame(self, table: str, drop: tuple[str, ...]) -> pd.DataFrame:
        import pandas as pd

        columns = self._attributes(table, drop, wide=False)
        length = self.n_obs if table == "obs" else self.n_vars()
        named = next((name for name in NAMES[table] if name in columns), None)
        index = np.arange(length).astype(str) if named is None else columns.pop(named).astype(str)
        return pd.DataFrame(columns, index=pd.Index(index, dtype=object))

    def _obs(self, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        return self._frame("obs", drop)

    def _var(self, raw: bool = False, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        return self._frame("var", drop)

    def elements(self) -> list[str]:
        """Names of what `drop` can leave out; nothing is read, as some of it may be what cannot be."""
        found = []
        for table, place in _ATTRIBUTES.items():
            length = self.n_obs if table == "obs" else self.n_vars()
            with reading(self.path, place):
                for name, node in _arrays_in(self._root.get(place)).items():
                    if node.shape[:1] == (length,) and (table == "obs" or node.ndim == 1):
                        found.append(f"{table}{'m' if node.ndim > 1 else ''}/{name}")
        return found

    def mapping(self, name: str, drop: tuple[str, ...] = ()) -> dict[str, Any]:
        """Attributes of cells that have columns, as `obsm`."""
        return dict(self._attributes("obs", drop, wide=True)) if name == "obsm" and name not in drop else {}


def _arrays_in(group: Any, prefix: str = "") -> dict[str, Any]:
    """Arrays by name; those with a slash lie in groups."""
    found: dict[str, Any] = {}
    for name in group if group is not None and not is_array(group) else ():
        node = group[name]
        found |= {prefix + name: node} if is_array(node) else _arrays_in(node, f"{prefix}{name}/")
    return found


def _plain(values: np.ndarray) -> np.ndarray:
    """Text of any kind as text."""
    if values.dtype.kind == "V":
        raise ValueError(f"it holds records of {', '.join(values.dtype.names or ())}, which no column can")
    if values.dtype.kind not in "SO":
        return values
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values.ravel()]
    return np.array(texts, object).reshape(values.shape)
