"""Cells to apply a model to, aligned to the model's genes by name."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr

from sedd.errors import UserError, warn_user
from sedd.inference.pretrained import Pretrained
from sedd.io.files import obs_digest
from sedd.io.plan import Split

WINDOW = 2048  # cells that are read together: a store has many in a chunk
MIN_OVERLAP = 0.5  # below this share of the panel the prediction is mostly the training mean


class Cells:
    """Counts of some cells over a panel of genes.

    Parameters
    ----------
    adata
        Cells by genes.
    genes : (n_vars,) str
        The panel. Genes of it that `adata` lacks are `missing`; other genes of `adata` are not used.
    layer
        Take counts from this layer instead of X.
    cells
        Which cells: None for all, or sorted indices.
    real
        Whether values may be other than whole numbers.
    name
        What messages call the data.

    Raises
    ------
    UserError
        If the layer is not there, if too few genes match, or if values are not counts.
    """

    def __init__(
        self,
        adata: ad.AnnData,
        genes: np.ndarray,
        *,
        layer: str | None = None,
        cells: np.ndarray | None = None,
        real: bool = False,
        name: str = "the AnnData",
    ) -> None:
        self.name = name
        if layer is not None and layer not in adata.layers:
            raise UserError(f"{self.name}: no layer {layer!r}; there are: {_layers(adata)}. Pass --layer with one of them, or --layer X for X.")
        if adata.n_obs == 0 or (cells is not None and len(cells) == 0):
            raise UserError(f"{self.name}: holds no cells; expected at least one.")
        self._matrix = adata.X if layer is None else adata.layers[layer]
        if self._matrix is None:
            raise UserError(f"{self.name}: has no X; pass --layer with one of: {_layers(adata)}.")
        self.indices = np.arange(adata.n_obs) if cells is None else np.asarray(cells, np.int64)
        self._real = real
        self._window: tuple[int, Any] = (0, None)
        self.obs: pd.DataFrame = adata.obs.iloc[self.indices].copy()
        names = adata.var_names
        if not names.is_unique:
            repeated = names[names.duplicated()].unique()
            warn_user(
                f"{self.name}: {len(repeated)} gene names repeat (first: {repeated[0]!r}); the first of each keeps its name, the "
                "others get -1, -2, ... as in a conversion. Sum them before if they are one gene."
            )
            names = ad.utils.make_index_unique(names)
        position = {gene: i for i, gene in enumerate(names)}
        where = np.array([position.get(gene, -1) for gene in genes], np.int64)
        self.missing = where < 0
        self._columns = where[~self.missing]
        found = len(self._columns)
        if found < MIN_OVERLAP * len(where):
            raise UserError(
                f"{self.name}: has {found} of the model's {len(where)} genes (its names look like {list(names[:2])}, the "
                f"model's like {list(genes[:2])}); expected at least {MIN_OVERLAP:.0%}. Use data with the same gene names."
            )
        if found < len(where):
            warn_user(f"{self.name}: has {found} of the model's {len(where)} genes; the others are predicted, not observed.")
        self.var = _rows_of(adata.var, where).set_axis(pd.Index(np.asarray(genes, dtype=object), name=adata.var_names.name))

    def __len__(self) -> int:
        return len(self.indices)

    def counts(self, lo: int, hi: int) -> np.ndarray:
        """Values of the cells lo..hi-1 over the panel, (hi - lo, n_vars) float32; 0 at missing genes.

        Raises
        ------
        UserError
            If a value is negative, not finite, or not whole where whole numbers are needed.
        """
        edges = [lo, *range((lo // WINDOW + 1) * WINDOW, hi, WINDOW), hi]
        values = np.concatenate([self._read(a, b) for a, b in itertools.pairwise(edges)])
        self._check(values, lo)
        out = np.zeros((len(values), len(self.missing)), np.float32)
        out[:, ~self.missing] = np.rint(values) if not self._real else values
        return out

    def _read(self, lo: int, hi: int) -> np.ndarray:
        """Values of cells of one window, which is read whole and kept for the next call."""
        at = lo // WINDOW * WINDOW
        if self._window[1] is None or self._window[0] != at:
            chosen = self.indices[at : at + WINDOW]
            whole = int(chosen[-1]) - int(chosen[0]) + 1 == len(chosen)
            block = self._matrix[slice(int(chosen[0]), int(chosen[-1]) + 1) if whole else chosen]
            self._window = at, sp.csr_matrix(block)[:, self._columns]
        return np.asarray(self._window[1][lo - at : hi - at].toarray(), np.float64)

    def _check(self, values: np.ndarray, lo: int) -> None:
        wrong = ~np.isfinite(values) | (values < 0)
        kind = "negative or not finite"
        if not self._real and not wrong.any():
            wrong = np.abs(values - np.rint(values)) > 1e-6
            kind = "not a whole number"
        if wrong.any():
            cell, column = np.argwhere(wrong)[0]
            gene = self.var.index[~self.missing][column]
            raise UserError(
                f"{self.name}: a value is {kind} ({values[cell, column]:g} at cell {self.indices[lo + cell]}, gene {gene!r}); "
                "the model was trained on counts. Pass --layer with the layer that holds them."
            )


def _layers(adata: ad.AnnData) -> str:
    return ", ".join(name for name in adata.layers if name is not None) or "none"  # anndata 0.13 lists X, as None


def _rows_of(table: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return the rows of a table by number, missing values where it is -1; columns keep their types, whole numbers nullable."""
    absent = rows < 0
    found = table.iloc[np.where(absent, 0, rows)] if len(table) else table
    for column in found.columns[: len(found.columns) * bool(absent.any())]:
        kind = found[column].dtype
        values: Any = found[column]
        if isinstance(kind, np.dtype) and kind.kind in "biu":
            values = values.astype("boolean" if kind.kind == "b" else f"{'U' * (kind.kind == 'u')}Int{8 * kind.itemsize}")
        found = found.assign(**{str(column): values.mask(absent)})
    return found.copy()


