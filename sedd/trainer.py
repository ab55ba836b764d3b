"""`SEDDTrainer`: the training loop, on Accelerate.

Everything random in a step is a function of (seed, step, rank), and the cells and masks of an epoch are a function of
(seed, epoch): so a run that is stopped anywhere and continued ends with the weights of one that was not.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from sedd import checkpoint
from sedd.checkpoint import whole
from sedd.config import TrainConfig
from sedd.errors import UserError
from sedd.graph import make_graph
from sedd.io.loader import CellLoader
from sedd.io.loading.batch import Batch
from sedd.model import SEDDTransformer
from sedd.noise import make_noise
from sedd.training.directory import RunDirectory
from sedd.training.ema import EMA
from sedd.training.failures import explained, forecast
from sedd.training.logs import Progress, Tracker, resolve_logger
from sedd.training.masking import device_masks
from sedd.training.parallel import divide_like, divide_optimizer_state, make_accelerator, parameter_groups
from sedd.training.resuming import check_same_model, state_to_resume
from sedd.training.run_data import Panel, prepare_panel
from sedd.training.step import TrainingStep, check_finite
from sedd.training.stopping import StopRequest, TrainingInterrupted
from sedd.training.validation import Validator

_TIMES = ("seconds", "wait")  # of the sums over an epoch


class SEDDTrainer:
    """Trains a model as `config` says; `train.py` and `sedd train` are this class.

    Parameters
    ----------
    config
        All settings.

    Attributes
    ----------
    history : list of dict
        One entry per finished epoch: epoch, step, train_loss and val_nelbo in nats per cell, learning_rate, seconds,
        cells_per_s, wait_share and the recovery of hidden genes.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.history: list[dict[str, Any]] = []
        self.directory = RunDirectory(config.run.checkpoint_dir)
        self.epoch = 0  # epochs finished
        self.step = 0  # optimizer steps done
        self.best_loss = math.inf
        self._sums = {"loss": 0.0, "cells": 0.0, "seconds": 0.0, "wait": 0.0}  # of the epoch under way
        self._training_step: TrainingStep | None = None

    # -- from settings to a run that can start ---------------------------------------------------------------------

    def fit(self) -> list[dict[str, Any]]:
        """Train, validate and save until `num_epochs` epochs are done.

        Returns
        -------
        history

        Raises
        ------
        UserError
            On bad input, before anything is written.
        TrainingInterrupted
            After SIGTERM, SIGUSR1 or Ctrl-C, when the state has been saved.
        FloatingPointError
            If the loss is not finite; the last checkpoint stays as it was.
        MemoryError, OSError, ConnectionError
            If memory or the disk is full or another process has ended, with what to do; so does the checkpoint then.
        """
        run = self.config.run
        if run.num_threads:
            torch.set_num_threads(run.num_threads)
        resolve_logger(run.log_with)
        resumed = state_to_resume(run, self.directory)
        self.accelerator = make_accelerator(self.config.optim.mixed_precision)
        with contextlib.ExitStack() as stack:
            self._stop = stack.enter_context(StopRequest())
            with self._stop.at_once():
                panel = self._prepare(resumed)
            stack.callback(panel.store.close)
            stack.enter_context(explained(self.config, lambda: self.step, lambda: self._training_step.largest_batch() if self._training_step else None))
            self._build(panel, resumed)
            stack.callback(self._loader.close)
            stack.callback(self._validator.close)
            if run.dry_run:
                self.accelerator.print(forecast(self.config, panel, self.model, self._loader, self._take_step))
                return self.history
            if self.accelerator.is_main_process:
                self.directory.create(self.config.to_flat(), fresh=resumed is None)
                self.directory.rewind_metrics(self.step)
            self.accelerator.wait_for_everyone()
            self._writer = checkpoint.CheckpointWriter()
            stack.callback(self._writer.wait)
            self._tracker = stack.enter_context(Tracker(self.accelerator, self.config, self.directory))
            # Flags and sums go through the CPU, where they do not make the GPU wait.
            self._cpu_group = dist.new_group(backend="gloo") if self.accelerator.num_processes > 1 else None
            self._saved_at = (self.step, time.monotonic())
            while self.epoch < self.config.optim.num_epochs and not self._stopped_improving():
                self._train_epoch()
                self._finish_epoch()
            self._save([self.directory.path / "final.pt"], self._sums)
            self._writer.wait()
            self.accelerator.wait_for_everyone()
        return self.history

    def _prepare(self, resumed: dict[str, Any] | None) -> Panel:
        """Return the panel, converted and counted by the first rank while the others wait; its errors reach every rank."""
        error: list[str | None] = [None]
        panel = None
        if self.accelerator.is_main_process:
            try:
                panel = prepare_panel(self.config, resumed)
            except UserError as e:
                error[0] = str(e)
                if self.accelerator.num_processes == 1:
                    raise
        if self.accelerator.num_processes > 1:
            dist.broadcast_object_list(error)
            if error[0] is not None:
                raise UserError(error[0])
            if panel is None:
                panel = prepare_panel(self.config, resumed)  # quick: the store and its statistics are there
        assert panel is not None
        return panel

    def _build(self, panel: Panel, resumed: dict[str, Any] | None) -> None:
        config, accelerator = self.config, self.accelerator
        self._panel = panel
        self.noise = make_noise(config.model.noise)
        self.graph = make_graph(config.model.graph, panel.binning.n_bins)
        torch.manual_seed(config.run.seed)
        self.model = panel.build_model(config.model)
        if resumed is not None:
            check_same_model(resumed, self.model.config, config.model.graph)
            self.model.load_state_dict(resumed["model"])
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.optim.weight_decay),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            fused=accelerator.device.type == "cuda",
        )
        module = torch.compile(self.model, dynamic=False) if config.optim.compile else self.model
        self._module, self._optimizer = accelerator.prepare(module, optimizer)
        warmup = config.optim.warmup_steps
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / max(1, warmup)))
        # Of the weights where and as the optimizer has them: on the device, and divided if they are.
        self.ema = EMA(self.model, decay=config.optim.ema_decay) if config.optim.ema_decay else None
        masks = device_masks(config, accelerator.device, self.noise)
        self._training_step = TrainingStep(
            config, accelerator, panel, self.noise, self.graph, masks, self.model, self._module, self._optimizer, self.ema
        )
        self._loader = self._make_loader(loader_masks=masks is None and config.model.graph != "uniform")
        self._validator = Validator(config, panel, accelerator, self.noise, self.graph)
        if resumed is not None:
            self._restore(resumed)

    def _make_loader(self, *, loader_masks: bool) -> CellLoader:
        config, panel = self.config, self._panel
        return CellLoader(
            panel.store,
            batch_size=config.batch_size,
            split=panel.train_cells,
            genes=panel.genes,
            binning=panel.binning,
            mask=config.model.objective if loader_masks else None,
            mask_ratio=config.model.mask_ratio,
            noise=self.noise.mask_probability,
            labels=list(config.model.condition),
            seed=config.run.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            threads=config.data.loader_threads,
            memory_budget=config.data.memory_budget,
        )

    def _restore(self, state: dict[str, Any]) -> None:
        if self.ema is not None and state["ema"] is not None:
            average = {k: divide_like(v, self.ema.average.get(k, v)) for k, v in state["ema"]["average"].items()}
            self.ema.load_state_dict({**state["ema"], "average": average})
        self._optimizer.load_state_dict(divide_optimizer_state(state["optimizer"], self._optimizer))
        self._scheduler.load_state_dict(state["scheduler"])
        # The rate is that of the settings: who continues a run that diverged lowers it.
        self._scheduler.base_lrs = [self.config.learning_rate] * len(self._scheduler.base_lrs)
        for group, factor in zip(self._optimizer.param_groups, self._scheduler.lr_lambdas, strict=True):
            group["lr"] = self.config.learning_rate * factor(self._scheduler.last_epoch)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.best_loss = state["best_loss"] if state["best_loss"] is not None else math.inf
        self.history = state["history"]
        # The sums of all ranks go on in the first one's, the others start from nothing; times are means over ranks.
        first = self.accelerator.is_main_process
        self._sums = {name: value if first or name in _TIMES else 0.0 for name, value in state["sums"].items()}
        self._loader.load_state_dict(state["loader"])

    # -- the loop ------------------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """Train through the rest of the epoch under way: all of it, or what a checkpoint left to do."""
        if self._loader.epoch != self.epoch:
            self._loader.set_epoch(self.epoch)
        config, sums = self.config.optim, self._sums
        self._module.train()
        bar = Progress(
            self.epoch,
            config.num_epochs,
            self._loader.state_dict()["position"],
            self._loader.n_cells,
            nelbo=self.history[-1]["val_nelbo"] if self.history else None,
            shown=self.accelerator.is_main_process,
        )
        batches = iter(self._loader)
        began, waited = time.monotonic(), self._loader.wait_seconds
        with bar:
            while group := list(islice(batches, config.gradient_accumulation_steps)):
                per_cell, n_cells = self._take_step(group)
                now, wait = time.monotonic(), self._loader.wait_seconds
                # Sums of this rank's cells; they are added up over ranks when an epoch ends or its state is saved.
                sums["loss"] += per_cell * n_cells
                sums["cells"] += n_cells
                sums["seconds"] += now - began
                sums["wait"] += wait - waited
                bar.step(per_cell, n_cells * self.accelerator.num_processes, now - began, wait - waited)
                began, waited = now, wait
                self._tracker.step(self.step, per_cell, float(self._scheduler.get_last_lr()[0]), bar)
                self._save_if_due()

    def _take_step(self, group: list[Batch]) -> tuple[float, int]:
        """One step on the batches of `group`: the mean loss in nats per cell and the number of cells."""
        assert self._training_step is not None
        found = self._training_step.take(group, self.step, self.epoch)
        self._scheduler.step()
        self.step += 1
        return found

    def _finish_epoch(self) -> None:
        """Validate, write the epoch's line and its checkpoints."""
        with self._averaged_model() as model:
            # Ranks validate different numbers of batches, so within it each looks at its own signal only.
            found = self._validator.run(model, stop=lambda: self._stop.signal_number != 0)
        if self._agree_on_signal():  # continued from here: the epoch's training is not done again
            self._interrupt()
        sums = self._summed_over_ranks()
        validation = self._validator.summary(found, self._cpu_group)
        nats = validation["val_nelbo"]  # the weights after an epoch's last step were in no loss yet
        check_finite(nats, f"bound on the validation cells is {nats} after epoch {self.epoch + 1} (step {self.step})")
        self.epoch += 1
        entry: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": sums["loss"] / sums["cells"],
            **validation,
            "learning_rate": self._scheduler.get_last_lr()[0],
            "seconds": sums["seconds"],
            "cells_per_s": sums["cells"] / max(sums["seconds"], 1e-9),
            "wait_share": sums["wait"] / max(sums["seconds"], 1e-9),
        }
        self.history.append(entry)
        improved = entry["val_nelbo"] < self.best_loss
        self.best_loss = min(self.best_loss, entry["val_nelbo"])
        self._sums = dict.fromkeys(sums, 0.0)
        self._loader.set_epoch(self.epoch)
        paths = [self.directory.path / "best.pt"] if improved else []
        if self.epoch % 10 == 0:
            paths.append(self.directory.path / f"epoch_{self.epoch}.pt")
        if paths:
            self._save(paths, self._sums)
        if not self.accelerator.is_main_process:
            return
        self.directory.write_history(self.history)
        self._tracker.epoch(entry)
        tqdm.write(
            f"epoch {self.epoch}: train {entry['train_loss']:.1f}, validation {entry['val_nelbo']:.1f} nats per cell"
            f"{' (best)' if improved else ''}; {entry['cells_per_s']:.0f} cells/s, {entry['wait_share']:.1%} waiting for data",
            file=sys.stderr,
        )

    @contextlib.contextmanager
    def _averaged_model(self) -> Iterator[SEDDTransformer]:
        """Return the model with its averaged weights. Of divided ones a whole copy, which ranks can use independently."""
        if self.accelerator.is_fsdp2:
            weights = {**self.model.state_dict(), **({} if self.ema is None else self.ema.average)}
            copy = SEDDTransformer(**self.model.config).to(self.accelerator.device)
            copy.load_state_dict({name: whole(value.detach()) for name, value in weights.items()})
            yield copy
        elif self.ema is None:
            yield self.model
        else:
            with self.ema.applied(self.model):
                yield self.model

    def _stopped_improving(self) -> bool:
        patience = self.config.run.early_stopping
        if not patience or len(self.history) <= patience:
            return False
        before = min(entry["val_nelbo"] for entry in self.history[:-patience])
        return min(entry["val_nelbo"] for entry in self.history[-patience:]) >= before

    # -- saving and stopping ---------------------------------------------------------------------------------------

    def _summed_over_ranks(self) -> dict[str, float]:
        """Return the sums of the epoch under way, of all ranks; times are means. Every rank must call this."""
        if self.accelerator.num_processes == 1:
            return dict(self._sums)
        values = torch.tensor(list(self._sums.values()), dtype=torch.float64)
        dist.all_reduce(values, group=self._cpu_group)
        sums = dict(zip(self._sums, values.tolist(), strict=True))
        for name in _TIMES:
            sums[name] /= self.accelerator.num_processes
        return sums

    def state(self, sums: dict[str, float]) -> dict[str, Any]:
        """Everything that continues the run or uses the model, as tensors and plain containers.

        Parameters
        ----------
        sums
            Of the epoch under way, over all ranks: loss, cells, seconds, wait.
        """
        return {
            "sedd_format": checkpoint.FORMAT,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            # The generators are seeded anew from these at every step, so they are the whole random state.
            "random": {"seed": self.config.run.seed, "step": self.step},
            "epoch": self.epoch,
            "step": self.step,
            "loader": self._loader.state_dict(),
            "sums": sums,
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "history": [dict(entry) for entry in self.history],
            "args": self.config.to_flat(),
            "model_config": self.model.config,
            **self._panel.state(),
        }

    def _save(self, paths: list[Path], sums: dict[str, float], *, drop: list[Path] | None = None) -> None:
        """Have the first rank write the state; every rank must call this, as divided weights are made whole by all."""
        main = self.accelerator.is_main_process
        if main or self.accelerator.is_fsdp2:
            state = checkpoint.snapshot(self.state(sums), keep=main)
            if main:
                self._writer.submit(paths, state, drop=drop)

    def _save_if_due(self) -> None:
        every_steps, every_seconds = self.config.run.checkpoint_interval()
        step, at = self._saved_at
        due = (every_steps is not None and self.step - step >= every_steps) or (
            every_seconds is not None and time.monotonic() - at >= every_seconds
        )
        self._writer.check()
        signal_number, due = self._agree(self._stop.signal_number, due)
        self._stop.signal_number = signal_number
        if signal_number:
            self._interrupt()
        if due:
            self._saved_at = (self.step, time.monotonic())
            self._save_step()

    def _save_step(self) -> Path:
        """Save `step_N.pt`; every rank must call this."""
        path = self.directory.path / f"step_{self.step}.pt"
        others: list[Path] = []
        if self.accelerator.is_main_process:
            self._writer.wait()  # which may still write one and delete another
            others = [p for p in checkpoint.numbered_checkpoints(path.parent, "step") if p != path]
        keep = self.config.run.keep_checkpoints - 1
        self._save([path], self._summed_over_ranks(), drop=others[: max(0, len(others) - keep)])
        return path

    def _agree(self, signal_number: int, due: bool) -> tuple[int, bool]:
        """Return the largest of each over all ranks, so that every rank stops or saves at the same step."""
        if self._cpu_group is None:
            return signal_number, due
        flags = torch.tensor([signal_number, int(due)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._cpu_group)
        return int(flags[0]), bool(flags[1])

    def _agree_on_signal(self) -> bool:
        self._stop.signal_number, _ = self._agree(self._stop.signal_number, False)
        return self._stop.signal_number != 0

    def _interrupt(self) -> None:
        path = self._save_step()
        self._writer.wait()
        self.accelerator.wait_for_everyone()
        raise TrainingInterrupted(
            f"stopped by signal {self._stop.signal_number} at step {self.step}; saved {path}. Continue with --resume auto.",
            self._stop.signal_number,
        )
