"""One optimizer step: the loss of a group of batches, its gradients, the weights and their running average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator

from sedd.config import TrainConfig
from sedd.graph import make_graph
from sedd.io.loading.batch import Batch
from sedd.kernels.random_bits import stream_key
from sedd.loss import diffusion_loss
from sedd.model import PER_GENE, SEDDTransformer
from sedd.noise import make_noise
from sedd.training.ema import EMA
from sedd.training.failures import check_finite, largest_batch
from sedd.training.masking import device_masks, drop_conditions, hide_labels
from sedd.training.parallel import divide_like, divide_optimizer_state, ends_gathered, whole
from sedd.training.resuming import check_same_groups, check_same_vectors
from sedd.training.run_data import Panel

GENE_VECTORS, GENE_RATE = "backbone.genes.weight", 10.0
NETWORK_RATE, NETWORK_WIDTH = 5.0, 128
"""How many times the learning rate the vectors of genes get, and the network up to this width; a wider one gets less in proportion to its
width (Yang et al. 2022, arXiv:2203.03466). The laws of genes get it once: they start at a fit. docs/tried.md has the trials."""
LABEL_RATE = 20.0
"""The same of the laws of labels: they start at zero, and would follow a network that changes for the sake of thousands of genes too slowly."""


class Outcome:
    """What a step came to, copied from the device while it works on: whoever reads it a step later does not make it wait.

    Parameters
    ----------
    seen : (2,)
        The sum of the losses of the cells and the norm of the gradient, on the device.
    group
        The batches of the step; they are kept until it was read, as their memory, which the loader fills again once nobody holds it, may still
        be on its way to the device.
    place
        Of the step, for messages.
    check_norm
        Whether a norm that is not finite is a failure.
    """

    def __init__(self, seen: torch.Tensor, group: list[Batch], place: str, *, check_norm: bool) -> None:
        self._group, self._place, self._check_norm = group, place, check_norm
        self._n_cells = sum(len(batch.cell) for batch in group)
        self._seen = seen.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if seen.device.type == "cuda" else None
        if self._copied is not None:
            self._copied.record()
        elif seen.device.type != "cpu":
            self._seen = seen  # read when it is asked for

    def read(self) -> tuple[float, int]:
        """Return the mean loss in nats per cell and the number of cells, of this process.

        Raises
        ------
        FloatingPointError
            If the loss or its gradients were not finite; the weights are then spoilt, and are not to be saved.
        """
        if self._copied is not None:
            self._copied.synchronize()
        total, norm = self._seen.tolist()
        self._group = []
        mean = total / self._n_cells
        check_finite(mean, f"loss is {mean} {self._place}")
        if self._check_norm:
            check_finite(norm, f"gradient's norm is {norm} {self._place}")
        return mean, self._n_cells


class Learner:
    """The network of a run and what fits it.

    Parameters
    ----------
    config, panel, accelerator
        Of the run.
    resumed
        The checkpoint to resume from, if any.

    Attributes
    ----------
    model
        The network itself, without wrappers.
    ema
        Its averaged weights, or None.
    graph, noise
        The diffusion that it is trained for.
    masks
        What draws masks beside the network, or None where the loader does.

    Raises
    ------
    UserError
        If the checkpoint is of a network with other gene vectors, or of a version of sedd with other rates.
    """

    def __init__(
        self, config: TrainConfig, panel: Panel, accelerator: Accelerator, resumed: dict[str, Any] | None = None
    ) -> None:
        self._config, self._panel, self._accelerator = config, panel, accelerator
        self._batch: Batch | None = None  # the last one that was trained on
        self.noise = make_noise(config.model.noise)
        self.graph = make_graph(config.model.graph, panel.binning.n_bins)
        self.masks = device_masks(config, accelerator.device, self.noise)
        torch.manual_seed(config.run.seed)
        self.model = panel.build_model(config.model)
        if resumed is not None:
            check_same_vectors(resumed, self.model, config.model.gene_embeddings)
            self.model.load_state_dict(resumed["model"])
        optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, config.optim.weight_decay),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
        )
        # An epoch has two sizes of batch, so that shapes are static; where weights are divided they are gathered anew for each step.
        graphs = accelerator.device.type == "cuda" and not accelerator.is_fsdp2
        module = self.model.compiled(accelerator.device, graphs=graphs) if config.optim.compile else self.model
        self._module, self._optimizer = accelerator.prepare(module, optimizer)
        self._parameters = list(self._module.parameters())
        warmup = config.optim.warmup_steps
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [_rate(group["faster"], warmup) for group in optimizer.param_groups]
        )
        # Of the weights where and as the optimizer has them: on the device, and divided if they are.
        decay = config.optim.ema_decay
        self.ema = EMA(self.model, decay=decay, in_place=accelerator.is_fsdp2) if decay else None
        if resumed is not None:
            self._load_state(resumed)

    @property
    def learning_rate(self) -> float:
        """Return the rate of the next step, that of the laws of genes."""
        return self._config.learning_rate * _rate(1.0, self._config.optim.warmup_steps)(self._scheduler.last_epoch)

    def step(self, group: list[Batch], *, step: int, epoch: int) -> Outcome:
        """Take one optimizer step, and wait for none of it.

        Parameters
        ----------
        group
            The batches whose gradients are added up.
        step, epoch
            Their numbers, counted from 0: random draws belong to them.

        Returns
        -------
        outcome
            To be read before anything of the weights is saved.
        """
        accelerator, self._batch = self._accelerator, group[0]
        n_cells = sum(len(batch.cell) for batch in group)
        total = torch.zeros((), device=accelerator.device)
        # One generator state per (seed, step, rank): a resumed run draws what an undisturbed one would have drawn.
        torch.manual_seed(stream_key(self._config.run.seed, step, accelerator.process_index))
        for i, batch in enumerate(group):
            last = i == len(group) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self._module):
                loss, per_cell = self._loss(batch, self._module, epoch)
                accelerator.backward(loss * (len(batch.cell) / n_cells))
            total += per_cell.sum()
        # Without clipping only the norm is of interest: infinity leaves the gradients unchanged.
        norm = whole(accelerator.clip_grad_norm_(self._parameters, self._config.optim.grad_clip or math.inf))
        place = f"at step {step} of epoch {epoch + 1} (cells {group[0].cell[:4].tolist()} ...)"
        # Those in fp16 whose gradients overflow are left out by the scaler.
        outcome = Outcome(torch.stack([total, norm.to(total)]), group, place, check_norm=accelerator.scaler is None)
        self._optimizer.step()
        # A fused optimizer leaves a step in fp16 out on the device and says so to nobody; fp16 alone waits for it.
        if accelerator.scaler is None or math.isfinite(norm):
            self._scheduler.step()
            if self.ema is not None:
                self.ema.update()
        self._optimizer.zero_grad(set_to_none=True)
        return outcome

    def _loss(self, batch: Batch, module: torch.nn.Module, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        config, device = self._config.model, self._accelerator.device
        there = batch.to(device)
        condition, library = self._panel.conditions(there, config)
        labels = condition if self.model.config["answer_labels"] else None
        if config.condition_dropout:
            condition, library = drop_conditions(condition, library, config.condition_dropout)
        weight = None
        if labels is not None and condition is not None:
            share = config.mask_ratio if config.objective == "masked" else self.noise.mask_probability(there.t.double())
            condition, weight = hide_labels(condition, torch.as_tensor(share, device=device).expand(len(condition)))
        masked = self.masks.of(batch, epoch, there.cell) if self.masks else there.masked
        if self._config.optim.compile:
            torch.compiler.cudagraph_mark_step_begin()  # what the last pass returned was read, and may be overwritten
        with self._accelerator.autocast():  # which accelerate leaves to its own casts where weights are divided
            return diffusion_loss(
                module,
                self.graph,
                self.noise,
                there.tokens,
                masked,
                there.t,
                condition=condition,
                library=library,
                labels=labels,
                label_weight=weight,
                missing=None if self._panel.lacking is None else self._panel.lacking.of(there),
                objective=config.objective,
            )

    def largest_batch(self, epoch: int) -> int | None:
        """Return how many cells a step has room for, tried on this process alone; half of them where weights are divided."""
        if self._batch is None:  # while the model was built
            return None
        if self._accelerator.is_fsdp2:
            return self._config.batch_size // 2 or None
        self._optimizer.zero_grad(set_to_none=True)
        moments = () if self._optimizer.state else [torch.empty_like(p) for p in self.model.parameters() for _ in range(2)]
        found = largest_batch(self._batch, lambda batch: self._loss(batch, self.model, epoch)[0].backward())
        del moments  # the first step makes them after its gradients
        return found

    @contextlib.contextmanager
    def averaged_model(self) -> Iterator[SEDDTransformer]:
        """Return the model with its averaged weights. Divided ones stay so, and every process must then make every call of the model."""
        with contextlib.ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.applied())
            if self._accelerator.is_fsdp2:
                stack.enter_context(ends_gathered(self._module))
            yield self.model

    def state(self) -> dict[str, Any]:
        """Return the part of a checkpoint that belongs to the network; divided weights are still divided in it."""
        scaler = self._accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "model_config": self.model.config,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        """Take over all but the weights: they are divided, if at all, after they were loaded."""
        if self.ema is not None and state["ema"] is not None:
            average = {k: divide_like(v, self.ema.average.get(k, v)) for k, v in state["ema"]["average"].items()}
            self.ema.load_state_dict({**state["ema"], "average": average})
        check_same_groups(state["optimizer"], self._optimizer)
        self._optimizer.load_state_dict(divide_optimizer_state(state["optimizer"], self._optimizer))
        self._scheduler.load_state_dict(state["scheduler"])
        # The rate is that of the settings: who resumes a run that diverged lowers it.
        self._scheduler.base_lrs = [self._config.learning_rate] * len(self._scheduler.base_lrs)
        for group, factor in zip(self._optimizer.param_groups, self._scheduler.lr_lambdas, strict=True):
            group["lr"] = self._config.learning_rate * factor(self._scheduler.last_epoch)
        if self._accelerator.scaler is not None and state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])


def _rate(faster: float, warmup: int) -> Callable[[int], float]:
    return lambda step: faster * min(1.0, (step + 1) / max(1, warmup))


def _parameter_groups(model: SEDDTransformer, weight_decay: float) -> list[dict[str, Any]]:
    """Return the weights by how they are fitted, each group with how many times the learning rate it gets as `faster`.

    Weight decay is on matrices only, not on biases, norms and what belongs to single genes: decay would make rare counts frequent.
    """
    narrower = min(1.0, NETWORK_WIDTH / model.config["hidden_dim"])
    rates = {"head.": 1.0, GENE_VECTORS: GENE_RATE, "labels.": LABEL_RATE * narrower}
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            faster = next((rate for start, rate in rates.items() if name.startswith(start)), NETWORK_RATE * narrower)
            decay = weight_decay if p.ndim >= 2 and name not in PER_GENE else 0.0
            groups.setdefault((faster, decay), []).append(p)
    return [{"params": own, "weight_decay": decay, "faster": faster} for (faster, decay), own in groups.items()]
