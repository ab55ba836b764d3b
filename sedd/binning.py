"""How counts become tokens and tokens become counts: bins that are learned from training cells."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from sedd.errors import UserError
from sedd.kernels.discretize import MAX_TABLE, bin_counts, check_edges, quantile_edges, token_dtype, unbin_tokens

KINDS = ("identity", "geometric", "counts", "linear", "log", "quantile")
COUNT_KINDS = ("identity", "geometric", "counts")  # bins of whole numbers


@dataclass(frozen=True, eq=False)
class Binning:
    """How counts become tokens and tokens become counts.

    Attributes
    ----------
    kind : {"identity", "geometric", "counts", "linear", "log", "quantile"}
    n_bins : int
        Tokens are 0 .. n_bins - 1.
    edges : (n_bins - 1,) float64 or None
        `np.digitize(count, edges)` is the token. None for integers that are their own token and for per-cell quantiles.
    values : (n_bins,) float32
        The mean training count of each bin: what a token decodes to.
    """

    kind: str
    n_bins: int
    edges: np.ndarray | None
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown binning '{self.kind}'; expected auto, {', '.join(KINDS)}")
        token_dtype(self.n_bins)
        object.__setattr__(self, "values", np.ascontiguousarray(self.values, dtype=np.float32))
        if self.values.shape != (self.n_bins,):
            raise UserError(f"binning has {self.values.shape[0]} bin values; expected {self.n_bins}")
        if self.edges is not None:
            object.__setattr__(self, "edges", check_edges(self.edges))
            if self.edges.size != self.n_bins - 1:
                raise UserError(f"binning has {self.edges.size} edges; expected {self.n_bins - 1}")
        elif self.kind in ("geometric", "linear", "log"):
            raise UserError(f"binning '{self.kind}' needs edges; fit it with Binning.fit")

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
        kind : {"auto", "identity", "geometric", "counts", "linear", "log", "quantile"}
            `auto` is `identity` when the largest count is below `num_bins`, else `geometric`: small counts as they are, large
            ones in bins as wide as a fixed share of them. `counts` lets those of `num_bins - 1` and more share the last bin.
        num_bins : int
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
        if kind == "auto":
            kind = "identity" if top < num_bins else "geometric"
        if kind == "identity" and top >= num_bins:
            raise UserError(
                f"the largest count is {top:.0f}, which is no token of {num_bins} bins; "
                f"pass --num_bins {int(top) + 1} or --binning geometric"
            )
        if kind in COUNT_KINDS and hist is None:
            raise UserError(f"binning '{kind}' is for counts; bin real values with --binning linear, log or quantile")
        edges: np.ndarray | None = None
        n_bins = num_bins
        if kind == "geometric":
            edges = geometric_edges(num_bins, int(top))
        elif kind == "linear":
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
        if self.kind in ("identity", "counts"):
            means = np.where(seen, means, bins)
        elif self.kind == "geometric":
            assert self.edges is not None
            first = np.concatenate([[0], self.edges])
            middle = np.append((first[:-1] + first[1:] - 1) / 2, first[-1])
            means = np.where(seen, means, middle)
        elif self.kind == "quantile":
            means[0] = 0  # the zeros, also where the sample has none
        return Binning(self.kind, self.n_bins, self.edges, means.astype(np.float32))

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens."""
        return token_dtype(self.n_bins)

    def clipped(self, hist: sp.csr_array) -> int:
        """Count the entries of `hist` above the last bin that share the last bin (0 unless counts are their tokens)."""
        if self.edges is not None or self.kind == "quantile":
            return 0
        return int(hist[:, self.n_bins :].sum()) if hist.shape[1] > self.n_bins else 0

    def table(self, max_count: int) -> np.ndarray:
        """Tokens of the counts 0 .. max_count: the lookup table of the kernel, 256 to `MAX_TABLE` entries long."""
        if self.kind == "quantile":
            raise UserError("quantile bins differ from cell to cell; there is no table of them")
        size = min(max(int(max_count) + 1, 256), MAX_TABLE)
        if self.edges is None:
            return np.minimum(np.arange(size), self.n_bins - 1).astype(self.dtype)
        return np.digitize(np.arange(size, dtype=np.float64), self.edges).astype(self.dtype)

    def tokens(self, counts: np.ndarray) -> np.ndarray:
        """Bin counts of any shape; for `quantile` the last axis is a cell.

        Parameters
        ----------
        counts : (..., n_vars) real, >= 0

        Returns
        -------
        tokens : shape of `counts`, `dtype`
        """
        counts = np.asarray(counts)
        if self.kind == "quantile":
            out = np.zeros(counts.shape, self.dtype)
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
        if counts.size:
            low = counts.min()
            if not low >= 0:
                raise UserError(f"value {low} cannot be binned; expected counts >= 0")
            if counts.dtype.kind == "f" and not bool(np.all(counts == np.floor(counts))):
                raise UserError("values are not integers; bin real values with --binning linear, log or quantile")
        return np.minimum(counts, self.n_bins - 1).astype(self.dtype)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Mean training count of each token, a whole number for bins of whole numbers; see `unbin_tokens`."""
        return unbin_tokens(tokens, values=np.rint(self.values) if self.kind in COUNT_KINDS else self.values)

    @property
    def widths(self) -> np.ndarray:
        """How many counts share each bin, (n_bins,) float64; of the last, open one, the mean number above its first and 1."""
        widths = np.ones(self.n_bins)
        if self.kind == "geometric":
            assert self.edges is not None
            widths[:-1] = np.diff(self.edges, prepend=0)
            widths[-1] = max(float(self.values[-1] - self.edges[-1]), 0.0) + 1
        return widths

    def within(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what a token leaves open: the law of a count inside its bin.

        Uniform over the whole numbers of a bin, geometric in the last one, which has no end. With it a law of tokens is one
        of counts: `log P(count) = log P(token) + log P(count | token)`. Both are 0 where a bin holds one count.

        Parameters
        ----------
        counts : any shape, whole numbers >= 0

        Returns
        -------
        log_p, below : float64, the shape of `counts`
            `log P(count | its bin)` and `P(less than count | its bin)`.

        Raises
        ------
        ValueError
            If the bins are not of whole numbers.
        """
        if self.kind not in COUNT_KINDS:
            raise UserError(f"binning '{self.kind}' has bins of real values; a law of counts needs {', '.join(COUNT_KINDS)}")
        counts = np.asarray(counts)
        if self.kind != "geometric":
            return np.zeros(counts.shape), np.zeros(counts.shape)
        assert self.edges is not None
        tokens = self.tokens(counts)
        width = self.widths[tokens]
        above = counts - np.concatenate([[0.0], self.edges])[tokens]  # the first count of the bin
        last = tokens == self.n_bins - 1
        log_stay = np.log1p(-1 / np.where(last, width, 2.0).clip(1 + 1e-12))  # of a geometric law with this mean
        log_p = np.where(last, above * log_stay, 0.0) - np.log(width)
        return log_p, np.where(last, -np.expm1(above * log_stay), above / width)

    @property
    def falloff(self) -> np.ndarray:
        """Mass of each bin when counts fall off as 1 / (1 + count), (n_bins,) float64: where smoothing leans."""
        if self.kind != "geometric":
            return 1.0 / (1.0 + np.arange(self.n_bins))
        return self.widths / (1.0 + self.values)

    def token_histogram(self, hist: sp.csr_array) -> sp.csr_array:
        """Turn a histogram of counts into one of tokens.

        Parameters
        ----------
        hist : (n_vars, max_count + 1) sparse
            How many cells have each count of each gene, zeros in column 0.

        Returns
        -------
        tokens : (n_vars, n_bins) sparse int64
        """
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


def geometric_edges(num_bins: int, top: int) -> np.ndarray:
    """Edges of bins for the counts 0 .. top: one for each small count, then ever wider ones, a fixed share of what they hold.

    Parameters
    ----------
    num_bins : int
    top : int
        The largest count; the last bin begins at or below it.

    Returns
    -------
    edges : (num_bins - 1,) float64 whole numbers, strictly increasing from 1
    """
    n = num_bins - 1
    if top <= n:
        return np.arange(1.0, n + 1)
    # Single counts up to the first m from which steps of one ratio to top + 1 are no narrower than a count.
    m = next(m for m in range(1, n + 1) if m * (((top + 1) / m) ** (1 / (n - m + 1)) - 1) >= 1)
    ratio = ((top + 1) / m) ** (1 / (n - m + 1))
    edges = np.concatenate([np.arange(1, m), np.rint(m * ratio ** np.arange(n - m + 1))])
    return np.maximum.accumulate(edges - np.arange(n)) + np.arange(n)  # rounding must not join two


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
