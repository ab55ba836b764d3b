"""Forward processes: how noise turns a clean token into another.

Each gene of a cell goes through a continuous-time Markov chain of its own with rate matrix `dsigma(t) Q`. A graph knows Q,
the transition `exp(sigma Q)` and its limit, and, backwards in time, the concrete scores `p_t(y) / p_t(x)` and the score
entropy of Lou, Meng and Ermon (2024, arXiv 2310.16834) in closed form.

A network gives, for each gene, `log_mu`: the log-probabilities of its clean bin given the other genes. Both graphs turn that
into scores in closed form, so one network serves both. States are the `n_bins` value tokens and `mask_token == n_bins`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd.errors import UserError


class Graph(ABC):
    """A forward process over `n_bins` value tokens and the mask token.

    Parameters
    ----------
    n_bins
        Number of value tokens.
    """

    def __init__(self, n_bins: int) -> None:
        if n_bins < 2:
            raise UserError(f"n_bins is {n_bins}; a gene needs at least 2 bins.")
        self.n_bins = self.mask_token = int(n_bins)

    @property
    def vocabulary(self) -> int:
        """Number of states, the mask token included."""
        return self.n_bins + 1

    @abstractmethod
    def rate(self, tokens: Tensor) -> Tensor:
        """Return Q's row of each token: the rates from it to every state, (..., n_bins + 1) float64; it sums to 0."""

    @abstractmethod
    def transposed_rate(self, tokens: Tensor) -> Tensor:
        """Return Q's column of each token: the rates into it from every state, (..., n_bins + 1) float64."""

    @abstractmethod
    def transition(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Return where each token is after noise `sigma` (broadcastable): probabilities (..., n_bins + 1) float64."""

    @abstractmethod
    def sample_transition(self, tokens: Tensor, sigma: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw where each token is after noise `sigma`.

        Parameters
        ----------
        tokens : (B, n_vars) integer
        sigma : (B,) float
        generator
            torch's global one if not given.

        Returns
        -------
        noised : (B, n_vars), of the dtype of `tokens`, which must hold `mask_token`
        """

    @abstractmethod
    def sample_limiting(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Draw int64 tokens from the limit of infinite noise."""

    @abstractmethod
    def log_score(self, log_mu: Tensor, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Turn probabilities of the clean bin into log scores.

        Parameters
        ----------
        log_mu : (B, n_vars, n_bins), normalised
            The clean bin's distribution given the other genes.
        tokens : (B, n_vars) integer
            The noised tokens x.
        sigma : (B,) total noise

        Returns
        -------
        log_score : (B, n_vars, n_bins + 1)
            `log p(y) - log p(x)` for every state y, 0 for x itself, -inf for a state that the graph does not reach.
        """

    @abstractmethod
    def score_entropy(self, log_score: Tensor, tokens: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        """Return the score entropy of each gene without the factor `dsigma`, (B, n_vars), at least 0 in expectation.

        It is `sum_{y != x} Q(y, x) (s_y - a_y log s_y + a_y (log a_y - 1))`, where `s = exp(log_score)` and
        `a_y = p(y | clean) / p(x | clean)`.

        Parameters
        ----------
        log_score : (B, n_vars, n_bins + 1)
        tokens, clean : (B, n_vars) integer
        sigma : (B,) total noise
        """

    @abstractmethod
    def posterior(self, log_mu: Tensor, tokens: Tensor, sigma: Tensor, earlier: Tensor) -> Tensor:
        """Where each gene was at an earlier, smaller noise.

        Parameters
        ----------
        log_mu : (B, n_vars, n_bins), normalised
        tokens : (B, n_vars), at noise `sigma`
        sigma, earlier : (B,) float64, `earlier <= sigma`

        Returns
        -------
        p : (B, n_vars, n_bins + 1) float64
        """

    @abstractmethod
    def limit_divergence(self, sigma: Tensor) -> Tensor:
        """Return the KL divergence per gene from the limit to where a clean token is after noise `sigma`."""


def _inverse_expm1(sigma: Tensor) -> Tensor:
    """Return r = `1 / (exp(sigma) - 1)`, the odds of having kept its value at noise `sigma`."""
    return 1 / torch.expm1(sigma)


def check_states(tokens: Tensor, largest: int) -> None:
    """Check that tokens are states from 0 to `largest`.

    Raises
    ------
    UserError
        If one is not.
    """
    if tokens.numel() == 0:
        return
    low, high = (int(x) for x in tokens.long().aminmax())  # torch has no extremes of uint16
    if not 0 <= low <= high <= largest:
        wrong = high if high > largest else low
        raise UserError(
            f"a token is {wrong}; expected 0 to {largest}, the states of this model. Bin the data with the model's own binning."
        )


class AbsorbingGraph(Graph):
    """Every value jumps to the mask at rate 1, and the mask stays."""

    def rate(self, tokens: Tensor) -> Tensor:
        """Return Q's rows: to the mask at rate 1; nothing leaves the mask."""
        here = F.one_hot(tokens.long(), self.vocabulary).double()
        mask = F.one_hot(torch.full_like(tokens, self.mask_token, dtype=torch.int64), self.vocabulary).double()
        return mask - here

    def transposed_rate(self, tokens: Tensor) -> Tensor:
        """Return Q's columns: into the mask from every value at rate 1; into a value from none."""
        here = F.one_hot(tokens.long(), self.vocabulary).double()
        is_mask = (tokens == self.mask_token)[..., None].double()
        values = F.pad(torch.ones(self.n_bins, dtype=torch.float64, device=tokens.device), (0, 1))
        return is_mask * values - (1 - is_mask) * here

    def transition(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Return probabilities: still there with `exp(-sigma)`, else masked."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)[..., None]
        here = F.one_hot(tokens.long(), self.vocabulary).double()
        return here + (1 - torch.exp(-sigma)) * self.rate(tokens)

    def sample_transition(self, tokens: Tensor, sigma: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mask each token with probability `1 - exp(-sigma)`."""
        u = torch.rand(tokens.shape, dtype=torch.float64, device=tokens.device, generator=generator)
        return torch.where(u < -torch.expm1(-sigma.double())[:, None], self.mask_token, tokens)

    def sample_limiting(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Return masks: the limit is certain."""
        return torch.full(shape, self.mask_token, dtype=torch.int64, device=device)

    def log_score(self, log_mu: Tensor, tokens: Tensor, sigma: Tensor) -> Tensor:
        """At a mask `log mu + log r`; a visible gene is settled, 0 for its own token and -inf for others."""
        masked = F.pad(log_mu + _inverse_expm1(sigma).log().to(log_mu.dtype)[:, None, None], (0, 1))
        settled = torch.full_like(masked, -torch.inf).scatter_(-1, tokens.long()[..., None], 0.0)
        return torch.where((tokens == self.mask_token)[..., None], masked, settled)

    def score_entropy(self, log_score: Tensor, tokens: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        """At a mask `r (sum mu - 1 - log mu_clean)` with `mu = exp(log_score) / r`; 0 at a visible gene.

        The terms of the plain sum are of order `r log r` and cancel; here none is larger than `r` times the result's own
        size, so float32 does for any noise.
        """
        r = _inverse_expm1(sigma).to(log_score.dtype)[:, None]
        masked = tokens == self.mask_token
        values = torch.where(masked[..., None], log_score[..., : self.n_bins], 0.0)
        log_mu = values - r.log()[..., None]
        picked = log_mu.gather(-1, clean.long()[..., None]).squeeze(-1)
        return torch.where(masked, r * (log_mu.exp().sum(-1) - 1 - picked), 0.0)

    def posterior(self, log_mu: Tensor, tokens: Tensor, sigma: Tensor, earlier: Tensor) -> Tensor:
        """Draw the past of each mask: it was still one with probability `(1 - exp(-earlier)) / (1 - exp(-sigma))`, else `mu`."""
        stay = (torch.expm1(-earlier.double()) / torch.expm1(-sigma.double()))[:, None, None]
        masked = torch.cat([(1 - stay) * log_mu.double().exp(), stay.expand(*tokens.shape, 1)], -1)
        here = F.one_hot(tokens.long(), self.vocabulary).double()
        return torch.where((tokens == self.mask_token)[..., None], masked, here)

    def limit_divergence(self, sigma: Tensor) -> Tensor:
        """Return 0: what is visible at the end of the schedule is counted as given, so the bound is one of H(X0 | X1)."""
        return torch.zeros_like(torch.as_tensor(sigma, dtype=torch.float64))


class UniformGraph(Graph):
    """Every value jumps to every other at rate 1 / n_bins; the mask token is never reached.

    With mu the clean bin's distribution given the other genes, a gene at noise `sigma` has
    `p(y) = exp(-sigma) mu_y + (1 - exp(-sigma)) / n_bins`, hence the score
    `p(y) / p(x) = (1 + n_bins r mu_y) / (1 + n_bins r mu_x)` with `r = 1 / expm1(sigma)`.
    """

    def rate(self, tokens: Tensor) -> Tensor:
        """Return Q's rows: to every value at rate 1 / n_bins."""
        here = F.one_hot(tokens.long(), self.vocabulary).double()
        values = torch.ones(self.n_bins, dtype=torch.float64, device=tokens.device) / self.n_bins
        return F.pad(values, (0, 1)) - here

    def transposed_rate(self, tokens: Tensor) -> Tensor:
        """Return Q's columns, which among values are its rows."""
        return self.rate(tokens)

    def transition(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Return probabilities: kept with `exp(-sigma)`, else drawn anew from all values."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)[..., None]
        here = F.one_hot(tokens.long(), self.vocabulary).double()
        return here + (1 - torch.exp(-sigma)) * self.rate(tokens)

    def sample_transition(self, tokens: Tensor, sigma: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Replace each token by a uniform one with probability `1 - exp(-sigma)`."""
        u = torch.rand(tokens.shape, dtype=torch.float64, device=tokens.device, generator=generator)
        other = self.sample_limiting(tuple(tokens.shape), generator=generator, device=tokens.device)
        return torch.where(u < -torch.expm1(-sigma.double())[:, None], other.to(tokens.dtype), tokens)

    def sample_limiting(
        self, shape: tuple[int, ...], *, generator: torch.Generator | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """Draw values uniformly."""
        return torch.randint(self.n_bins, shape, device=device, generator=generator)

    def _log_odds(self, log_mu: Tensor, sigma: Tensor) -> Tensor:
        """Return `log(1 + n_bins r mu)`, the log of `p(y)` up to a constant of the cell."""
        log_nr = (_inverse_expm1(sigma).log() + math.log(self.n_bins)).to(log_mu.dtype)
        return F.softplus(log_mu + log_nr[:, None, None])

    def log_score(self, log_mu: Tensor, tokens: Tensor, sigma: Tensor) -> Tensor:
        """`log(1 + n_bins r mu_y) - log(1 + n_bins r mu_x)`; -inf for the mask."""
        odds = self._log_odds(log_mu, sigma)
        return F.pad(odds - odds.gather(-1, tokens.long()[..., None]), (0, 1), value=-torch.inf)

    def score_entropy(self, log_score: Tensor, tokens: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        """`sum_{y != x} a_y (exp(d_y) - 1 - d_y) / n_bins` with `d_y = log s_y - log a_y`: each term is at least 0.

        `a_y` is 1 / R for `x = clean`; otherwise R for y = clean and 1 elsewhere; `R = 1 + n_bins r`.
        """
        log_r = torch.log1p(self.n_bins * _inverse_expm1(sigma.double())).to(log_score.dtype)[:, None, None]
        value = torch.arange(self.n_bins, device=tokens.device)
        is_x, is_clean = value == tokens[..., None], value == clean[..., None]
        log_a = log_r * (is_clean.to(log_score.dtype) - (tokens == clean)[..., None].to(log_score.dtype))
        d = torch.where(is_x, 0.0, log_score[..., : self.n_bins]) - torch.where(is_x, 0.0, log_a)
        return (log_a.exp() * _exp_minus_line(d)).masked_fill(is_x, 0.0).sum(-1) / self.n_bins

    def posterior(self, log_mu: Tensor, tokens: Tensor, sigma: Tensor, earlier: Tensor) -> Tensor:
        """Return `p_earlier(y) p(x | y)`, normalised."""
        mu = log_mu.double().exp()
        before = (torch.exp(-earlier.double())[:, None, None] * mu) - torch.expm1(-earlier.double())[
            :, None, None
        ] / self.n_bins
        kept = torch.exp(earlier.double() - sigma.double())[:, None, None]
        here = F.one_hot(tokens.long(), self.n_bins).double()
        p = before * (kept * here + (1 - kept) / self.n_bins)
        return F.pad(p / p.sum(-1, keepdim=True), (0, 1))

    def limit_divergence(self, sigma: Tensor) -> Tensor:
        """Return `KL(p(. | clean) || uniform)` per gene, the same for every clean value."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        n, gone = self.n_bins, -torch.expm1(-sigma)
        kept = torch.exp(-sigma) + gone / n
        return kept * torch.log(n * kept) + (n - 1) * gone / n * torch.log(gone)


def _exp_minus_line(d: Tensor) -> Tensor:
    """Return `exp(d) - 1 - d`, by its series where the difference would cancel."""
    small = d.abs() < 0.03
    near = torch.where(small, d, 0.0)
    series = near.square() / 2 * (1 + near / 3 * (1 + near / 4 * (1 + near / 5 * (1 + near / 6))))
    far = torch.where(small, 0.0, d)
    return torch.where(small, series, torch.expm1(far) - far)


GRAPHS: dict[str, type[AbsorbingGraph] | type[UniformGraph]] = {"absorbing": AbsorbingGraph, "uniform": UniformGraph}


def make_graph(name: str, n_bins: int) -> AbsorbingGraph | UniformGraph:
    """Make a graph by its name.

    Parameters
    ----------
    name
        "absorbing" or "uniform".
    n_bins
        Number of value tokens.

    Raises
    ------
    UserError
        If there is no such graph.
    """
    if name not in GRAPHS:
        raise UserError(f"unknown graph {name!r}; expected one of {', '.join(GRAPHS)}.")
    return GRAPHS[name](n_bins)
