"""Cells to apply a model to, aligned to the model's genes by name."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from sedd.checkpoint import split_of
from sedd.errors import UserError, check_permitted, warn_user
from sedd.inference.pretrained import Pretrained
from sedd.inference.sources import Source, as_source
from sedd.io.conversion.explain import FRACTIONS, looks_like
from sedd.io.conversion.genes import name_hint
from sedd.io.files import obs_digest
from sedd.io.format.plain import column_called, made_unique
from sedd.io.input.base import own_layer
from sedd.kernels.count_law_draws import LARGEST
from sedd.kernels.gather import EXACT_FLOAT32

WINDOW = 2048  # cells that are read together: a store has many in a chunk
MIN_OVERLAP = 0.25  # below this share of the panel it is more often other names than other genes; docs/missing-genes.md has what is lost


class Cells:
    """Counts of some cells over a panel of genes.

    Parameters
    ----------
    data
        Cells by genes.
    genes : (n_vars,) str
        The panel. Genes of it that the data lack are `missing`; other genes of the data are not used.
    layer, raw
        Take counts from this layer, or from `.raw`, instead of X.
    cells
        Which cells: None for all, or sorted indices.
    real
        Whether values may be other than whole numbers.
    rounding
        Whether fractions are rounded to whole numbers.
    largest
        The largest value that the model has a token for.

    Raises
    ------
    UserError
        If the layer is not there, if too few genes match, or if values are not counts.
    """

    def __init__(
        self,
        data: Source | ad.AnnData,
        genes: np.ndarray,
        *,
        layer: str | None = None,
        raw: bool = False,
        cells: np.ndarray | None = None,
        real: bool = False,
        rounding: bool = False,
        largest: float = np.inf,
    ) -> None:
        self.source = source = as_source(data)
        self.name = source.name
        self._rows, self._place = source.rows(layer, raw), (layer, raw)
        self.indices = np.arange(len(source.obs)) if cells is None else np.asarray(cells, np.int64)
        if len(self.indices) == 0:
            raise UserError(f"{self.name}: holds no cells; expected at least one.")
        self._real, self._rounding, self._rounded, self._largest = real, rounding, 0, largest
        self._inexact: str | None = None
        self._window: tuple[int, Any] = (0, None)
        self.obs: pd.DataFrame = source.obs if cells is None else rows_of(source.obs, self.indices)
        table = source.var(raw)
        names = table.index
        if not names.is_unique:
            repeated = names[names.duplicated()]
            warn_user(
                f"{self.name}: {len(repeated)} gene names repeat (first: {repeated[0]!r}); the first of each keeps its name, the "
                "others get -1, -2, ... as in a conversion. Sum them before if they are one gene."
            )
            names = pd.Index(made_unique(names.tolist()), name=names.name)
        position = {gene: i for i, gene in enumerate(names)}
        where = np.array([position.get(gene, -1) for gene in genes], np.int64)
        self.missing = where < 0
        self._there = ~self.missing
        self._columns = where[self._there]
        found = len(self._columns)
        if found < MIN_OVERLAP * len(where):
            if found == len(names):
                raise UserError(
                    f"{self.name}: has {found} of the model's {len(where)} genes and no others; expected at least {MIN_OVERLAP:.0%}."
                )
            raise UserError(
                f"{self.name}: has {found} of the model's {len(where)} genes (its names look like {list(names[:2])}, the "
                f"model's like {list(genes[:2])}); expected at least {MIN_OVERLAP:.0%}. "
                f"{name_hint(self.name, table, source.naming, list(genes)) or 'Use data with the same gene names.'}"
            )
        if found < len(where):
            warn_user(
                f"{self.name}: has {found} of the model's {len(where)} genes; the others are predicted, not observed."
            )
        self._lacked = self._what_cells_lack(genes)
        self.var = _genes_of(table, where).set_axis(pd.Index(np.asarray(genes, dtype=object), name=names.name))

    def _what_cells_lack(self, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Of a store of files that lack genes: a row for each cell in a table of which genes are missing, (rows, n_vars) bool; None of others."""
        lacking = self.source.lacking()
        if lacking is None or not lacking.among(genes).any():
            return None
        labels = column_called(self.obs, lacking.column)
        if labels is None:
            warn_user(
                f"{self.name}: was made of files of which some lack genes of the model, and obs[{lacking.column!r}], which says which file a cell is from, is "
                "not there any more: these genes are taken to be 0 in their cells."
            )
            return None
        codes, table = lacking.codes(labels), lacking.rows(genes) & ~self.missing
        some = int(table[np.unique(codes)].any(0).sum())
        if not some:
            return None
        warn_user(f"{self.name}: {some} of the model's genes are not in all of the files that its cells are from; where they are not, they are unknown, not zero.")
        return codes, table | self.missing

    def missing_in(self, lo: int, hi: int) -> np.ndarray:
        """Genes of the panel that nobody counted in the cells lo..hi-1: (n_vars,) bool, or (hi - lo, n_vars) where cells differ."""
        return self.missing if self._lacked is None else self._lacked[1][self._lacked[0][lo:hi]]

    @property
    def missing_in_some(self) -> np.ndarray:
        """Genes of the panel that nobody counted in one of the cells or more, (n_vars,) bool."""
        return self.missing if self._lacked is None else self._lacked[1][np.unique(self._lacked[0])].any(0)

    def hide(self, genes: np.ndarray) -> None:
        """Go on as if no cell had these genes, (n_vars,) bool, of which are all that one of them lacks."""
        self.missing, self._lacked = genes | self.missing_in_some, None

    def tables(self) -> dict[str, Any]:
        """Return what a result has of these cells beside its matrices: obs, var, obsm and uns, as the source has them."""
        obsm = {name: rows_of(value, self.indices) for name, value in self.source.obsm().items()}
        return {"obs": self.obs.copy(), "var": self.var, "obsm": obsm, "uns": self.source.uns()}

    def __len__(self) -> int:
        return len(self.indices)

    def keep(self, which: np.ndarray) -> None:
        """Go on with some of the cells alone, by their sorted places among them."""
        self.indices, self.obs = self.indices[which], rows_of(self.obs, which)
        if self._lacked is not None:
            self._lacked = self._lacked[0][which], self._lacked[1]
        self._window = 0, None

    def counts(self, lo: int, hi: int) -> np.ndarray:
        """Values of the cells lo..hi-1 over the panel, (hi - lo, n_vars) float32; 0 at genes that the data lack.

        Raises
        ------
        UserError
            If a value is negative, not finite, or not whole where whole numbers are needed.
        """
        edges = [lo, *range((lo // WINDOW + 1) * WINDOW, hi, WINDOW), hi]
        found = [self._read(a, b) for a, b in itertools.pairwise(edges)]
        block = found[0] if len(found) == 1 else sp.vstack(found, format="csr")
        self._check(block, lo)
        values = self._narrowed(block, lo)
        dense = sp.csr_matrix((values, block.indices, block.indptr), shape=block.shape).toarray()
        if len(self._columns) == len(self.missing):
            return dense
        out = np.zeros((hi - lo, len(self.missing)), np.float32)
        out[:, self._there] = dense
        return out

    def _read(self, lo: int, hi: int) -> sp.csr_matrix:
        """Cells of one window, which is read whole and kept for the next call; entries that are stored twice are added up."""
        at = lo // WINDOW * WINDOW
        if self._window[1] is None or self._window[0] != at:
            self._window = at, self._rows.take(self.indices[at : at + WINDOW])[:, self._columns]
            self._window[1].sum_duplicates()
        return self._window[1][lo - at : hi - at]

    def _check(self, block: sp.csr_matrix, lo: int) -> None:
        values = block.data
        wrong = ~np.isfinite(values) | (values < 0)
        kind = "negative or not finite"
        if not self._real and not wrong.any():
            fractions = np.abs(values - np.rint(values)) > 1e-6
            if self._rounding:
                self._rounded += int(fractions.sum())
            else:
                wrong, kind = fractions, "not a whole number"
            if not wrong.any():
                given = values.astype(np.float32).astype(np.float64)  # as the model is
                wrong, kind = given > self._largest, "too large"
        if wrong.any():
            first = int(wrong.argmax())
            place = self._place_in(block, first, lo)
            if kind == "too large":
                raise UserError(f"{self.name}: a value is {values[first]:.0f} at {place}; expected counts up to {self._largest:.0f}. Correct or remove it.")
            ways = self.source.ways_out(self._place, counts=not self._real)
            if ways:
                way_out = f"Pass where they are: {ways}"
            elif others := self.source.ways_out(self._place):
                way_out = f"None of its other matrices looks like counts ({others})"
            else:
                way_out = "There is no other matrix in it"
            rounds = f"; {FRACTIONS}: --round rounds them" if kind == "not a whole number" and looks_like(block.toarray()) == FRACTIONS else ""
            raise UserError(
                f"{self.name}: a value is {kind} ({values[first]:g} at {place}); "
                f"the model was trained on {'values of 0 or more' if self._real else 'counts'}. {way_out}{rounds}."
            )

    def _narrowed(self, block: sp.csr_matrix, lo: int) -> np.ndarray:
        """Return the values of some cells in float32; the first count that it does not hold is noted."""
        if self._real:
            return np.asarray(block.data, np.float32)
        wide = np.rint(block.data)
        values: np.ndarray = wide.astype(np.float32)
        if self._inexact is None and wide.max(initial=0) > EXACT_FLOAT32 and (other := values != wide).any():
            k = int(other.argmax())
            self._inexact = f"{wide[k]:.0f} at {self._place_in(block, k, lo)} is {values[k]:.0f} there"
        return values

    def _place_in(self, block: sp.csr_matrix, k: int, lo: int) -> str:
        """Name cell and gene of entry `k` of some cells, for messages."""
        cell = int(np.searchsorted(block.indptr, k, side="right")) - 1
        return f"cell {self.indices[lo + cell]}, gene {self.var.index[self._there][block.indices[k]]!r}"

    def report_inexact(self) -> None:
        """Say which count of those read so far a result cannot hold."""
        if self._inexact is not None:
            warn_user(
                f"{self.name}: has counts above {EXACT_FLOAT32}, which results hold in single precision, rounded to a relative 6e-8 (first: "
                f"{self._inexact}). The data have them as they are."
            )

    def report_rounded(self) -> None:
        """Say how many fractions were rounded so far."""
        if self._rounded:
            warn_user(f"{self.name}: {self._rounded} values that were read were fractions and were rounded.")


def rows_of(table: Any, rows: np.ndarray) -> Any:
    """Return rows of a table or an array by their numbers, as a copy; all categories are kept."""
    return table.iloc[rows].copy() if isinstance(table, pd.DataFrame) else table[rows]


def _genes_of(table: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return the rows of a table by number, missing values where it is -1; columns keep their types, whole numbers nullable."""
    absent = rows < 0
    found = rows_of(table, np.where(absent, 0, rows))
    if not absent.any():
        return found
    columns = []
    for k in range(found.shape[1]):
        values: Any = found.iloc[:, k]
        kind = values.dtype
        if isinstance(kind, np.dtype) and kind.kind in "biu":
            values = values.astype(
                "boolean" if kind.kind == "b" else f"{'U' * (kind.kind == 'u')}Int{8 * kind.itemsize}"
            )
        columns.append(values.mask(absent))
    return pd.concat(columns, axis=1) if columns else found


def begins_as_trained_on(names: pd.Index, state: dict[str, Any]) -> bool:
    """Whether cells of these names are those that a model was trained on, or these with more appended."""
    trained_on = state["data"]
    return obs_digest(names[: trained_on["n_obs"]]) == str(trained_on["obs_digest"])


def training_data(model: Pretrained, name: str, why: str) -> str:
    """Return where the cells are that a model was trained on.

    Parameters
    ----------
    name
        The data that the model is applied to.
    why
        What they are needed for.

    Raises
    ------
    UserError
        If they are not there any more.
    """
    # Of several inputs the cells are those of the store that was made of them.
    paths = model.config.data.paths
    path = os.path.expanduser(paths[0] if len(paths) == 1 else model.state["data"]["path"])
    check_permitted(path)
    if not Path(path).exists():
        raise UserError(
            f"{name}: is not the data of the training run, and that ({path}) is not there any more; {why}. Put it back, or use the data of "
            "the training run."
        )
    return path


def cells_of_split(source: Source, part: str, state: dict[str, Any]) -> np.ndarray | None:
    """Return the cells of `part` ("all", "train" or "val") in the data that a model was trained on.

    Parameters
    ----------
    state
        The model's checkpoint.

    Raises
    ------
    UserError
        If `part` is not "all" and `source` is not the data of the training run.
    """
    if part == "all":
        return None
    if part not in ("train", "val"):
        raise UserError(f"--cells is {part!r}; expected all, train or val.")
    trained_on = state["data"]
    if not begins_as_trained_on(source.obs.index, state):
        there = "" if isinstance(state["args"]["data_path"], str) else f"{trained_on['path']}, which has them, or "
        raise UserError(
            f"{source.name}: is not the data that the model was trained on ({len(source.obs)} cells here, {trained_on['n_obs']} there), "
            f"so it has no {part} cells; pass {there}--cells all."
        )
    return split_of(state, part).cells()


def open_cells(
    model: Pretrained, data: Source | ad.AnnData, part: str, layer: str | None, raw: bool = False, *, rounding: bool = False
) -> Cells:
    """Return the cells of `part` of a source, aligned to the model's genes.

    Parameters
    ----------
    layer, raw
        As in `place_of_counts`.
    rounding
        Whether fractions are rounded, as they are too where those of the training data were.
    """
    source = as_source(data)
    real = not model.state["data"]["is_counts"]
    if rounding and real:
        raise UserError("--round makes whole numbers, and the model was trained on real values; leave it out.")
    layer, raw = place_of_counts(model, source, layer, raw)
    chosen = cells_of_split(source, part, model.state)
    rounding = rounding or model.config.data.round
    largest = LARGEST if model.binning.kind == "counts" else np.inf
    return Cells(source, model.genes, layer=layer, raw=raw, cells=chosen, real=real, rounding=rounding, largest=largest)


def place_of_counts(model: Pretrained, source: Source, layer: str | None, raw: bool) -> tuple[str | None, bool]:
    """Return the layer that counts are taken from, None for X, and whether it is `.raw` that they are in.

    Parameters
    ----------
    layer, raw
        What was asked for: a layer, "X" for X itself, or `.raw`. Counts are where the model's training data had them if neither was;
        a store that was made from there has them as its X.
    """
    if layer is not None and raw:
        raise UserError("give --layer or --raw, not both.")
    if layer is not None or raw:
        return own_layer(layer, source.layers), raw
    trained, trained_raw = own_layer(model.config.data.layer, source.layers), model.config.data.raw
    if (trained is None or trained in source.layers) and (not trained_raw or source.has_raw):
        return trained, trained_raw
    if source.is_store:
        return None, False
    place = ".raw" if trained_raw else f"layer {trained!r}"
    raise UserError(
        f"{source.name}: has no {place}, from which the model was trained. {_where_counts_are(source)}"
    )


def _where_counts_are(source: Source) -> str:
    if ways := source.ways_out(counts=True):
        return f"Pass where the counts are: {ways}."
    return f"There are: {source.ways_out() or 'no matrices at all'}; none of them looks like counts."
