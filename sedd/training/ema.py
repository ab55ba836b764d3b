"""An exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sedd.errors import UserError


class EMA:
    """Averaged weights, kept beside the model and swapped in to validate and to use it.

    After k updates an average is `decay_k average + (1 - decay_k) weight` with `decay_k = min(decay, k / (k + 9))`: it
    starts as a mean over about the last tenth of a young run, so that the weights of the first steps do not linger in it.

    Parameters
    ----------
    model
        Whose trainable parameters are averaged, and change places with their averages. Buffers are not: nothing of a `sedd` model is
        learned in them.
    decay
        Decay per update once `k / (k + 9)` has passed it.
    in_place
        Whether values change places rather than tensors: of weights that are divided among processes, each of which is sent from where it lies.

    Raises
    ------
    UserError
        If `decay` is not in [0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.999, in_place: bool = False) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"decay of the averaged weights is {decay}; expected 0 <= decay < 1, such as 0.999.")
        self.decay = float(decay)
        self.updates = 0
        self._in_place = in_place
        # Looked up once: going through all modules takes longer than an update.
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self._weights.items()}

    def decay_at(self, update: int) -> float:
        """Return the decay of the given update, counted from 1; the first one keeps a tenth of the initial weights."""
        return min(self.decay, update / (update + 9))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's weights."""
        self.updates += 1
        weights = [p.detach() for p in self._weights.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.decay_at(self.updates))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights, and its own back afterwards, bit for bit.

        The two sets of tensors change places; nothing is copied and nothing is computed, unless they do so `in_place`.
        """
        if self._in_place:
            self._exchange()
            try:
                yield
            finally:
                self._exchange()
            return
        own = {name: p.data for name, p in self._weights.items()}
        for name, p in self._weights.items():
            p.data = self.average[name]
        try:
            yield
        finally:
            for name, p in self._weights.items():
                p.data = own[name]

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self._weights.items():
            own = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the average, the decay and the number of updates."""
        return {"average": dict(self.average), "decay": self.decay, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises
        ------
        UserError
            If the weights are not those of this model.
        """
        average: dict[str, Tensor] = state["average"]
        shapes = {name: tuple(value.shape) for name, value in self.average.items()}
        if {name: tuple(value.shape) for name, value in average.items()} != shapes:
            raise UserError(
                "the checkpoint's averaged weights are of another model; expected the names and shapes of this one."
            )
        for name, value in self.average.items():
            value.copy_(average[name])
        self.updates = int(state["updates"])
