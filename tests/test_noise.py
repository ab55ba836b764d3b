"""The noise schedules against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sedd.errors import UserError
from sedd.noise import GeometricNoise, LogLinearNoise, Noise, make_noise, stratified_times

SCHEDULES = [LogLinearNoise(), LogLinearNoise(eps=0.05), GeometricNoise(), GeometricNoise(1e-4, 10)]
T = torch.linspace(0.01, 1, 33, dtype=torch.float64)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_rate_is_the_derivative_of_the_total(noise: Noise) -> None:
    t = T.clone().requires_grad_()
    (slope,) = torch.autograd.grad(noise.sigma(t).sum(), t)
    torch.testing.assert_close(noise.dsigma(T), slope, rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_mask_probability_is_one_minus_what_survives(noise: Noise) -> None:
    torch.testing.assert_close(noise.mask_probability(T), 1 - torch.exp(-noise.sigma(T)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_rate_of_unmasking_is_that_of_masking_times_the_odds_of_being_visible(noise: Noise) -> None:
    p = noise.mask_probability(T)
    torch.testing.assert_close(noise.unmask_rate(T), noise.dsigma(T) * (1 - p) / p, rtol=1e-6, atol=1e-12)
    # Which is how fast the share of masked genes grows, relative to that share.
    t = T.clone().requires_grad_()
    (growth,) = torch.autograd.grad(noise.mask_probability(t).sum(), t)
    torch.testing.assert_close(noise.unmask_rate(T), growth / p, rtol=1e-6, atol=1e-12)
    # As the formulas have it, where the odds are not a difference of numbers near 1.
    torch.testing.assert_close(noise.unmask_rate(T), noise.dsigma(T) / torch.expm1(noise.sigma(T)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_noise_of_a_share_inverts_the_mask_probability_and_ends_where_the_schedule_does(noise: Noise) -> None:
    inside = T[T < 0.9]
    torch.testing.assert_close(noise.sigma_at(noise.mask_probability(inside)), noise.sigma(inside), rtol=1e-9, atol=0)
    assert float(noise.sigma_at(1.0)) == float(noise.sigma(1.0))


def test_log_linear_noise_masks_in_proportion_to_time() -> None:
    torch.testing.assert_close(LogLinearNoise().mask_probability(T), 0.999 * T, rtol=0, atol=1e-15)
    assert float(LogLinearNoise().sigma(1.0)) == pytest.approx(-math.log(1e-3))


def test_geometric_noise_runs_from_its_smallest_to_its_largest() -> None:
    noise = GeometricNoise(1e-3, 20)
    assert [float(noise.sigma(t)) for t in (0, 0.5, 1)] == pytest.approx([1e-3, math.sqrt(1e-3 * 20), 20])


def test_times_may_be_numbers_arrays_or_tensors_and_keep_their_precision() -> None:
    noise = LogLinearNoise()
    assert noise.sigma(0.5).dtype == noise.sigma(np.array([0.5], np.float32)).dtype == torch.float64
    assert noise.sigma(torch.tensor([0.5])).dtype == torch.float32
    assert np.asarray(noise.mask_probability(np.array([0.25, 1.0]))) == pytest.approx([0.24975, 0.999])


def test_stratified_times_have_one_in_each_stratum() -> None:
    for n in (1, 2, 7, 32):
        for shift in (1e-9, 0.3, 1.0):
            t = stratified_times(n, shift)
            assert torch.equal(torch.ceil(t * n - 1e-12).long(), torch.arange(1, n + 1))
            assert t.min() > 0
            assert t.max() <= 1


def test_bad_settings_are_errors() -> None:
    with pytest.raises(UserError, match="unknown noise 'cosine'; expected one of loglinear, geometric"):
        make_noise("cosine")
    with pytest.raises(UserError, match="eps of the log-linear noise is 1.5"):
        make_noise("loglinear", eps=1.5)
    with pytest.raises(UserError, match="sigma_min 2.0 and sigma_max 1.0"):
        make_noise("geometric", sigma_min=2.0, sigma_max=1.0)
