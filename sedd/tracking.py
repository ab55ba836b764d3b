"""Where the curves of a run go: metrics.jsonl always, TensorBoard or Weights & Biases on request."""

from __future__ import annotations

import importlib.util
import os
import time
from types import TracebackType
from typing import Any

from accelerate import Accelerator

from sedd.config import TrainConfig
from sedd.errors import UserError
from sedd.progress import Progress
from sedd.run_directory import RunDirectory

_EVERY_S = 1.0  # a line of metrics.jsonl at most this often


class Tracker:
    """Context that logs steps and epochs from the main process.

    Parameters
    ----------
    accelerator, config, directory
        Of the run. `config.run.log_with` chooses TensorBoard (files under `checkpoint_dir/logs`), Weights & Biases
        (files under `checkpoint_dir/wandb`, sent by `wandb sync`, or at once with WANDB_MODE=online) or neither.

    Raises
    ------
    UserError
        If the chosen logger is not installed.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, directory: RunDirectory) -> None:
        self._accelerator = accelerator
        self._directory = directory
        self._last = 0.0
        self._backend: Any = None
        kind = resolve_logger(config.run.log_with)
        if not accelerator.is_main_process or kind == "none":
            return
        settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.to_flat().items()}
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._backend = SummaryWriter(str(directory.path / "logs"))
            self._backend.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()))
        else:
            import wandb

            os.environ.setdefault("WANDB_SILENT", "true")
            # Unless asked for, nothing leaves the machine, and a node without a network does not wait for one.
            mode = os.environ.get("WANDB_MODE", "offline")
            self._backend = wandb.init(
                project="sedd", name=directory.path.name, dir=str(directory.path), config=settings, mode=mode
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._backend is not None:
            getattr(self._backend, "close", getattr(self._backend, "finish", lambda: None))()

    def step(self, step: int, loss: float, learning_rate: float, progress: Progress) -> None:
        """Log an optimizer step; all but one a second are passed over."""
        now = time.monotonic()
        if not self._accelerator.is_main_process or now - self._last < _EVERY_S:
            return
        self._last = now
        speed = {"cells_per_s": progress.cells_per_s, "wait_share": progress.wait_share}
        self._write(step, {"loss": loss, "learning_rate": learning_rate, **speed})

    def epoch(self, entry: dict[str, Any]) -> None:
        """Log an epoch's summary."""
        self._write(entry["step"], {k: v for k, v in entry.items() if k != "step"})

    def _write(self, step: int, values: dict[str, Any]) -> None:
        self._directory.append_metrics({"step": step, "time": time.time(), **values})
        if hasattr(self._backend, "add_scalar"):
            for name, value in values.items():
                self._backend.add_scalar(name, value, step)
        elif self._backend is not None:
            self._backend.log(values, step=step)


def resolve_logger(log_with: str) -> str:
    """What `--log_with` means here: `auto` is tensorboard if it is installed, else none."""
    installed = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "wandb")}
    if log_with == "auto":
        return "tensorboard" if installed["tensorboard"] else "none"
    if log_with != "none" and not installed[log_with]:
        extra = {"tensorboard": "log", "wandb": "wandb"}[log_with]
        raise UserError(f"--log_with {log_with}: {log_with} is not installed; run `pip install 'sedd[{extra}]'`.")
    return log_with
