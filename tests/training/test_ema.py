"""The averaged weights against their closed form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sedd.errors import UserError
from sedd.training.ema import EMA


def model_with(value: float) -> nn.Module:
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


def test_average_is_the_closed_form_of_its_recursion() -> None:
    model, decay, n = model_with(5.0), 0.7, 40
    ema = EMA(model, decay=decay)
    values, weights = [5.0], [1.0]
    for k in range(1, n + 1):
        value = float(torch.sin(torch.tensor(1.7 * k)))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(value)
        ema.update()
        kept = min(decay, k / (k + 9))
        weights = [w * kept for w in weights] + [1 - kept]
        values.append(value)
    want = sum(w * v for w, v in zip(weights, values, strict=True))
    assert sum(weights) == pytest.approx(1)
    for average in ema.average.values():
        torch.testing.assert_close(average, torch.full_like(average, want), rtol=1e-12, atol=0)


def test_a_short_run_does_not_remember_its_first_weights() -> None:
    model = model_with(1000.0)
    ema = EMA(model, decay=0.9999)
    for p in model.parameters():
        p.data.fill_(1.0)
    for _ in range(50):
        ema.update()
    assert float(ema.average["bias"][0]) == pytest.approx(1.0, abs=1e-3)


def test_weights_come_back_bit_for_bit_after_the_average_was_applied() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
    ema = EMA(model, decay=0.9)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p))
    ema.update()
    before = copy.deepcopy(model.state_dict())
    averages = {name: value.clone() for name, value in ema.average.items()}
    with ema.applied():
        for name, value in model.named_parameters():
            assert torch.equal(value, averages[name])
        assert not torch.equal(model[0].weight, before["0.weight"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(torch.equal(value, averages[name]) for name, value in ema.average.items())


def test_weights_come_back_when_validation_fails() -> None:
    model = model_with(1.0)
    ema = EMA(model, decay=0.5)
    ema.average["weight"].fill_(9.0)
    with pytest.raises(RuntimeError, match="stop"), ema.applied():
        raise RuntimeError("stop")
    assert torch.equal(model.weight.detach(), torch.ones(2, 3, dtype=torch.float64))


def test_an_average_continues_from_its_state() -> None:
    model, later = model_with(0.0), model_with(7.0)
    whole, first, second = EMA(model, decay=0.9), EMA(model, decay=0.9), EMA(later, decay=0.9)
    for k in range(10):
        for p in (*model.parameters(), *later.parameters()):
            p.data.fill_(float(k))
        whole.update()
        (first if k < 5 else second).update()
        if k == 4:
            second.load_state_dict(first.state_dict())
    assert all(torch.equal(second.average[name], value) for name, value in whole.average.items())


def test_weights_of_another_model_and_impossible_decays_are_errors() -> None:
    with pytest.raises(UserError, match="of another model"):
        EMA(nn.Linear(2, 2), decay=0.9).load_state_dict(EMA(nn.Linear(3, 2), decay=0.9).state_dict())
    with pytest.raises(UserError, match=r"decay of the averaged weights is 1\.0"):
        EMA(nn.Linear(2, 2), decay=1.0)
