"""Noise schedules: how much of a cell has been destroyed at time t.

`sigma(t)` is the total noise up to time t, `dsigma(t)` its rate. Under the absorbing graph a gene is masked by time t with
probability `1 - exp(-sigma(t))`. Times are tensors of any shape, or whatever `torch.as_tensor` takes; results keep the
precision of a floating tensor and are float64 otherwise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from sedd.errors import UserError


def _times(t: Any) -> Tensor:
    t = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)
    return t if t.is_floating_point() else t.double()


class Noise(ABC):
    """A noise schedule on t in [0, 1]."""

    @abstractmethod
    def sigma(self, t: Any) -> Tensor:
        """Return the total noise at time t."""

    @abstractmethod
    def dsigma(self, t: Any) -> Tensor:
        """Return the derivative of `sigma` at time t."""

    def mask_probability(self, t: Any) -> Tensor:
        """Return `1 - exp(-sigma(t))`, the probability that a gene is masked by time t."""
        return -torch.expm1(-self.sigma(t))

    def unmask_rate(self, t: Any) -> Tensor:
        """Return `dsigma(t) / (exp(sigma(t)) - 1)`: how fast a masked gene is unmasked backwards in time.

        It is also the weight of a masked gene's cross-entropy in the score entropy.
        """
        return self.dsigma(t) / torch.expm1(self.sigma(t))

    def sigma_at(self, share: Any) -> Tensor:
        """Return the total noise at which `share` of the genes is masked.

        Parameters
        ----------
        share : any shape, in [0, 1]

        Returns
        -------
        sigma : float64, at most `sigma(1)`
            A cell whose genes are all masked is at the end of the schedule, where training has been.
        """
        share = _times(share).double()
        return torch.clamp(-torch.log1p(-share), max=float(self.sigma(1.0)))


class LogLinearNoise(Noise):
    """The share of masked genes grows linearly: `(1 - eps) t`.

    Parameters
    ----------
    eps
        Share of genes still visible at t = 1. 0 gives infinite noise there, which formulas stand and numbers do not.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        if not 0 <= eps < 1:
            raise UserError(f"eps of the log-linear noise is {eps}; expected 0 <= eps < 1, such as 1e-3.")
        self.eps = float(eps)

    def sigma(self, t: Any) -> Tensor:
        """Return `-log(1 - (1 - eps) t)`."""
        return -torch.log1p(-(1 - self.eps) * _times(t))

    def dsigma(self, t: Any) -> Tensor:
        """Return `(1 - eps) / (1 - (1 - eps) t)`."""
        return (1 - self.eps) / (1 - (1 - self.eps) * _times(t))

    def mask_probability(self, t: Any) -> Tensor:
        """Return `(1 - eps) t`."""
        return (1 - self.eps) * _times(t)

    def unmask_rate(self, t: Any) -> Tensor:
        """Return 1 / t, whatever eps."""
        return 1 / _times(t)


class GeometricNoise(Noise):
    """The total noise grows geometrically, `sigma_min^(1-t) sigma_max^t`.

    Parameters
    ----------
    sigma_min, sigma_max
        Total noise at t = 0 and t = 1. What is left at t = 1 is `exp(-sigma_max)` of the genes.
    """

    def __init__(self, sigma_min: float = 1e-3, sigma_max: float = 20.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise UserError(
                f"sigma_min {sigma_min} and sigma_max {sigma_max} of the geometric noise; expected 0 < sigma_min < sigma_max."
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def sigma(self, t: Any) -> Tensor:
        """Return `sigma_min^(1-t) sigma_max^t`."""
        return self.sigma_min * torch.exp(_times(t) * math.log(self.sigma_max / self.sigma_min))

    def dsigma(self, t: Any) -> Tensor:
        """Return `sigma(t) log(sigma_max / sigma_min)`."""
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)


NOISES: dict[str, type[LogLinearNoise] | type[GeometricNoise]] = {
    "loglinear": LogLinearNoise,
    "geometric": GeometricNoise,
}


def make_noise(name: str, **settings: float) -> LogLinearNoise | GeometricNoise:
    """Make a schedule by its name.

    Parameters
    ----------
    name
        "loglinear" or "geometric".
    **settings
        Of the schedule's constructor.

    Raises
    ------
    UserError
        If there is no such schedule or a setting is out of range.
    """
    if name not in NOISES:
        raise UserError(f"unknown noise {name!r}; expected one of {', '.join(NOISES)}.")
    return NOISES[name](**settings)


def stratified_times(n: int, shift: float = 0.5) -> Tensor:
    """Return n times in (0, 1], one in each of n equal strata.

    Parameters
    ----------
    n
        Number of times.
    shift
        Place within a stratum, in (0, 1]. Uniform over shifts, each time is uniform on (0, 1].

    Returns
    -------
    t : (n,) float64, increasing
    """
    return (torch.arange(n, dtype=torch.float64) + shift) / n
