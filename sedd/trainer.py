"""`SEDDTrainer`: the training loop, on Accelerate.

Everything random in a step is a function of (seed, step, rank), and the cells and masks of an epoch are a function of
(seed, epoch): so a run that is stopped anywhere and resumed ends with the weights of one that was not.

    fit ─ prepare: panel, learner, loader, validator
        └ per epoch: learner.step on groups of batches, saved when due ─ validator.run ─ best.pt, epoch_N.pt, curves
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sedd import checkpoint
from sedd.config import TrainConfig
from sedd.io.loader import CellLoader
from sedd.model import SEDDTransformer
from sedd.training.directory import RunDirectory
from sedd.training.dry_run import forecast
from sedd.training.failures import check_finite, explained
from sedd.training.heartbeat import heartbeat
from sedd.training.learner import Learner, Outcome
from sedd.training.logs import Progress, Tracker, resolve_logger
from sedd.training.parallel import Ranks, from_first, make_accelerator, on_gpu, together
from sedd.training.resuming import settled, state_to_resume
from sedd.training.run_data import Panel, prepare_panel
from sedd.training.saving import Saver
from sedd.training.stopping import StopRequest, TrainingInterrupted
from sedd.training.validation import Validator

_TIMES = ("seconds", "wait", "val_seconds", "val_wait")  # of the sums over an epoch


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
        val_seconds, cells_per_s (of training), wait_share (of both) and the recovery of hidden genes.
    epoch, step : int
        Epochs finished and optimizer steps done.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.history: list[dict[str, Any]] = []
        self.directory = RunDirectory(config.run.checkpoint_dir)
        self.epoch = 0
        self.step = 0
        self.best_loss = math.inf
        self._sums = dict.fromkeys(("loss", "cells", *_TIMES), 0.0)  # of the epoch under way
        self._unsettled: Callable[[], None] | None = None

    @property
    def model(self) -> SEDDTransformer:
        """Return the network of the run, once `fit` has made it."""
        return self._learner.model

    @property
    def data_path(self) -> str:
        """Return where the cells are: the input, or the store that was made of several, once `fit` has opened it."""
        paths = self.config.data.paths
        return paths[0] if len(paths) == 1 else self._panel.store.path

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
        self.accelerator = make_accelerator(self.config.optim.mixed_precision)
        with contextlib.ExitStack() as stack:
            stack.enter_context(heartbeat(self.accelerator.process_index, self.accelerator.num_processes))
            self._stop = stack.enter_context(StopRequest())
            with self._stop.at_once():
                resumed = self._state_to_resume()
                self._panel = self._prepare(resumed)
            stack.callback(self._panel.store.close)
            n_cells = self._panel.train_cells.n_cells // self.accelerator.num_processes
            self.config = settled(self.config, resumed, on_gpu=on_gpu(self.accelerator), n_cells=n_cells)
            stack.enter_context(explained(self.config, lambda: self.step, self._largest_batch))
            self._build(resumed)
            fresh, resumed = resumed is None, None  # its tensors would be in memory as long as the run is
            stack.callback(self._loader.close)
            stack.callback(self._validator.close)
            if run.dry_run:
                step = functools.partial(self._learner.step, step=self.step, epoch=self.epoch)
                self.accelerator.print(forecast(self.config, self._panel, self.model, self._loader, lambda group: step(group).read()))
                return self.history
            together(self.accelerator, functools.partial(self._open_directory, stack, fresh=fresh))
            self._ranks = Ranks(self.accelerator)
            divided = self.accelerator.is_fsdp2
            self._saver = Saver(run, self._ranks, divided=divided, state=self.state, step=self.step)
            stack.callback(self._saver.wait)
            tracker = Tracker(self.config, self.directory, step=self.step, main=self._ranks.first)
            self._tracker = stack.enter_context(tracker)
            while self.epoch < self.config.optim.epochs_of(len(self._loader)) and not self._stopped_improving():
                self._train_epoch()
                self._finish_epoch()
            self._saver.save("final.pt")
            self._saver.wait()
            self.accelerator.wait_for_everyone()
        return self.history

    def _state_to_resume(self) -> dict[str, Any] | None:
        """Return the state to resume, of the checkpoint that the first rank has chosen: another might find others, or choose otherwise."""
        found: list[tuple[Path, dict[str, Any]] | None] = []

        def choose() -> Path | None:
            found.append(state_to_resume(self.config, self.directory) if self.accelerator.is_main_process else None)
            return found[0][0] if found[0] else None

        path = together(self.accelerator, choose)[0]
        if path is not None:
            together(self.accelerator, lambda: None if found[0] else found.insert(0, (path, checkpoint.load(path))))
        return found[0][1] if found[0] else None

    def _open_directory(self, stack: contextlib.ExitStack, *, fresh: bool) -> None:
        """Have the first rank make the directory of the run its own until the end."""
        if self.accelerator.is_main_process:
            stack.enter_context(self.directory.only_writer())
            self.directory.create(self.config.to_flat(), fresh=fresh)
            self.directory.rewind_metrics(self.step)

    def _prepare(self, resumed: dict[str, Any] | None) -> Panel:
        """Return the panel, converted and counted by the first rank, whose errors reach every rank; the others open the store alone."""
        panels: list[Panel] = []

        def prepare() -> None:
            panels.append(prepare_panel(self.config, resumed))
            _ = panels[0].cells_digest  # now, as the store may grow while the run goes on

        together(self.accelerator, prepare if self.accelerator.is_main_process else lambda: None)
        if resumed is None:
            return from_first(self.accelerator, panels[0] if panels else None)
        if not panels:  # what was learned from the cells is in the checkpoint, which every rank has read
            panels.append(prepare_panel(self.config, resumed))
        return panels[0]

    def _build(self, resumed: dict[str, Any] | None) -> None:
        config, panel = self.config, self._panel
        self._learner = Learner(config, panel, self.accelerator, resumed)
        self._loader = self._make_loader()
        self._validator = Validator(config, panel, self.accelerator, self._learner.noise, self._learner.graph)
        if resumed is None:
            return
        self.epoch, self.step = resumed["epoch"], resumed["step"]
        self.best_loss = resumed["best_loss"] if resumed["best_loss"] is not None else math.inf
        self.history = resumed["history"]
        # The first rank carries the sums of all, the others start from nothing; times are means over ranks.
        first = self.accelerator.is_main_process
        self._sums |= {name: value if first or name in _TIMES else 0.0 for name, value in resumed["sums"].items()}
        self._loader.load_state_dict(resumed["loader"])

    def _make_loader(self) -> CellLoader:
        config, panel, learner = self.config, self._panel, self._learner
        return CellLoader(
            panel.store,
            batch_size=config.batch_size,
            split=panel.train_cells,
            genes=panel.genes,
            binning=panel.binning,
            mask=None if learner.masks or config.model.graph == "uniform" else config.model.objective,
            mask_ratio=config.model.mask_ratio,
            noise=learner.noise.mask_probability,
            labels=panel.labels,
            seed=config.run.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            threads=config.data.loader_threads,
            memory_budget=config.data.memory_budget,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _largest_batch(self) -> int | None:
        built = hasattr(self, "_learner")  # memory can run out before
        return self._learner.largest_batch(self.epoch) if built else None

    # -- the loop ------------------------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        """Train through the rest of the epoch under way: all of it, or what a checkpoint left to do."""
        if self._loader.epoch != self.epoch:
            self._loader.set_epoch(self.epoch)
        config = self.config.optim
        bar = Progress(
            self.epoch,
            config.epochs_of(len(self._loader)),
            self._loader.state_dict()["position"],
            self._loader.n_cells,
            nelbo=self.history[-1]["val_nelbo"] if self.history else None,
            shown=self.config.run.progress and self.accelerator.is_main_process,
        )
        batches = iter(self._loader)
        start, waited = time.monotonic(), self._loader.wait_seconds
        with bar:
            while group := list(islice(batches, config.gradient_accumulation_steps)):
                outcome = self._learner.step(group, step=self.step, epoch=self.epoch)
                self.step += 1
                self._settle()  # the step before, while this one is at work
                now, wait = time.monotonic(), self._loader.wait_seconds
                self._unsettled = functools.partial(self._count, bar, outcome, self.step, self._learner.learning_rate, now - start, wait - waited)
                start, waited = now, wait
                self._save_or_stop()
            self._settle()

    def _settle(self) -> None:
        """Count the step that was taken last, if it was not yet; whatever is saved or said comes after this."""
        count, self._unsettled = self._unsettled, None
        if count is not None:
            count()

    def _count(self, bar: Progress, outcome: Outcome, step: int, rate: float, seconds: float, wait: float) -> None:
        """Add a step to the sums of this rank's cells; they are added up over ranks when an epoch ends or its state is saved."""
        per_cell, n_cells = outcome.read()
        self._sums["loss"] += per_cell * n_cells
        self._sums["cells"] += n_cells
        self._sums["seconds"] += seconds
        self._sums["wait"] += wait
        bar.step(per_cell, n_cells * self.accelerator.num_processes, seconds, wait)
        self._tracker.step(step, per_cell, rate, bar)

    def _finish_epoch(self) -> None:
        """Validate, write the epoch's line and its checkpoints."""
        began, waited = time.monotonic(), self._validator.wait_seconds
        with self._learner.averaged_model() as model:
            # Ranks validate different numbers of batches, so each looks at its own signal only, unless they divide the weights.
            in_step = self._ranks if self.accelerator.is_fsdp2 else None
            found = self._validator.run(model, stop=lambda: self._stop.signal_number != 0, in_step=in_step)
        (signal_number,) = self._ranks.largest(self._stop.signal_number)
        if signal_number:  # resumed from here: the epoch's training is not done again
            self._interrupt(signal_number)
        self._sums["val_seconds"] += time.monotonic() - began
        self._sums["val_wait"] += self._validator.wait_seconds - waited
        sums = self._summed_over_ranks()
        validation = self._validator.summary(found, self._ranks)
        nats = validation["val_nelbo"]  # the weights after an epoch's last step were in no loss yet
        check_finite(nats, f"bound on the validation cells is {nats} after epoch {self.epoch + 1} (step {self.step})")
        self.epoch += 1
        entry: dict[str, Any] = {
            "epoch": self.epoch,
            "of_epochs": self.config.optim.epochs_of(len(self._loader)),
            "n_vars": len(self._panel.genes),
            "step": self.step,
            "train_loss": sums["loss"] / sums["cells"],
            **validation,
            "learning_rate": self._learner.learning_rate,
            "seconds": sums["seconds"],
            "cells_per_s": sums["cells"] / max(sums["seconds"], 1e-9),
            "val_seconds": sums["val_seconds"],
            "wait_share": (sums["wait"] + sums["val_wait"]) / max(sums["seconds"] + sums["val_seconds"], 1e-9),
        }
        self.history.append(entry)
        improved = nats < self.best_loss
        self.best_loss = min(self.best_loss, nats)
        self._sums = dict.fromkeys(sums, 0.0)
        self._loader.set_epoch(self.epoch)
        names = [*(["best.pt"] if improved else []), *([f"epoch_{self.epoch}.pt"] if self.epoch % 10 == 0 else [])]
        if names:
            self._saver.save(*names)
        if not self.accelerator.is_main_process:
            return
        self.directory.write_history(self.history)
        self._tracker.epoch(entry)
        if not self.config.run.progress:
            return
        tqdm.write(
            f"epoch {self.epoch}: train {entry['train_loss']:.1f}, validation {nats:.1f} ± {1.96 * validation['val_nelbo_se']:.1f} nats per cell"
            f"{' (best)' if improved else ''}; {entry['cells_per_s']:.0f} cells/s, {entry['wait_share']:.1%} waiting for data, "
            f"{entry['val_seconds']:.1f} s of {entry['seconds'] + entry['val_seconds']:.1f} validating",
            file=sys.stderr,
        )

    def _stopped_improving(self) -> bool:
        patience = self.config.run.early_stopping
        if not patience or len(self.history) <= patience:
            return False
        before = min(entry["val_nelbo"] for entry in self.history[:-patience])
        return min(entry["val_nelbo"] for entry in self.history[-patience:]) >= before

    # -- saving and stopping ---------------------------------------------------------------------------------------

    def _summed_over_ranks(self) -> dict[str, float]:
        """Return the sums of the epoch under way, of all ranks; times are means. Every rank must call this."""
        values = torch.tensor(list(self._sums.values()), dtype=torch.float64)
        sums = dict(zip(self._sums, self._ranks.total(values).tolist(), strict=True))
        return {name: value / self._ranks.number if name in _TIMES else value for name, value in sums.items()}

    def state(self) -> dict[str, Any]:
        """Return everything that resumes the run or uses the model, as tensors and plain containers. Every rank must call this."""
        return {
            "sedd_format": checkpoint.FORMAT,
            **self._learner.state(),
            # The generators are seeded anew from these at every step, so they are the whole random state.
            "random": {"seed": self.config.run.seed, "step": self.step},
            "epoch": self.epoch,
            "step": self.step,
            "loader": self._loader.state_dict(),
            "sums": self._summed_over_ranks(),
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "history": [dict(entry) for entry in self.history],
            "args": self.config.to_flat(),
            **(self._panel.state() if self._ranks.first else {}),  # the first one writes it
        }

    def _save_or_stop(self) -> None:
        """Stop if a rank was asked to, save if one finds it due; every rank does so at the same step."""
        signal_number, due = self._ranks.largest(self._stop.signal_number, int(self._saver.due(self.step)))
        if signal_number or due:
            self._settle()
        if signal_number:
            self._interrupt(signal_number)
        if due:
            self._saver.save_step(self.step)

    def _interrupt(self, signal_number: int) -> None:
        path = self._saver.save_step(self.step)
        self._saver.wait()
        self.accelerator.wait_for_everyone()
        raise TrainingInterrupted(
            f"stopped by signal {signal_number} at step {self.step}; saved {path}. Continue with --resume auto.", signal_number
        )
