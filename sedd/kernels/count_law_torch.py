"""The law of a gene's count by torch's own functions, as a GPU runs it: no shape depends on data, and nothing waits for the device.

On a CPU the kernels of `count_law`, `count_law_draws` and `count_law_moments` are faster. These give the same numbers; draws are others, from
the same laws. The law is described in `sedd.kernels.count_law`; `raw` (..., 3, 3) are the logs of a component's weight, mean and dispersion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd.kernels.count_law_draws import LARGEST, LOG_FROM, LOG_MEAN, LOG_NODES, LOG_STEP, LOG_THETA
from sedd.kernels.random_bits import mixed

_LOWEST = -80.0  # a rate e**80 times less than its mean is of no count
_HALVINGS = 54  # of the logarithm of a rate, down to what a float64 tells apart
_FEW = 66  # counts that are all tried: one more than the largest mode that `count_law_draws.best` looks for among all
_COUNTS = 32  # halvings of the counts up to `LARGEST`


def laws(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log weights, log means and log dispersions of the components, (..., 3) each, within their bounds."""
    return raw[..., 0].log_softmax(-1), raw[..., 1].clamp(*LOG_MEAN), raw[..., 2].clamp(*LOG_THETA)


def log_probs(raw: Tensor, counts: Tensor) -> Tensor:
    """Return the log-probabilities of counts, (...), in the precision of `raw`."""
    return _by_component(raw, counts.to(raw.dtype)).logsumexp(-1)


def _by_component(raw: Tensor, k: Tensor) -> Tensor:
    log_weight, log_mean, log_theta = laws(raw)
    k = k.unsqueeze(-1)
    theta, log_ratio = log_theta.exp(), log_mean - log_theta
    q = log_ratio.exp().log1p()
    rising = torch.lgamma(theta + k) - torch.lgamma(theta)
    return log_weight + rising - (theta + k) * q + k * log_ratio - torch.lgamma(k + 1)


def draw(raw: Tensor, u: Tensor) -> Tensor:
    """Draw counts: u chooses the component and, stretched, the rate; a number mixed from the bits of u the count of that rate.

    Parameters
    ----------
    raw : (N, 3, 3) float64
    u : (N,) float64 in [0, 1)

    Returns
    -------
    drawn : (N,) int64, -1 where the law is not a number
    """
    log_weight, log_mean, log_theta = laws(raw)
    weight = log_weight.exp()
    starts = weight.cumsum(-1) - weight
    chosen = (u[:, None] >= starts[:, 1:]).sum(-1, keepdim=True)
    stretched = ((u[:, None] - starts.gather(1, chosen)) / weight.gather(1, chosen)).clamp(0, 1 - 2.0**-53).squeeze(1)
    log_theta = log_theta.gather(1, chosen).squeeze(1)
    theta, log_scale = log_theta.exp(), log_mean.gather(1, chosen).squeeze(1) - log_theta
    # The rate is gamma-distributed, and beyond 2 theta + 60 with less than 2**-53; the tail above is the one that is right where it is small.
    rest, low, high = 1 - stretched, torch.full_like(u, _LOWEST), (2 * theta + 60).log()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = torch.special.gammaincc(theta, middle.exp()) >= rest
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    rate = (low + log_scale).exp()
    rest, low, high = 1 - mixed(u), torch.full_like(u, -1.0), (2 * rate + 60).floor().clamp(max=LARGEST)
    for _ in range(_COUNTS):
        middle = ((low + high) / 2).floor()
        above = torch.special.gammainc(middle + 1, rate) >= rest
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(raw.flatten(1).isfinite().all(1), high, -1.0).long()


def best(raw: Tensor) -> Tensor:
    """Return the log-probability of the most probable count, (N,) float64, of `raw` (N, 3, 3) float64.

    Where a mode lies above 64 it is that of the best mode of a component, which may be a little less.
    """
    _, log_mean, log_theta = laws(raw)
    modes = (log_mean.exp() * (1 - (-log_theta).exp())).clamp(min=0).floor()
    counts = torch.cat([torch.arange(_FEW, dtype=raw.dtype, device=raw.device).expand(len(raw), -1), modes], 1)
    return log_probs(raw.unsqueeze(1), counts).amax(1)


def reach(raw: Tensor, log_rest: float) -> Tensor:
    """Return how many counts, from 0 on, leave less than `exp(log_rest)` of each component of each law, (N,) int64, by Chernoff's bound.

    The bound of P(n or more) is `(mean / n)**n ((n + theta) / (mean + theta))**(n + theta)`, which a few more counts satisfy than are needed.
    """
    log_weight, log_mean, log_theta = laws(raw)
    mean, theta = log_mean.exp(), log_theta.exp()
    low, high = mean, torch.full_like(mean, LARGEST)
    for _ in range(_COUNTS):
        middle = ((low + high) / 2).ceil()
        bound = (middle + theta) * ((middle - mean) / (mean + theta)).log1p() - middle * (middle.log() - log_mean)
        enough = log_weight + bound < log_rest
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high.where(log_weight >= log_rest, 1).amax(-1).long().clamp(min=1)


def moments(
    raw: Tensor, *, counts: Tensor | None, by_own: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return what `sedd.kernels.count_law_moments.Sums` adds up of single predictions, float64.

    Parameters
    ----------
    raw : (B, n, 3, 3) float64
    counts : (B, n), by_own : (n,) bool, scale : (B,) float64
        As in `sedd.kernels.count_law_moments.add_moments`.

    Returns
    -------
    evidence, first, second, zero, log1p : (B, n)
        The last is None without a scale.
    """
    log_weight, log_mean, log_theta = laws(raw)
    share, theta, spread = log_weight.exp(), log_theta.exp(), torch.ones((), dtype=raw.dtype, device=raw.device)
    mean, log_none = log_mean.exp(), _by_component(raw, torch.zeros(raw.shape[:-2], dtype=raw.dtype, device=raw.device))
    evidence, zero = torch.ones_like(log_none[..., 0]), log_none.logsumexp(-1).exp()
    if counts is not None and by_own is not None:
        known = by_own[:, None]
        k = counts.to(raw.dtype).where(by_own, 0)
        parts = _by_component(raw, k)
        evidence = parts.logsumexp(-1).exp().clamp(min=1e-300).where(by_own, 1)
        zero = zero.masked_fill(by_own, 0)
        share = torch.where(known, parts.softmax(-1), share)
        ratio = (log_mean - log_theta).exp()
        after = theta + k.unsqueeze(-1)
        mean = torch.where(known, after * ratio / (1 + ratio), mean)
        theta, spread = torch.where(known, after, theta), (~known).to(raw.dtype)
    share = share * evidence.unsqueeze(-1)
    first = (share * mean).sum(-1)
    second = (share * mean * (mean + mean / theta + spread)).sum(-1)
    log = None if scale is None else (share * mean_log1p(scale[:, None, None], mean, theta)).sum(-1)
    return evidence, first, second, zero, log


def mean_log1p(scale: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """Return the expectation of `log1p(scale n)` of a negative binomial count n, as the kernel does for large means; 0 where the scale is."""
    total, ratio = torch.zeros_like(mean + scale), mean / theta
    for node in range(LOG_NODES):
        x = math.exp(LOG_FROM + LOG_STEP * node)
        none = -theta * (ratio * -torch.expm1(-scale * x)).log1p()
        total = total - torch.expm1(none) * math.exp(-x)
    return total * LOG_STEP
