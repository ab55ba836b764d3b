"""One optimizer step: hide genes, score the network on them, follow the gradient, move the average."""

from __future__ import annotations

import contextlib
import math

import torch
from accelerate import Accelerator

from sedd.checkpoint import whole
from sedd.config import TrainConfig
from sedd.graph import Graph
from sedd.io.loading.batch import Batch
from sedd.kernels.random_bits import stream_key
from sedd.loss import diffusion_loss
from sedd.model import SEDDTransformer
from sedd.noise import Noise
from sedd.training.ema import EMA
from sedd.training.failures import largest_batch
from sedd.training.masking import DeviceMasks, drop_conditions
from sedd.training.run_data import Panel


class TrainingStep:
    """Takes the steps of a run.

    Parameters
    ----------
    config, accelerator, panel, noise, graph
        Of the run.
    masks
        What hides genes on the device; None if the loader does.
    model
        The network itself.
    module, optimizer
        As Accelerate prepared them.
    ema
        The average that follows the weights, if there is one.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        panel: Panel,
        noise: Noise,
        graph: Graph,
        masks: DeviceMasks | None,
        model: SEDDTransformer,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
    ) -> None:
        self._config, self._accelerator, self._panel = config, accelerator, panel
        self._noise, self._graph, self._masks = noise, graph, masks
        self._model, self._module, self._optimizer, self._ema = model, module, optimizer, ema
        self._batch: Batch | None = None  # the last one that was trained on

    def take(self, group: list[Batch], step: int, epoch: int) -> tuple[float, int]:
        """Take one step on the batches of `group`.

        Parameters
        ----------
        step, epoch
            Their numbers, which name the random draws.

        Returns
        -------
        loss : float
            Mean, in nats per cell.
        n_cells : int

        Raises
        ------
        FloatingPointError
            If the loss or the gradient is not finite; the weights are as before.
        """
        accelerator, self._batch = self._accelerator, group[0]
        n_cells = sum(len(batch.cell) for batch in group)
        total = torch.zeros((), device=accelerator.device)
        # One generator state per (seed, step, rank): a resumed run draws what an undisturbed one would have drawn.
        torch.manual_seed(stream_key(self._config.run.seed, step, accelerator.process_index))
        for i, batch in enumerate(group):
            last = i == len(group) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self._module):
                loss, per_cell = self._loss(batch, epoch, self._module)
                accelerator.backward(loss * (len(batch.cell) / n_cells))
            total += per_cell.sum()
        # Without clipping only the norm is of interest: infinity leaves the gradients as they are.
        norm = whole(accelerator.clip_grad_norm_(self._module.parameters(), self._config.optim.grad_clip or math.inf))
        total, norm = torch.stack([total, norm.to(total)]).tolist()  # together: a step waits for a GPU once
        mean, place = total / n_cells, f"at step {step} of epoch {epoch + 1} (cells {group[0].cell[:4].tolist()} ...)"
        check_finite(mean, f"loss is {mean} {place}")
        if accelerator.scaler is None:  # steps in fp16 whose gradients overflow are left out by the scaler
            check_finite(norm, f"gradient's norm is {norm} {place}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update(self._model)
        return mean, n_cells

    def largest_batch(self) -> int | None:
        """How many cells a step has room for, tried on this process alone; half of them where weights are divided."""
        if self._batch is None:
            return None
        if self._accelerator.is_fsdp2:
            return self._config.batch_size // 2 or None
        self._optimizer.zero_grad(set_to_none=True)
        moments = () if self._optimizer.state else [torch.empty_like(p) for p in self._model.parameters() for _ in range(2)]
        found = largest_batch(self._batch, lambda batch: self._loss(batch, 0, self._model)[0].backward())
        del moments  # the first step makes them after its gradients
        return found

    def _loss(self, batch: Batch, epoch: int, module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        config, device = self._config.model, self._accelerator.device
        condition, library = self._panel.conditions(batch, config, device)
        if config.condition_dropout:
            condition, library = drop_conditions(condition, library, config.condition_dropout)
        masked = self._masks.of(batch, epoch, device) if self._masks else batch.masked
        with self._accelerator.autocast():  # which accelerate leaves to its own casts where weights are divided
            return diffusion_loss(
                module,
                self._graph,
                self._noise,
                batch.tokens.to(device, non_blocking=True),
                None if masked is None else masked.to(device, non_blocking=True),
                batch.t.to(device, non_blocking=True),
                condition=condition,
                library=library,
                objective=config.objective,
            )


def check_finite(value: float, found: str) -> None:
    """Stop a run whose numbers are no longer numbers.

    Parameters
    ----------
    found
        What it is and where, for the message.

    Raises
    ------
    FloatingPointError
        If `value` is not finite.
    """
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {found}; nothing was saved since the last checkpoint, which is whole. Continue with --resume auto and "
            "a lower --learning_rate."
        )
