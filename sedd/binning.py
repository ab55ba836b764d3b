"""How values become tokens and tokens become values. A count is its own token; bins are for data that come binned or real."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from sedd.errors import UserError
from sedd.kernels.count_law_draws import LARGEST
from sedd.kernels.discretize import (
    MAX_BINS,
    MAX_TABLE,
    bin_counts,
    check_edges,
    quantile_edges,
    token_dtype,
    unbin_tokens,
)

KINDS = ("counts", "identity", "linear", "log", "quantile")
COUNT_KINDS = ("counts", "identity")  # tokens that are whole numbers
UNBOUNDED = LARGEST + 1
"""`n_bins` of counts: all counts are tokens, and the next number is that of the mask."""


@dataclass(frozen=True, eq=False)
class Binning:
    """How values become tokens and tokens become values.

    Attributes
    ----------
    kind : {"counts", "identity", "linear", "log", "quantile"}
    n_bins : int
        Tokens are 0 .. n_bins - 1; of `counts`, `UNBOUNDED`.
    edges : (n_bins - 1,) float64 or None
        `np.digitize(count, edges)` is the token. None for integers that are their own token and for per-cell quantiles.
    values : (n_bins,) float32
        The mean training value of each bin: what a token decodes to. Empty for `counts`, whose tokens are their own values.
    """

    kind: str
    n_bins: int
    edges: np.ndarray | None
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown binning '{self.kind}'; expected auto, {', '.join(KINDS)}")
        object.__setattr__(self, "values", np.ascontiguousarray(self.values, dtype=np.float32))
        if self.kind == "counts":
            if self.n_bins != UNBOUNDED or self.values.size or self.edges is not None:
                raise UserError("a binning of counts has no bins; make it with Binning.of_counts()")
            return
        token_dtype(self.n_bins)
        if self.values.shape != (self.n_bins,):
            raise UserError(f"binning has {self.values.shape[0]} bin values; expected {self.n_bins}")
        if self.edges is not None:
            object.__setattr__(self, "edges", check_edges(self.edges))
            if self.edges.size != self.n_bins - 1:
                raise UserError(f"binning has {self.edges.size} edges; expected {self.n_bins - 1}")
        elif self.kind in ("linear", "log"):
            raise UserError(f"binning '{self.kind}' needs edges; fit it with Binning.fit")

    @classmethod
    def of_counts(cls) -> Binning:
        """Return the binning of counts, which needs no fit."""
        return cls("counts", UNBOUNDED, None, np.empty(0, np.float32))

    @classmethod
    def fit(
        cls,
        kind: str,
        num_bins: int,
        *,
        hist: sp.csr_array | None = None,
        values: np.ndarray | None = None,
    ) -> Binning:
        """Learn a binning from training data.

        Parameters
        ----------
        kind : {"auto", "counts", "identity", "linear", "log", "quantile"}
            `auto` is `counts`. `identity` is for whole numbers below `num_bins` that are names of bins.
        num_bins : int
            Of no use to `counts`.
            `linear` has one bin more than this: `np.digitize` against `num_bins` points starts at 1 for values >= 0.
        hist : (n_vars, max_count + 1) sparse, optional
            How often each gene has each count in the training cells, zeros in column 0.
        values : (n,) or (cells, n_vars) real, optional
            A sample of the training values with their zeros, for data that are not counts. `quantile` needs whole cells.

        Returns
        -------
        binning : Binning
        """
        if (hist is None) == (values is None):
            raise UserError("pass either hist= (of counts) or values= (a sample of real values) to Binning.fit")
        if kind in ("auto", "counts") and hist is not None:  # before a table as long as the largest count is made
            if not hist.shape[0] or not hist.sum():
                raise UserError("there is no training value to fit a binning to; the training split is empty")
            return cls.of_counts()
        if hist is not None:
            weight = np.asarray(hist.sum(axis=0), dtype=np.float64).reshape(-1)
            points = np.arange(weight.size, dtype=np.float64)
            points, weight = points[weight > 0], weight[weight > 0]
        else:
            sample = np.asarray(values)
            if kind == "auto":
                raise UserError("values are real numbers, not counts; pass binning linear, log or quantile")
            points, repeats = np.unique(sample.reshape(-1).astype(np.float64), return_counts=True)
            weight = repeats.astype(np.float64)
        if points.size == 0:
            raise UserError("there is no training value to fit a binning to; the training split is empty")
        if not (points[0] >= 0 and np.isfinite(points[-1])):
            raise UserError(f"values run from {points[0]} to {points[-1]}; expected finite numbers >= 0")
        top = float(points[-1])
        if kind == "counts":
            raise UserError("binning 'counts' is for counts; bin real values with --binning linear, log or quantile")
        if kind == "identity" and top >= num_bins:
            raise UserError(
                f"the largest value is {top:.0f}, which is no token of {num_bins} bins; pass --num_bins {int(top) + 1}, or "
                "--binning counts if these are counts"
            )
        if kind == "identity" and hist is None:
            raise UserError("binning 'identity' is for whole numbers; bin real values with --binning linear, log or quantile")
        edges: np.ndarray | None = None
        n_bins = num_bins
        if kind == "linear":
            edges = np.linspace(0, top if top > 0 else 1.0, num_bins)
            n_bins = num_bins + 1
        elif kind == "log":
            edges = np.expm1(np.linspace(0, np.log1p(top if top > 0 else 1.0), num_bins + 1))[1:-1]
        elif kind not in KINDS:
            raise UserError(f"unknown binning '{kind}'; expected auto, {', '.join(KINDS)}")
        draft = cls(kind, n_bins, edges, np.zeros(n_bins, np.float32))
        if kind != "quantile":
            return draft._with_means(draft.tokens(points), points, weight)
        if values is None or np.ndim(values) != 2:
            raise UserError("quantile bins are those of each cell; pass values= of whole cells, (cells, n_vars)")
        cells = np.asarray(values)
        return draft._with_means(draft.tokens(cells).reshape(-1), cells.reshape(-1).astype(np.float64), None)

    def _with_means(self, tokens: np.ndarray, points: np.ndarray, weight: np.ndarray | None) -> Binning:
        """Return this binning with `values` set to the mean of the `points` in each bin.

        A count that was not seen decodes to itself, another empty bin to what a line between its neighbours gives.
        """
        mass = np.bincount(tokens, weights=weight, minlength=self.n_bins)
        total = np.bincount(tokens, weights=points if weight is None else weight * points, minlength=self.n_bins)
        seen, bins = mass > 0, np.arange(self.n_bins)
        means = np.interp(bins, bins[seen], total[seen] / mass[seen])
        if self.kind == "identity":
            means = np.where(seen, means, bins)
        elif self.kind == "quantile":
            means[0] = 0  # the zeros, also where the sample has none
        return Binning(self.kind, self.n_bins, self.edges, means.astype(np.float32))

    def dtype_of(self, max_count: int) -> np.dtype:
        """Narrowest type of the tokens of values up to `max_count`."""
        if self.kind != "counts":
            return token_dtype(self.n_bins)
        _check_largest(max_count)
        return token_dtype(max_count + 1) if max_count < MAX_BINS else np.dtype(np.int32)

    def describe(self) -> str:
        """Return in words what tokens are."""
        return "counts" if self.kind == "counts" else f"{self.n_bins} bins ({self.kind})"

    def table(self, max_count: int) -> np.ndarray:
        """Tokens of the counts 0 .. max_count: the lookup table of the kernel, 256 to `MAX_TABLE` entries long."""
        if self.kind == "quantile":
            raise UserError("quantile bins differ from cell to cell; there is no table of them")
        size = min(max(int(max_count) + 1, 256), MAX_TABLE)
        if self.edges is None:
            return np.minimum(np.arange(size), self.n_bins - 1).astype(self.dtype_of(size - 1))
        return np.digitize(np.arange(size, dtype=np.float64), self.edges).astype(self.dtype_of(size - 1))

    def tokens(self, counts: np.ndarray) -> np.ndarray:
        """Bin counts of any shape; for `quantile` the last axis is a cell.

        Parameters
        ----------
        counts : (..., n_vars) real, >= 0

        Returns
        -------
        tokens : shape of `counts`, of the narrowest type
        """
        counts = np.asarray(counts)
        if self.kind == "quantile":
            out = np.zeros(counts.shape, token_dtype(self.n_bins))
            rows = counts.reshape(-1, counts.shape[-1]) if counts.ndim > 1 else counts.reshape(1, -1)
            flat = out.reshape(rows.shape)
            for source, target in zip(rows, flat, strict=True):
                nonzero = np.flatnonzero(source)
                if nonzero.size:
                    edges = np.empty(self.n_bins - 1)
                    present = source[nonzero].astype(np.float64)
                    quantile_edges(np.sort(present), edges)
                    target[nonzero] = np.digitize(present, edges)
            return out
        if self.edges is not None:
            return bin_counts(counts, edges=self.edges)
        top = 0
        if counts.size:
            low, top = counts.min(), counts.max()
            if not low >= 0:
                raise UserError(f"value {low} cannot be binned; expected counts >= 0")
            if counts.dtype.kind == "f" and not bool(np.all(counts == np.floor(counts))):
                raise UserError("values are not integers; bin real values with --binning linear, log or quantile")
            _check_largest(float(top))  # in single precision LARGEST itself would be larger than it is
        return np.minimum(counts, self.n_bins - 1).astype(self.dtype_of(int(top)))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Return the value of each token, float32, a whole number for whole numbers; see `unbin_tokens`."""
        if self.kind == "counts":
            return np.asarray(tokens, np.float32)
        return unbin_tokens(tokens, values=np.rint(self.values) if self.kind == "identity" else self.values)

    @property
    def falloff(self) -> np.ndarray:
        """Mass of each bin when values fall off as 1 / (1 + bin), (n_bins,) float64: where smoothing leans."""
        return 1.0 / (1.0 + np.arange(self.n_bins))

    def token_histogram(self, hist: sp.csr_array) -> sp.csr_array:
        """Turn a histogram of counts into one of tokens.

        Parameters
        ----------
        hist : (n_vars, max_count + 1) sparse
            How many cells have each count of each gene, zeros in column 0.

        Returns
        -------
        tokens : (n_vars, n_bins) sparse int64; of counts, `hist` itself
        """
        if self.kind == "counts":
            return hist
        table = self.table(hist.shape[1] - 1).astype(np.int64)
        entries = hist.tocoo()
        rows, counts = entries.coords
        columns = table[np.minimum(counts, table.size - 1)]
        return sp.csr_array(sp.coo_array((entries.data, (rows, columns)), shape=(hist.shape[0], self.n_bins)))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers that `json` and `torch.save(weights_only=True)` take."""
        edges = None if self.edges is None else self.edges.tolist()
        return {"kind": self.kind, "n_bins": self.n_bins, "edges": edges, "values": self.values.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Binning:
        """Rebuild a binning from `to_dict`, bit for bit."""
        edges = None if data["edges"] is None else np.asarray(data["edges"], dtype=np.float64)
        return cls(str(data["kind"]), int(data["n_bins"]), edges, np.asarray(data["values"], dtype=np.float32))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Binning) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict()))


def _check_largest(value: float) -> None:
    if value > LARGEST:
        raise UserError(f"a value is {value:.0f}; expected counts up to {LARGEST}. Correct or remove it.")


def smoothed_log_shares(mass: np.ndarray, falloff: np.ndarray, pseudocount: float = 2.0) -> np.ndarray:
    """Log of the shares of a table's rows, smoothed so that no bin is impossible.

    Parameters
    ----------
    mass : (n_vars, n_bins) counts
    falloff : (n_bins,) positive, `Binning.falloff`
    pseudocount : float
        Total mass added to each row, shared among the bins in proportion to `falloff`.

    Returns
    -------
    log_shares : (n_vars, n_bins) float32, each row sums to one when exponentiated
    """
    smoothed = mass + pseudocount * falloff / falloff.sum()
    return np.log(smoothed / smoothed.sum(axis=1, keepdims=True)).astype(np.float32)


def model_start(binning: Binning, histogram: sp.csr_array) -> dict[str, Any]:
    """Return where a `SEDDTransformer` starts, as keywords: what it needs to know of how often each token occurs.

    Parameters
    ----------
    binning
    histogram : (n_vars, n tokens)
        How many training cells have each token of each gene.
    """
    if binning.kind == "counts":
        return {"histogram": histogram}
    shares = smoothed_log_shares(histogram.toarray().astype(np.float64), binning.falloff)
    return {"log_marginals": shares, "bin_values": binning.values}
