"""Bounds on the log-likelihood of cells, on fixed masks, so that two models compare on the same draws.

For the absorbing graph the time integral of the score entropy can be written without time (Ou et al. 2024,
arXiv 2406.03736; Uria et al. 2014, arXiv 1310.1757): with L genes,
`L E_{k ~ U{1..L}} E_{|S| = k} [ (1/k) sum_{i in S} -log mu_i(x_i | x_{not S}) ]`. With the exact conditionals both are the
entropy of the data. Baselines that know no other gene are in `sedd.metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_ndtr, stdtrit
from torch import Tensor, nn

from sedd.errors import UserError
from sedd.graph import AbsorbingGraph, Graph, check_states
from sedd.kernels.random_bits import random_subsets, uniforms
from sedd.loss import hide, score_entropy
from sedd.nn.heads import diverged
from sedd.noise import Noise

FORMS = ("time_free", "time_integral")
_GOLDEN = 0.6180339887498949
# Streams of draws: one per purpose, and one per mask within a purpose.
_SHIFT, _MASKS, _NOISED, _START, _DRAWN = 0, 1_000, 1_000_000, 999, 2_000_000


class CellBatch(NamedTuple):
    """Cells to evaluate.

    Parameters
    ----------
    tokens : (B, n_vars) integer
    condition, library
        As in `SEDDTransformer.forward`.
    cell : (B,) int64, optional
        What names the cells: equal numbers get equal masks, in whatever batch. Their place in the sequence if not given.
    missing : (n_vars,) or (B, n_vars) bool, optional
        Genes that the data lack, or that each cell does. They are always masked, and the likelihood is of the others; their tokens are not looked at.
    labels : (B, columns) int64, optional
        The cells' labels, coded as in `condition`. The likelihood is then that of genes and labels together: a label is hidden as a
        gene is, and what is not hidden of them is what the model is shown in place of `condition`. 0 is unknown, so hidden
        throughout and of no part in it.
    """

    tokens: Tensor
    condition: Tensor | None = None
    library: Tensor | None = None
    cell: Tensor | None = None
    missing: Tensor | None = None
    labels: Tensor | None = None

    @property
    def n_known(self) -> Tensor:
        """How many genes each cell has counts of, (B,) int64."""
        n_cells, n_vars = self.tokens.shape
        if self.missing is None:
            return torch.full((n_cells,), n_vars, device=self.tokens.device)
        return (~self.missing).sum(-1).expand(n_cells)

    @property
    def n_labels(self) -> int:
        """Labels of a cell that the likelihood is of."""
        return 0 if self.labels is None else self.labels.shape[1]

    def with_missing(self, masked: Tensor) -> Tensor:
        """Return a mask (B, n_vars) with what is missing masked too."""
        return masked if self.missing is None else masked | self.missing

    def sum_known(self, nats: Tensor) -> Tensor:
        """Return the sum over the genes that are known, (B,), of (B, n_vars)."""
        return (nats if self.missing is None else nats.masked_fill(self.missing, 0)).sum(1)


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihoods (or bounds on them) of cells, in nats.

    Attributes
    ----------
    per_cell : (n_cells,) float64
    n_vars : float
        Genes per cell, those that are missing not counted; the mean where cells differ.
    """

    per_cell: np.ndarray
    n_vars: float

    @property
    def mean(self) -> float:
        """Nats per cell."""
        return float(self.per_cell.mean())

    @property
    def per_gene(self) -> float:
        """Nats per gene."""
        return self.mean / self.n_vars

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of `mean`: over cells and the masks drawn for them."""
        return confidence_interval(self.per_cell)

    def minus(self, other: Likelihood) -> tuple[float, float, float]:
        """Mean of the paired difference to another model on the same cells, and its 95 % confidence interval.

        Raises
        ------
        UserError
            If the two are of different numbers of cells.
        """
        if self.per_cell.shape != other.per_cell.shape:
            raise UserError(
                f"cannot pair {self.per_cell.size} cells with {other.per_cell.size}; evaluate both models on the same cells."
            )
        difference = self.per_cell - other.per_cell
        return (float(difference.mean()), *confidence_interval(difference))


def confidence_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of a mean by Student's t; unbounded for a single value.

    Parameters
    ----------
    values : (n,) float

    Returns
    -------
    low, high : float
    """
    n = values.size
    if n < 2:
        return -float("inf"), float("inf")
    half = float(stdtrit(n - 1, 0.975)) * float(values.std(ddof=1)) / n**0.5
    return float(values.mean()) - half, float(values.mean()) + half


