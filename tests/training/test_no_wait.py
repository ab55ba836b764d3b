"""A training step, as a GPU runs it, has no shape that depends on data and nothing that waits for the device.

The device is torch's `meta`, whose tensors have shapes and no values: it takes the ways of a GPU, not those of the CPU's kernels, and there is
nothing to look at. The one place where the host may look is `Outcome.read`, one step late: `test_late_look.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sedd.binning import UNBOUNDED
from sedd.graph import AbsorbingGraph
from sedd.io.loading.batch import Batch
from sedd.loss import diffusion_loss
from sedd.model import SEDDTransformer
from sedd.noise import LogLinearNoise
from sedd.training.ema import EMA
from sedd.training.masking import DeviceMasks, drop_conditions, hide_labels

CELLS, GENES = 6, 23
GPU = torch.device("meta")
NOISE = LogLinearNoise()
REFUSED = ("nonzero", "item", "_local_scalar_dense", "masked_select", "unique", "_unique2", "is_nonzero", "equal")


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for the device; a copy to the host as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if any(isinstance(arg, torch.Tensor) and arg.device == GPU for arg in args):
            assert name not in REFUSED, f"{name} waits for the device"
            target = args[0].device if name == "copy_" else kwargs.get("device") or GPU
            assert torch.device(target) == GPU, f"{name} copies to the host"
        return func(*args, **kwargs)


def model_of(attention: str, labels: tuple[int, ...]) -> SEDDTransformer:
    counts = np.random.default_rng(0).poisson(1.0, (50, GENES))
    histogram = sp.csr_array(np.stack([np.bincount(gene, minlength=9) for gene in counts.T]))
    return SEDDTransformer(
        GENES, UNBOUNDED, hidden_dim=16, num_layers=2, num_heads=4, attention=attention, histogram=histogram, condition_sizes=labels,
        condition_library=True, answer_labels=bool(labels),
    )  # fmt: skip


def step(model: SEDDTransformer, ema: EMA, optimizer: torch.optim.Optimizer, *, labelled: bool) -> torch.Tensor:
    """What `Learner.step` asks of the device, up to where the host may look: the loss and the norm, in one copy."""
    tokens = torch.zeros(CELLS, GENES, dtype=torch.uint8)
    batch = Batch(tokens, None, torch.rand(CELLS), torch.arange(CELLS), {}, torch.ones(CELLS), None)
    masked = DeviceMasks("score_entropy", 0.15, NOISE, 0).of(batch, 0, GPU)
    truth = torch.ones(CELLS, 2, dtype=torch.int64).to(GPU) if labelled else None
    condition, library = drop_conditions(truth, batch.library.to(GPU), 0.1)
    weight = None
    if truth is not None:
        condition, weight = hide_labels(condition, NOISE.mask_probability(batch.t.double()).to(GPU))
    loss, per_cell = diffusion_loss(
        model, AbsorbingGraph(UNBOUNDED), NOISE, tokens.to(GPU), masked, batch.t.to(GPU), condition=condition, library=library, labels=truth,
        label_weight=weight,
    )  # fmt: skip
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update()
    return torch.stack([per_cell.sum(), norm])


@pytest.fixture
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has no reduced precision for tensors without values; what waits does not depend on it."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("labels", [(), (3, 4)])
@pytest.mark.parametrize("attention", ["latent", "full"])
def test_a_training_step_on_a_gpu_waits_for_nothing(attention: str, labels: tuple[int, ...], without_autocast: None) -> None:
    model = model_of(attention, labels).to(GPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    ema = EMA(model, decay=0.99)
    with NoWait():
        seen = step(model, ema, optimizer, labelled=bool(labels))
    assert (seen.device, seen.shape) == (GPU, (2,))
    assert optimizer.state


@pytest.mark.parametrize("attention", ["latent", "full"])
def test_a_model_counts_the_products_that_torch_counts(attention: str, without_autocast: None) -> None:
    model = model_of(attention, ()).to(GPU)
    tokens = torch.zeros(CELLS, GENES, dtype=torch.int32, device=GPU)
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # the laws of all genes are made, which is what a GPU does
        model(tokens, torch.ones(CELLS, device=GPU), targets=tokens)
    assert model.flops(GENES, GENES) == 3 * counter.get_total_flops() // CELLS


SOME = torch.ones(1, dtype=torch.bool, device=GPU)
WAITS = [torch.nonzero, torch.Tensor.item, torch.Tensor.cpu, torch.unique, torch.ones(1).copy_, functools.partial(torch.masked_select, mask=SOME)]


@pytest.mark.parametrize("wait", WAITS)
def test_what_waits_is_noticed(wait: Callable[[torch.Tensor], Any]) -> None:
    with NoWait(), pytest.raises(AssertionError, match=r"waits for the device|copies to the host"):
        wait(torch.zeros(1, device=GPU))
