"""Saving while a run trains: when it is due, written beside the training, and keeping the last few.

A state is copied and the copy is written by a thread, so that a step waits for the copy alone. While one is written another may wait for its turn;
of `best.pt` the newest does, and a checkpoint of every so many minutes is not due. So only checkpoints of every so many steps, each of which was
asked for, can hold up a run, where the disk is slower than they come: then all of its processes wait for the first, and a warning says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sedd import checkpoint
from sedd.config import RunConfig
from sedd.errors import warn_user
from sedd.training.parallel import Ranks, whole

_NOTED = 1.0  # seconds of waiting for the disk that are worth a warning


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
        self._waited, self._warned = 0.0, False

    def due(self, step: int) -> bool:
        """Return whether this process finds that a step checkpoint is to be saved; processes may differ in it.

        Raises
        ------
        OSError
            If an earlier write has failed.
        """
        self._writer.check()
        last_step, last_time = self._last
        if self._every_seconds is not None:
            return time.monotonic() - last_time >= self._every_seconds and not self._writer.busy
        return self._every_steps is not None and step - last_step >= self._every_steps

    def save(self, *names: str, drop: Callable[[], list[Path]] = list) -> None:
        """Start to write the state under each of `names`; then delete what `drop` finds."""
        paths = [self._directory / name for name in names]
        began = time.monotonic()
        self._writer.make_room(paths)  # before there is one more copy
        self._waited = time.monotonic() - began
        state = self._state()
        if self._ranks.first or self._divided:
            state = snapshot(state, keep=self._ranks.first)
        if self._ranks.first:
            self._writer.submit(paths, state, drop=drop)

    def save_step(self, step: int) -> Path:
        """Start to write `step_N.pt`, and delete the oldest of these files beyond those to keep."""
        self._last = (step, time.monotonic())
        path = self._directory / f"step_{step}.pt"

        def older() -> list[Path]:
            others = [p for p in checkpoint.numbered_checkpoints(self._directory, "step") if p != path]
            return others[: max(0, len(others) - (self._keep - 1))]

        self.save(path.name, drop=older)
        if self._waited > _NOTED and self._every_steps is not None and not self._warned:
            self._warned = True
            warn_user(
                f"training waited {self._waited:.0f} s at step {step} for earlier checkpoints to be written: every {self._every_steps} steps is more often "
                f"than the disk of {self._directory} can take them. Minutes (--checkpoint_every 10min) never wait; more steps wait less."
            )
        return path

    def wait(self) -> None:
        """Return when nothing is being written."""
        self._writer.wait()


class _Job:
    """What is to be written, by whoever takes it first: its thread, or in place of it a newer one."""

    def __init__(self, paths: list[Path], state: dict[str, Any], drop: Callable[[], list[Path]], after: threading.Thread | None) -> None:
        self.paths, self.state, self.drop, self.after = paths, state, drop, after
        self._taken = threading.Lock()

    def take(self) -> bool:
        return self._taken.acquire(blocking=False)

    @property
    def waits(self) -> bool:
        return not self._taken.locked()


class CheckpointWriter:
    """Writes checkpoints beside the training, in the order in which they come: one is written and one waits for its turn.

    The state handed to `submit` must not change afterwards (`snapshot` copies it). An error of a write is raised by the
    next call, and what waited then is not written. A second Ctrl-C may interrupt a call anywhere, so the caller shares no lock with a thread
    that it would have to give back.
    """

    def __init__(self) -> None:
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, paths: list[Path], state: dict[str, Any], *, drop: Callable[[], list[Path]] = list) -> None:
        """Write `state` to each of `paths`, then delete what `drop` finds; in place of what waits to be written to the same paths."""
        self.make_room(paths)
        if self._job is not None and self._job.waits and set(self._job.paths) <= set(paths) and self._job.take():
            self._job.state = {}
        self._job = _Job(paths, state, drop, self._thread)
        self._thread = threading.Thread(target=self._work, args=(self._job,), name="sedd-checkpoint")
        self._thread.start()

    def make_room(self, paths: list[Path]) -> None:
        """Return when nothing waits but what is to be written to `paths`, which a newer one replaces."""
        job = self._job
        before = None if job is None else job.after
        if job is not None and before is not None and job.waits and not set(job.paths) <= set(paths):
            before.join()
        self.check()

    def check(self) -> None:
        """Raise the error of a write that has failed, without waiting for one that is under way."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Return when nothing is being written and nothing waits."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def _work(self, job: _Job) -> None:
        if job.after is not None:
            job.after.join()
            job.after = None
        if not job.take():
            return
        try:
            if self._error is None:
                for path in job.paths:
                    checkpoint.save(path, job.state)
                for path in job.drop():
                    path.unlink(missing_ok=True)
        except BaseException as error:
            self._error = error
        finally:
            job.state = {}


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