@dataclass(frozen=True)
class LibraryPrior:
    """A law of cells' total counts: a log-normal number, rounded down.

    A model that is given the total N of a cell says p(x | N). As N is a function of x, `-log p(N) - log p(x | N)` is then a
    bound on `-log p(x)`, to be compared with models that are given nothing.

    Attributes
    ----------
    location, scale
        Mean and standard deviation of the logarithm.
    """

    location: float
    scale: float

    @classmethod
    def fit(cls, totals: np.ndarray) -> LibraryPrior:
        """Fit to the totals of training cells.

        Parameters
        ----------
        totals : (n,) non-negative integers, at least two
        """
        logs = np.log(np.asarray(totals, np.float64) + 0.5)
        if logs.size < 2:
            raise UserError(f"a law of totals needs at least 2 training cells; found {logs.size}.")
        return cls(float(logs.mean()), max(float(logs.std()), 1e-3))

    def nats(self, totals: np.ndarray) -> np.ndarray:
        """Return `-log p(N)` of each total, (n,) float64."""
        totals = np.asarray(totals, np.float64)
        with np.errstate(divide="ignore"):
            low, high = ((np.log(totals + k) - self.location) / self.scale for k in (0, 1))
        # Of the two tails the one that does not round to 1.
        low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
        upper = log_ndtr(high)
        return -(upper + np.log(-np.expm1(np.minimum(log_ndtr(low) - upper, -1e-15))))


@torch.no_grad()
def nelbo(
    model: nn.Module,
    graph: Graph,
    noise: Noise,
    batches: Iterable[CellBatch | Tensor],
    *,
    form: str | None = None,
    n_masks: int = 8,
    seed: int = 0,
) -> Likelihood:
    """Estimate a bound on each cell's negative log-likelihood.

    Parameters
    ----------
    model
        Is put into evaluation mode and back.
    batches
        Cells, or their tokens alone, on the model's device.
    form
        "time_free": masks of sizes k ~ U{1..L}, the bound of an absorbing process that ends with every gene masked;
        needs the absorbing graph. "time_integral": the score entropy at times t ~ U(0, 1] of the given schedule, plus what
        the schedule leaves out at its ends. By default the first where the graph allows it.
    n_masks
        Masks per cell. Their sizes (or times) are stratified within a cell and evenly spread over cells.
    seed
        Of the masks.

    Returns
    -------
    Likelihood
        Each cell's estimate is unbiased; the mean over cells is a bound up to its confidence interval.

    Raises
    ------
    UserError
        On an unknown form, one that does not go with the graph, `n_masks < 1`, no cells, or a token that is no value.
    """
    if form is None:
        form = "time_free" if isinstance(graph, AbsorbingGraph) else "time_integral"
    if form not in FORMS:
        raise UserError(f"unknown form of the bound {form!r}; expected one of {', '.join(FORMS)}.")
    if form == "time_free" and not isinstance(graph, AbsorbingGraph):
        raise UserError("the time-free bound is of the absorbing graph; use form='time_integral' for the uniform one.")
    if n_masks < 1:
        raise UserError(f"n_masks is {n_masks}; expected at least 1.")
    estimate = _time_free if form == "time_free" else _time_integral
    training = model.training
    model.eval()
    try:
        parts, n_values = [], 0
        for batch in _with_cells(batches):
            check_states(batch.tokens, graph.n_bins - 1)
            if batch.missing is not None and not isinstance(graph, AbsorbingGraph):
                raise UserError("genes are missing, and the uniform graph masks none; expected cells with all genes of the model.")
            if batch.labels is not None and not isinstance(graph, AbsorbingGraph):
                raise UserError("the uniform graph hides no labels; expected labels that are given, as the condition.")
            known = int(batch.n_known.sum())
            if not known:
                raise UserError("all genes of the model are missing from the cells; expected some of them.")
            parts.append(estimate(model, graph, noise, batch, n_masks, seed).cpu())
            n_values += known
    finally:
        model.train(training)
    if not parts:
        raise UserError("there are no cells to evaluate; expected at least one batch.")
    per_cell = torch.cat(parts).numpy()
    return Likelihood(per_cell, n_values / len(per_cell))


