"""Saving while a run trains: when it is due, written beside the training, and keeping the last few."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sedd import checkpoint
from sedd.config import RunConfig
from sedd.training.parallel import Ranks, whole


class Saver:
    """Saves the state of a run. Every process must make every call: divided weights are made whole by all of them.

    Parameters
    ----------
    config
        Says where, when and how many are kept.
    ranks
        The processes of the run, the first of which writes.
    divided
        Whether they hold parts of the weights.
    state
        Asked for what to save, on every process.
    step
        At which the run starts.
    """

    def __init__(
        self, config: RunConfig, ranks: Ranks, *, divided: bool, state: Callable[[], dict[str, Any]], step: int
    ) -> None:
        self._directory = Path(config.checkpoint_dir)
        self._every_steps, self._every_seconds = config.checkpoint_interval()
        self._keep = config.keep_checkpoints
        self._ranks = ranks
        self._divided = divided
        self._state = state
        self._last = (step, time.monotonic())
        self._writer = CheckpointWriter()

    def due(self, step: int) -> bool:
        """Return whether this process finds that a step checkpoint is to be saved; processes may differ in it.

        Raises
        ------
        OSError
            If an earlier write has failed.
        """
        self._writer.check()
        last_step, last_time = self._last
        return (self._every_steps is not None and step - last_step >= self._every_steps) or (
            self._every_seconds is not None and time.monotonic() - last_time >= self._every_seconds
        )

    def save(self, *names: str, drop: list[Path] | None = None) -> None:
        """Start to write the state under each of `names`; then delete `drop`."""
        state = self._state()
        if self._ranks.first or self._divided:
            state = snapshot(state, keep=self._ranks.first)
        if self._ranks.first:
            self._writer.submit([self._directory / name for name in names], state, drop=drop)

    def save_step(self, step: int) -> Path:
        """Start to write `step_N.pt`, and delete the oldest of these files beyond those to keep."""
        self._last = (step, time.monotonic())
        path = self._directory / f"step_{step}.pt"
        others: list[Path] = []
        if self._ranks.first:
            self._writer.wait()  # which may still write one and delete another
            others = [p for p in checkpoint.numbered_checkpoints(self._directory, "step") if p != path]
        self.save(path.name, drop=others[: max(0, len(others) - (self._keep - 1))])
        return path

    def wait(self) -> None:
        """Return when nothing is being written."""
        self._writer.wait()


class CheckpointWriter:
    """Writes checkpoints in a thread, beside the training; one write at a time.

    The state handed to `submit` must not change afterwards (`snapshot` copies it). An error of a write is raised by the
    next `submit`, `check` or `wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, paths: list[Path], state: dict[str, Any], *, drop: list[Path] | None = None) -> None:
        """Write `state` to each of `paths`, then delete `drop`."""
        self.wait()

        def work() -> None:
            try:
                for path in paths:
                    checkpoint.save(path, state)
                for path in drop or []:
                    path.unlink(missing_ok=True)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="sedd-checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that has failed, without waiting for one that is under way."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def snapshot(value: Any, *, keep: bool = True) -> Any:
    """Return a copy of nested containers whose tensors lie in memory of their own on the CPU.

    Parameters
    ----------
    value
        May hold tensors that are divided among processes. They are made whole, for which every process must call this.
    keep
        Whether this process wants the copy; else tensors become None.
    """
    if isinstance(value, torch.Tensor):
        full = whole(value.detach())
        return full.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {k: snapshot(v, keep=keep) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [snapshot(v, keep=keep) for v in value]
    return value