def read_anndata(path: str | Path) -> ad.AnnData:
    """Read an .h5ad or a .zarr store with `anndata`.

    Raises
    ------
    UserError
        If it is missing or cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; expected an .h5ad or a .zarr store.")
    try:
        return ad.read_zarr(path) if path.is_dir() else ad.read_h5ad(path)
    except Exception as error:  # h5py, zarr and anndata raise a dozen types for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as AnnData ({reason[:200]}); expected an .h5ad or a .zarr store.") from error


@contextlib.contextmanager
def opened(data: ad.AnnData | str | Path, layer: str | None = None) -> Iterator[ad.AnnData]:
    """Return an AnnData whose counts stay in the file where they can be read by rows, so that it may be larger than memory.

    Parameters
    ----------
    data
        An AnnData is passed on unchanged.
    layer
        The only layer that is needed; X as well if None.

    Raises
    ------
    UserError
        As `read_anndata`.
    """
    if isinstance(data, ad.AnnData):
        yield data
        return
    path = Path(data)
    with contextlib.ExitStack() as stack:
        try:
            root: Any = zarr.open_group(path, mode="r") if path.is_dir() else stack.enter_context(h5py.File(path))
            adata = _lazy(root, layer)
        except Exception:  # whatever it is, the plain reader takes it or says what is wrong
            adata = None
        yield read_anndata(path) if adata is None else adata


def _lazy(root: Any, layer: str | None) -> ad.AnnData | None:
    """Return the AnnData of an open file with its matrices left there; None where they cannot be read by rows."""
    if root.attrs.get("encoding-type") != "anndata":
        return None
    wanted = [name for name in ("X", f"layers/{layer}") if name in root]
    matrices: dict[str, Any] = {}
    for name in wanted:
        kind = root[name].attrs.get("encoding-type")
        if kind not in ("csr_matrix", "array"):
            return None
        matrices[name] = ad.io.sparse_dataset(root[name]) if kind == "csr_matrix" else root[name]
    obs, var = (ad.io.read_elem(root[name]) for name in ("obs", "var"))
    adata = ad.AnnData(matrices.pop("X", None), obs=obs, var=var)
    for name, matrix in matrices.items():
        adata.layers[name.removeprefix("layers/")] = matrix
    adata.uns.update(dict.fromkeys(root["uns"]) if "uns" in root else {})
    if "sedd" in adata.uns:
        adata.uns["sedd"] = dict.fromkeys(root["uns/sedd"])
    return adata


def cells_of_split(data: ad.AnnData, part: str, state: dict[str, Any], name: str) -> np.ndarray | None:
    """Return the cells of `part` ("all", "train" or "val") in the data that a model was trained on.

    Parameters
    ----------
    state
        The model's checkpoint.

    Raises
    ------
    UserError
        If `part` is not "all" and `data` is not the data of the training run.
    """
    if part == "all":
        return None
    if part not in ("train", "val"):
        raise UserError(f"--cells is {part!r}; expected all, train or val.")
    trained_on = state["data"]
    if obs_digest(data.obs_names) != trained_on["obs_digest"]:
        raise UserError(
            f"{name}: is not the data that the model was trained on ({data.n_obs} cells here, {trained_on['n_obs']} there), "
            f"so it has no {part} cells; pass --cells all."
        )
    split = state["split"]
    return Split(split["n_obs"], split["val_fraction"], split["seed"], part, split["limit"][part]).cells()


def name_of(data: ad.AnnData | str | Path) -> str:
    """Return what messages call the data."""
    return "the AnnData" if isinstance(data, ad.AnnData) else str(data)


def open_cells(
    model: Pretrained, data: ad.AnnData | str | Path, part: str, layer: str | None, name: str | None = None
) -> Cells:
    """Return the cells of `part` of `data`, aligned to the model's genes.

    Parameters
    ----------
    layer
        Take counts from this layer, or from X itself if it is "X"; from where the model's training data had them if None.
    name
        What messages call the data; its path if not given.
    """
    adata = data if isinstance(data, ad.AnnData) else read_anndata(data)
    name = name or name_of(data)
    chosen = cells_of_split(adata, part, model.state, name)
    trained = model.state["args"]["layer"]
    if layer is None and trained is not None and trained not in adata.layers:
        if "meta" not in (adata.uns.get("sedd") or {}):  # a store made from that layer holds it as X
            raise UserError(
                f"{name}: has no layer {trained!r}, from which the model was trained; there are: {_layers(adata)}. Pass --layer X if "
                "the counts are in X, or --layer with the layer that holds them."
            )
    elif layer is None:
        layer = trained
    elif layer == "X" and "X" not in adata.layers:
        layer = None
    return Cells(adata, model.genes, layer=layer, cells=chosen, real=not model.state["data"]["is_counts"], name=name)