@torch.no_grad()
def nelbo_and_excess(
    model: Any, graph: Graph, noise: Noise, batches: Iterable[CellBatch | Tensor], *, n_masks: int = 16, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Bound each cell's negative log-likelihood, and compare what it pays for hidden genes with what the model expected it to pay.

    Of each hidden count the excess is `-log mu(count) + log mu(drawn)` with a count drawn from the same law: its expectation is 0
    where the law is right, whatever the depth of the cell and however spread its law. So it tells a cell that the model does not
    know from one of a type that has much to say.

    Parameters
    ----------
    model
        A `SEDDTransformer`. Is put into evaluation mode and back.
    graph
        The absorbing one.
    batches, n_masks, seed
        As in `nelbo`, whose masks and time-free form these are; without labels.

    Returns
    -------
    nats : (n_cells,) float64
        As `nelbo` gives them.
    excess : (n_cells,) float64
        The sum over masks and hidden genes, over the square root of what the model expected them to cost.

    Raises
    ------
    UserError
        As `nelbo`.
    """
    if not isinstance(graph, AbsorbingGraph):
        raise UserError("what a cell should cost is of its hidden genes, and the uniform graph hides none; expected the absorbing one.")
    if n_masks < 1:
        raise UserError(f"n_masks is {n_masks}; expected at least 1.")
    training, parts = model.training, []
    model.eval()
    try:
        for batch in _with_cells(batches):
            check_states(batch.tokens, graph.n_bins - 1)
            parts.append(_paid_and_expected(model, graph, noise, batch, n_masks, seed))
    finally:
        model.train(training)
    if not parts:
        raise UserError("there are no cells to evaluate; expected at least one batch.")
    nats, paid, expected = np.concatenate(parts, 1)
    return nats, (paid - expected) / np.sqrt(np.maximum(expected, 1e-6))


def _paid_and_expected(model: Any, graph: Graph, noise: Noise, batch: CellBatch, n_masks: int, seed: int) -> np.ndarray:
    """Return the bound, the nats of what is hidden, and those of what was drawn in its place, (3, B) float64."""
    assert batch.cell is not None
    n_vars, n_known = batch.tokens.shape[1], batch.n_known
    sizes = _sizes(batch, n_known, n_masks, seed)
    found = torch.zeros(3, len(batch.tokens), dtype=torch.float64, device=batch.tokens.device)
    for m, (k, masked, sigma) in enumerate(_masks(noise, batch, sizes, seed)):
        shown = hide(batch.tokens, batch.with_missing(masked), graph.mask_token)
        readout = model.readout(shown, sigma.float(), condition=batch.condition, library=batch.library)
        cells, genes = masked.nonzero(as_tuple=True)
        drawn = batch.tokens.long().clone()
        u = uniforms(seed, _DRAWN + m, batch.cell, n_vars)[cells, genes]
        drawn[cells, genes] = model.head.draw(readout[cells, genes], genes, u).to(drawn)
        if bool((drawn < 0).any()):
            raise diverged()
        paid, expected = (-model.head.log_prob(readout, tokens, masked).double().sum(1) for tokens in (batch.tokens, drawn))
        found += torch.stack([paid * n_known / k / n_masks, paid, expected])
    return np.asarray(found.cpu().numpy())


def _with_cells(batches: Iterable[CellBatch | Tensor]) -> Iterator[CellBatch]:
    seen = 0
    for given in batches:
        batch = CellBatch(given) if isinstance(given, Tensor) else given
        n = len(batch.tokens)
        if batch.cell is None:
            batch = batch._replace(cell=torch.arange(seen, seen + n, device=batch.tokens.device))
        else:
            batch = batch._replace(cell=batch.cell.to(batch.tokens.device))
        if batch.missing is not None:
            missing = batch.missing.to(batch.tokens.device)
            batch = batch._replace(missing=missing if bool(missing.any()) else None)
        seen += n
        yield batch


def _strata(batch: CellBatch, n_masks: int, seed: int) -> Tensor:
    """Return (B, n_masks) float64 in (0, 1]: one in each of n_masks strata; over cells a golden-ratio sequence."""
    assert batch.cell is not None
    start = uniforms(seed, _SHIFT, torch.zeros(1, dtype=torch.int64, device=batch.cell.device), 1)[0]
    shift = 1 - torch.frac(start + batch.cell.double() * _GOLDEN)
    return (torch.arange(n_masks, device=batch.cell.device) + shift[:, None]) / n_masks


def _known_nats(model: nn.Module, batch: CellBatch, masked: Tensor, sigma: Tensor, mask_token: int) -> Tensor:
    """Return the negative log-probability of what is masked and known, (B,) float64: of genes and, in columns behind them, labels."""
    n_vars = batch.tokens.shape[1]
    of_genes = masked[:, :n_vars]
    hidden = hide(batch.tokens, batch.with_missing(of_genes), mask_token)
    given: dict[str, Any] = {"condition": batch.condition, "library": batch.library}
    if batch.labels is None:
        return -batch.sum_known(model(hidden, sigma.float(), targets=batch.tokens, **given).double())
    given["condition"] = batch.labels.masked_fill(masked[:, n_vars:], 0)
    log_mu, log_nu = model(hidden, sigma.float(), targets=batch.tokens, labels=batch.labels, **given)
    return -batch.sum_known(log_mu.double()) - log_nu.double().sum(1)


def _sizes(batch: CellBatch, n_turns: Tensor, n_masks: int, seed: int) -> Tensor:
    """Return how many of each cell's `n_turns` values (B,) each mask hides, (B, n_masks)."""
    return torch.minimum(torch.ceil(_strata(batch, n_masks, seed) * n_turns[:, None]).long(), n_turns[:, None]).clamp(min=1)


def _masks(noise: Noise, batch: CellBatch, sizes: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Return of each mask its sizes (B,), the mask (B, n_vars + n_labels), and the noise of the genes it hides (B,)."""
    assert batch.cell is not None
    n_vars, n_labels = batch.tokens.shape[1], batch.n_labels
    known = None if batch.missing is None else F.pad(~batch.missing, (0, n_labels), value=True)
    for m, k in enumerate(sizes.T):
        masked = random_subsets(seed, _MASKS + m, batch.cell, n_vars + n_labels, k, known)
        of_genes = masked[:, :n_vars].sum(1) if n_labels else k
        yield k, masked, noise.sigma_at((of_genes + (n_vars - batch.n_known)) / n_vars)


def _time_free(model: nn.Module, graph: Graph, noise: Noise, batch: CellBatch, n_masks: int, seed: int) -> Tensor:
    # A label that is unknown has its turn as well, and adds nothing: the order of the others is as random without it.
    n_turns = batch.n_known + batch.n_labels
    total = torch.zeros(len(batch.tokens), dtype=torch.float64, device=batch.tokens.device)
    for k, masked, sigma in _masks(noise, batch, _sizes(batch, n_turns, n_masks, seed), seed):
        total += _known_nats(model, batch, masked, sigma, graph.mask_token) * n_turns / k
    return total / n_masks


def _time_integral(model: nn.Module, graph: Graph, noise: Noise, batch: CellBatch, n_masks: int, seed: int) -> Tensor:
    assert batch.cell is not None
    n_cells, n_known = len(batch.tokens), batch.n_known
    t = _strata(batch, n_masks, seed)
    total = torch.zeros(n_cells, dtype=torch.float64, device=batch.tokens.device)
    for m in range(n_masks):
        total += _rate_at(model, graph, noise, batch, t[:, m], seed, _NOISED + 2 * m) / n_masks
    # What a schedule leaves out: the noise it starts with, and how far from the limit it ends.
    if float(noise.sigma(0.0)) > 0:
        total += _reconstruction(model, graph, noise, batch, seed)
    return total + n_known.double() * float(graph.limit_divergence(noise.sigma(1.0)))


def _rate_at(
    model: nn.Module, graph: Graph, noise: Noise, batch: CellBatch, t: Tensor, seed: int, stream: int
) -> Tensor:
    """Return the score entropy of each cell at times t, (B,) float64."""
    sigma = noise.sigma(t)
    if isinstance(graph, AbsorbingGraph):
        return _known_nats(model, batch, _moved(batch, sigma, seed, stream), sigma, graph.mask_token) * noise.unmask_rate(t)
    noised = _noised(graph, batch, sigma, seed, stream)
    log_mu = model(noised, sigma.float(), everywhere=True, condition=batch.condition, library=batch.library).double()
    return score_entropy(graph, noise, graph.log_score(log_mu, noised, sigma), noised, batch.tokens.long(), t).sum(1)


def _reconstruction(model: nn.Module, graph: Graph, noise: Noise, batch: CellBatch, seed: int) -> Tensor:
    """Return `-log p(clean | noised)` at the schedule's smallest noise, genes taken as independent, (B,) float64."""
    sigma = noise.sigma(torch.zeros(len(batch.tokens), dtype=torch.float64, device=batch.tokens.device))
    if isinstance(graph, AbsorbingGraph):
        return _known_nats(model, batch, _moved(batch, sigma, seed, _START), sigma, graph.mask_token)
    noised = _noised(graph, batch, sigma, seed, _START)
    log_mu = model(noised, sigma.float(), everywhere=True, condition=batch.condition, library=batch.library).double()
    p = graph.posterior(log_mu, noised, sigma, torch.zeros_like(sigma))
    return -p.gather(-1, batch.tokens.long()[..., None]).log().sum((1, 2))


def _moved(batch: CellBatch, sigma: Tensor, seed: int, stream: int) -> Tensor:
    """Return what the forward process has reached, (B, n_vars + n_labels) bool, with draws that belong to the cells."""
    assert batch.cell is not None
    return uniforms(seed, stream, batch.cell, batch.tokens.shape[1] + batch.n_labels) < -torch.expm1(-sigma)[:, None]


def _noised(graph: Graph, batch: CellBatch, sigma: Tensor, seed: int, stream: int) -> Tensor:
    """Apply the forward process of the uniform graph."""
    assert batch.cell is not None
    other = (uniforms(seed, stream + 1, batch.cell, batch.tokens.shape[1]) * graph.n_bins).long()
    return torch.where(_moved(batch, sigma, seed, stream), other, batch.tokens.long())
