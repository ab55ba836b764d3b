"""A training step, or one of sampling or denoising, as a GPU runs it, has no shape that depends on data and nothing that waits for the device.

There are two devices that show it without one. Torch's `meta`, whose tensors have shapes and no values, takes the ways of a GPU, not those of
the CPU's kernels, and there is nothing to look at. Torch's fake tensors, of a device registered by torch's own means (of `cuda` they need a torch that
was built with it), refuse to be mixed with those of another device; the tests are run on them in a process of their own. The one place where the
host may look at a step is `Outcome.read`, one step late: `test_late_look.py`. The one where it may look at what is sampled is
`Sampler._tables_too_short`, when a batch is drawn, besides which genes are hidden, before.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import ROOT
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sedd.binning import UNBOUNDED
from sedd.graph import AbsorbingGraph
from sedd.io.loading.batch import Batch
from sedd.kernels.count_law_moments import Sums
from sedd.kernels.turns import turns
from sedd.loss import diffusion_loss
from sedd.model import SEDDTransformer
from sedd.noise import LogLinearNoise
from sedd.sampling import AnalyticSampler
from sedd.training.ema import EMA
from sedd.training.masking import DeviceMasks, drop_conditions, hide_labels

FAKE = "FAKE_TENSORS" in os.environ
DEVICE = "gpu" if FAKE else "meta"
if FAKE:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register

    register(DEVICE)

CELLS, GENES = 6, 23
NOISE = LogLinearNoise()
REFUSED = ("nonzero", "item", "_local_scalar_dense", "masked_select", "unique", "_unique2", "is_nonzero", "equal")


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for the device; a copy to the host as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        there = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.device.type != "cpu"]
        if there:
            assert name not in REFUSED, f"{name} waits for the device"
            target = args[0].device if name == "copy_" else kwargs.get("device") or there[0].device
            assert torch.device(target).type != "cpu", f"{name} copies to the host"
            # A GPU has hardly any operation on uint16, and none that looks values up by them.
            narrow = [arg for arg in there if arg.dtype == torch.uint16]
            assert not narrow or name in ("_to_copy", "copy_", "view", "slice", "detach"), f"{name} of uint16"
        return func(*args, **kwargs)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device without values. Torch has no reduced precision for it; what waits does not depend on that."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with FakeTensorMode(allow_non_fake_inputs=True) if FAKE else contextlib.nullcontext():
        yield torch.device(DEVICE)


def moved(model: SEDDTransformer, device: torch.device) -> SEDDTransformer:
    """Return the model with weights on a device without values."""
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is not None:
                    there: Any = torch.empty(value.shape, dtype=value.dtype, device=device)
                    own[name] = torch.nn.Parameter(there) if isinstance(value, torch.nn.Parameter) else there
    return model


def model_of(attention: str = "latent", labels: tuple[int, ...] = (), binned: bool = False) -> SEDDTransformer:
    counts = np.random.default_rng(0).poisson(1.0, (50, GENES))
    histogram = sp.csr_array(np.stack([np.bincount(gene, minlength=9) for gene in counts.T]))
    return SEDDTransformer(
        GENES, 9 if binned else UNBOUNDED, hidden_dim=16, num_layers=2, num_heads=4, attention=attention, histogram=None if binned else histogram,
        condition_sizes=labels, condition_library=True, answer_labels=bool(labels),
    )  # fmt: skip


def step(model: SEDDTransformer, ema: EMA, optimizer: torch.optim.Optimizer, device: torch.device, *, labelled: bool) -> torch.Tensor:
    """What `Learner.step` asks of the device, up to where the host may look: the loss and the norm, in one copy."""
    tokens = torch.zeros(CELLS, GENES, dtype=torch.uint16)
    batch = Batch(tokens, None, torch.rand(CELLS), torch.arange(CELLS), {}, torch.ones(CELLS), None)
    masked = DeviceMasks("score_entropy", 0.15, NOISE, 0).of(batch, 0, batch.cell.to(device))
    truth = torch.ones(CELLS, 2, dtype=torch.int64).to(device) if labelled else None
    condition, library = drop_conditions(truth, batch.library.to(device), 0.1)
    weight = None
    if truth is not None:
        condition, weight = hide_labels(condition, NOISE.mask_probability(batch.t.double()).to(device))
    loss, per_cell = diffusion_loss(
        model, AbsorbingGraph(model.n_bins), NOISE, tokens.to(device), masked, batch.t.to(device), condition=condition, library=library, labels=truth,
        label_weight=weight,
    )  # fmt: skip
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update()
    return torch.stack([per_cell.sum(), norm])


@pytest.mark.parametrize("binned", [False, True])
@pytest.mark.parametrize("labels", [(), (3, 4)])
@pytest.mark.parametrize("attention", ["latent", "full"])
def test_a_training_step_on_a_gpu_waits_for_nothing(attention: str, labels: tuple[int, ...], binned: bool, device: torch.device) -> None:
    model = moved(model_of(attention, labels, binned), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    ema = EMA(model, decay=0.99)
    with NoWait():
        seen = step(model, ema, optimizer, device, labelled=bool(labels))
    assert (seen.device.type, seen.shape) == (device.type, (2,))
    assert optimizer.state


@pytest.mark.parametrize("binned", [False, True])
@pytest.mark.parametrize("attention", ["latent", "full"])
@torch.no_grad()
def test_the_steps_of_a_sampler_on_a_gpu_wait_for_nothing(attention: str, binned: bool, device: torch.device) -> None:
    """When each gene becomes visible is known to the host before the first step."""
    model = moved(model_of(attention, (3, 4), binned), device).eval()
    sampler = AnalyticSampler(model, AbsorbingGraph(model.n_bins), NOISE, num_steps=4)
    hidden = np.arange(CELLS * GENES).reshape(CELLS, GENES) % 3 > 0
    order = turns(hidden, np.arange(CELLS), np.linspace(0.75, 0, 4), 0, 10, 11)
    given = [torch.ones(CELLS, 2, dtype=torch.int64, device=device), torch.ones(CELLS, device=device)]
    tokens = torch.zeros(CELLS, GENES, dtype=torch.int64, device=device)
    done: list[int] = []
    with NoWait():
        sampler.unmask(tokens, order, given, lambda at, _: done.append(at))
    assert done == list(range(1, len(order.ends) + 1))


@pytest.mark.parametrize(("order", "temperature", "guidance"), [("confidence", 1, 1), ("confidence", 0.5, 2), ("random", 1.5, 2)])
@pytest.mark.parametrize("binned", [False, True])
@torch.no_grad()
def test_a_sampler_of_any_settings_on_a_gpu_waits_for_nothing(
    binned: bool, order: str, temperature: float, guidance: float, device: torch.device
) -> None:
    """A law of counts that is changed is drawn from a table, whose length is looked at when a batch is done."""
    model = moved(model_of("latent", (3, 4), binned), device).eval()
    sampler = AnalyticSampler(model, AbsorbingGraph(model.n_bins), NOISE, num_steps=4, temperature=temperature, guidance=guidance, order=order)
    given = [torch.ones(CELLS, 2, dtype=torch.int64, device=device), torch.ones(CELLS, device=device)]
    tokens = torch.zeros(CELLS, GENES, dtype=torch.int64, device=device)
    done: list[int] = []
    with NoWait():
        if order == "random":
            hidden = np.arange(CELLS * GENES).reshape(CELLS, GENES) % 3 > 0
            sampler.unmask(tokens, turns(hidden, np.arange(CELLS), np.linspace(0.75, 0, 4), 0, 10, 11), given, lambda at, _: done.append(at))
        else:
            left = np.array([[9, 9, 0, 5, 23, 1], [7, 9, 0, 4, 20, 0], [3, 1, 0, 4, 10, 0], [1, 0, 0, 4, 5, 0], [0] * CELLS])
            u = torch.zeros(CELLS, GENES, dtype=torch.float64, device=device)
            sampler.unmask_surest(tokens, left, u, given, lambda at, _: done.append(at))
    assert done and done == list(range(1, done[-1] + 1))
    needed = sampler._tempering.needed
    assert (needed is not None) == (not binned and (temperature, guidance) != (1, 1))
    assert needed is None or (needed.device.type, needed.ndim) == (device.type, 0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("binned", [False, True])
@torch.no_grad()
def test_denoising_on_a_gpu_adds_up_on_it(own: bool, binned: bool, device: torch.device) -> None:
    model = moved(model_of(binned=binned), device).eval()
    tokens = torch.zeros(CELLS, GENES, dtype=torch.int64, device=device)
    sums = Sums.of_zeros((CELLS, GENES), log1p=True, device=device)
    places = [torch.arange(k, GENES, 2, device=device) for k in range(2)]
    scale = torch.ones(CELLS, dtype=torch.float64, device=device)
    with NoWait():
        for place, readout in zip(places, model.readout_by_part(tokens, [scale.float()] * 2, places), strict=True):
            given = {"by_own": torch.ones(len(place), dtype=torch.bool, device=device), "counts": tokens[:, place]} if own and not binned else {}
            masked = torch.ones(readout.shape[:2], dtype=torch.bool, device=device)
            model.head.add_moments(sums, readout, masked, genes=place, scale=scale, **given)
        found = sums.mean_and_std()
        mean, _ = model.expectation(tokens.int(), scale.float())
    assert all(x.device.type == device.type and x.shape == (CELLS, GENES) for x in (*found, mean))


@pytest.mark.parametrize("attention", ["latent", "full"])
def test_a_model_counts_the_products_that_torch_counts(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    model = model_of(attention).to("meta")
    tokens = torch.zeros(CELLS, GENES, dtype=torch.int32, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # the laws of all genes are made, which is what a GPU does
        model(tokens, torch.ones(CELLS, device="meta"), targets=tokens)
    assert model.flops(GENES, GENES) == 3 * counter.get_total_flops() // CELLS


@pytest.mark.skipif(FAKE, reason="this is the process")
def test_fake_tensors_of_a_gpu_are_nowhere_mixed_with_others() -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "on_a_gpu or of_another", __file__]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "FAKE_TENSORS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "23 passed" in done.stdout


@pytest.mark.skipif(not FAKE, reason="meta tensors do not look at it")
def test_one_of_another_device_is_noticed(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=device) + torch.ones(2)


SOME = torch.ones(1, dtype=torch.bool, device="meta")
WAITS = [torch.nonzero, torch.Tensor.item, torch.Tensor.cpu, torch.unique, torch.ones(1).copy_, functools.partial(torch.masked_select, mask=SOME)]


@pytest.mark.parametrize("wait", WAITS)
def test_what_waits_is_noticed(wait: Callable[[torch.Tensor], Any]) -> None:
    with NoWait(), pytest.raises(AssertionError, match=r"waits for the device|copies to the host"):
        wait(torch.zeros(1, device="meta"))
