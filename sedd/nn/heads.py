"""From a gene's readout to a distribution over its bins: free (softmax) or a discretised negative binomial.

A head is given flat lists of positions, only those where a distribution is wanted: `readout` (N, rank) and `genes` (N,).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (position, bin) pairs whose probabilities exist at a time: what stays in a core's cache, what keeps a GPU busy.
CHUNK_CPU, CHUNK_GPU = 1 << 17, 1 << 24


def chunks(n: int, like: Tensor) -> Iterator[slice]:
    """Cut `n` positions into slices small enough for `like`'s device, given its last dimension, the bins."""
    step = max(1, (CHUNK_CPU if like.device.type == "cpu" else CHUNK_GPU) // like.shape[-1])
    return (slice(start, start + step) for start in range(0, n, step))


class SoftmaxHead(nn.Module):
    """Low-rank logits, smooth in the counts at the start, over a bias started at the genes' log-marginals.

    Parameters
    ----------
    log_marginals : (n_vars, n_bins)
    bin_values : (n_bins,)
    rank
        Length of a readout.
    """

    def __init__(self, log_marginals: Tensor, bin_values: Tensor, rank: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(log_marginals.clone())
        place = bin_values.log1p() / bin_values.log1p().max().clamp(min=1e-6)
        # The cosines of a DCT: smooth functions of log(1 + count), from slow to fast.
        waves = torch.cos(torch.pi * place * torch.arange(1, rank + 1).unsqueeze(1))
        self.basis = nn.Parameter(waves)

    def log_mu(self, readout: Tensor, genes: Tensor) -> Tensor:
        """Return log-probabilities of all bins, (N, n_bins) float32."""
        with torch.autocast(readout.device.type, enabled=False):
            return torch.addmm(F.embedding(genes, self.bias), readout.float(), self.basis).log_softmax(-1)

    def log_mu_of(self, readout: Tensor, genes: Tensor, targets: Tensor) -> Tensor:
        """Return log-probabilities of `targets` (N,), (N,) float32; logits exist for one chunk of positions at a time."""
        with torch.autocast(readout.device.type, enabled=False):
            return _LogSoftmaxOf.apply(readout.float(), self.basis, self.bias, genes, targets)


class _LogSoftmaxOf(torch.autograd.Function):
    """`log_softmax(bias[genes] + readout @ basis)` at `targets`, in float32 and in chunks.

    The gradient makes the logits again, so that neither pass holds more than a chunk of them.
    """

    @staticmethod
    def forward(ctx: Any, readout: Tensor, basis: Tensor, bias: Tensor, genes: Tensor, targets: Tensor) -> Tensor:
        out = readout.new_empty(len(genes))
        log_total = torch.empty_like(out)
        for part in chunks(len(genes), basis):
            logits = torch.addmm(bias[genes[part]], readout[part], basis)
            log_total[part] = logits.logsumexp(-1)
            out[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - log_total[part]
        ctx.save_for_backward(readout, basis, bias, genes, targets, log_total)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        readout, basis, bias, genes, targets, log_total = ctx.saved_tensors
        to_readout, to_basis, to_bias = torch.empty_like(readout), torch.zeros_like(basis), torch.zeros_like(bias)
        for part in chunks(len(genes), basis):
            delta = torch.addmm(bias[genes[part]], readout[part], basis)
            delta.sub_(log_total[part, None]).exp_().mul_(-gradient[part, None])
            delta.scatter_add_(-1, targets[part, None], gradient[part, None])
            torch.mm(delta, basis.T, out=to_readout[part])
            to_basis.addmm_(readout[part].T, delta)
            to_bias.index_add_(0, genes[part], delta)
        return to_readout, to_basis, to_bias, None, None


class NegativeBinomialHead(nn.Module):
    """A negative binomial over the bin index, whose tail falls into the top bin.

    Its log mean and log dispersion start at a fit to the genes' marginals.
    """

    def __init__(self, log_marginals: Tensor, bin_values: Tensor, rank: int) -> None:
        super().__init__()
        self.n_bins = bin_values.shape[0]
        self.bias = nn.Parameter(torch.stack(_fit(log_marginals.double().softmax(-1)), dim=1).log().float())
        self.mix = nn.Linear(rank, 2, bias=False)

    def _parameters_at(self, readout: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(readout.device.type, enabled=False):
            log_mean, log_dispersion = (F.embedding(genes, self.bias) + self.mix(readout.float())).unbind(-1)
        return log_mean, log_dispersion.clamp(-7, 12)

    def _log_pmf(self, count: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
        theta = log_dispersion.exp()
        log_odds = log_mean - log_dispersion
        binomial = _log_rising(theta, count) - torch.lgamma(count + 1)
        return binomial - theta * F.softplus(log_odds) + count * F.logsigmoid(log_odds)

    def _log_tail(self, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
        """Log-probability of the top bin and all counts above it, the regularised incomplete beta function I_q(top, theta).

        Its continued fraction, not 1 minus the rest: a small tail would drown in rounding. The fraction converges where
        the tail is below about a half; elsewhere the complement's does.
        """
        top = float(self.n_bins - 1)
        theta = log_dispersion.exp()
        q = torch.sigmoid(log_mean - log_dispersion)
        turn = (top + 1) / (top + theta + 2)
        first = self._log_pmf(torch.full_like(q, top), log_mean, log_dispersion)
        upper = first + _beta_fraction(torch.full_like(q, top), theta, torch.minimum(q, turn)).log()
        below = first.exp() * top / theta * _beta_fraction(theta, torch.full_like(q, top), 1 - torch.maximum(q, turn))
        return torch.where(q < turn, upper, torch.log1p(-below.clamp(max=1 - 1e-6)))

    def log_mu(self, readout: Tensor, genes: Tensor) -> Tensor:
        """Return log-probabilities of all bins, (N, n_bins) float32."""
        log_mean, log_dispersion = self._parameters_at(readout, genes)
        count = torch.arange(self.n_bins - 1, device=readout.device, dtype=torch.float32)
        log_pmf = self._log_pmf(count, log_mean.unsqueeze(-1), log_dispersion.unsqueeze(-1))
        return torch.cat([log_pmf, self._log_tail(log_mean, log_dispersion).unsqueeze(-1)], dim=-1)

    def log_mu_of(self, readout: Tensor, genes: Tensor, targets: Tensor) -> Tensor:
        """Return log-probabilities of `targets` (N,), (N,) float32, without making those of other bins."""
        log_mean, log_dispersion = self._parameters_at(readout, genes)
        out = self._log_pmf(targets.float(), log_mean, log_dispersion)
        (top,) = (targets == self.n_bins - 1).nonzero(as_tuple=True)
        return out.index_put((top,), self._log_tail(log_mean[top], log_dispersion[top]))


def _fit(p: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and dispersion of a negative binomial for each row of probabilities (n_vars, n_bins).

    A gene that is mostly 0 is fitted by its probabilities of 0 and 1: the little mass that smoothing puts on large counts
    would rule its moments. The others are fitted by moments.
    """
    count = torch.arange(p.shape[1], dtype=p.dtype, device=p.device)
    mean = (p @ count).clamp(min=1e-6)
    excess = (p @ count.square() - mean.square() - mean).clamp(min=1e-3 * mean.square())
    # P(1) / P(0) = theta q and log P(0) = theta log(1 - q); bisect -log(1 - q) / q = -log P(0) * P(0) / P(1) for q.
    none, one = p[:, 0], p[:, 1]
    low, high = torch.full_like(none, 1e-6), torch.full_like(none, 1 - 1e-9)
    for _ in range(50):
        q = (low + high) / 2
        above = -torch.log1p(-q) * one > -none.log() * none * q
        low, high = torch.where(above, low, q), torch.where(above, q, high)
    sparse = one / none / q
    mostly_none = none > 0.3
    dispersion = torch.where(mostly_none, sparse, mean.square() / excess).clamp(1e-2, 1e3)
    return torch.where(mostly_none, dispersion * q / (1 - q), mean), dispersion


def _log_rising(theta: Tensor, count: Tensor) -> Tensor:
    """`lgamma(theta + count) - lgamma(theta)`, by Stirling's series where the two are large and would cancel in float32."""
    total = theta + count
    large = (theta - 0.5) * torch.log1p(count / theta) + count * (total.log() - 1)
    large = large + (1 / total - 1 / theta) / 12
    return torch.where(theta > 8, large, torch.lgamma(total) - torch.lgamma(theta))


def _beta_fraction(a: Tensor, b: Tensor, x: Tensor, depth: int = 32) -> Tensor:
    """Continued fraction of the incomplete beta function (DLMF 8.17.22), from its `depth`-th pair of terms backwards."""
    out = torch.ones_like(x)
    for m in range(depth, 0, -1):
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        out = 1 + even / (1 + odd / out)
    return 1 / (1 - (a + b) * x / (a + 1) / out)
