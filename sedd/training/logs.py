"""What a run says while it trains: the bar on the terminal, and curves in files.

metrics.jsonl always has the curves; Accelerate's trackers write them for TensorBoard or Weights & Biases on request.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import sys
import time
from types import TracebackType
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from tqdm.auto import tqdm

from sedd.config import TrainConfig
from sedd.errors import UserError
from sedd.training.directory import RunDirectory

_EVERY_S = 1.0  # a line of metrics.jsonl at most this often
_NO_CURVES = ("of_epochs", "n_vars")  # what an epoch's line has for those who read it alone
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells{postfix}"


class Tracker:
    """Context that logs steps and epochs from the main process.

    A resumed run has one value for each step. Of TensorBoard's curves what lies past the checkpoint is taken back; Weights &
    Biases are given the id that the run has had from its start, so that it stays one run there, and pass over steps they have.

    Parameters
    ----------
    config, directory
        Of the run. `config.run.log_with` chooses TensorBoard (files under `checkpoint_dir/logs`), Weights & Biases
        (files under `checkpoint_dir/wandb`, sent by `wandb sync`, or at once with WANDB_MODE=online) or neither.
    step
        At which it starts.
    main
        Whether this is the main process.

    Raises
    ------
    UserError
        If the chosen logger is not installed.
    """

    def __init__(self, config: TrainConfig, directory: RunDirectory, *, step: int, main: bool) -> None:
        self._main = main
        self._directory = directory
        self._last = 0.0
        self._tracker: GeneralTracker | None = None
        kind = resolve_logger(config.run.log_with)
        if not main or kind == "none":
            return
        settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.to_flat().items()}
        if kind == "tensorboard":
            # Readers drop what earlier files have from `purge_step` on: of a run that is made anew all of it.
            self._tracker = TensorBoardTracker("logs", directory.path, purge_step=step + 1 if step else 0)
            self._tracker.start()
            # Not as Accelerate stores settings: it makes a folder for them, which TensorBoard shows as a run of its own.
            self._tracker.tracker.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings.items()), step)
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        self._tracker = WandBTracker(
            "sedd",
            name=directory.path.name,
            id=directory.stored("wandb_id", secrets.token_hex(4)),
            resume="allow",
            dir=str(directory.path),
            config=settings,
            # Unless asked for, nothing leaves the machine, and a node without a network does not wait for one.
            mode=os.environ.get("WANDB_MODE", "offline"),
        )
        self._tracker.start()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._tracker is not None:
            self._tracker.finish()

    def step(self, step: int, loss: float, learning_rate: float, progress: Progress) -> None:
        """Log an optimizer step; all but one a second are passed over."""
        now = time.monotonic()
        if not self._main or now - self._last < _EVERY_S:
            return
        self._last = now
        speed = {"cells_per_s": progress.cells_per_s, "wait_share": progress.wait_share}
        self._write(step, {"loss": loss, "learning_rate": learning_rate, **speed})

    def epoch(self, entry: dict[str, Any]) -> None:
        """Log an epoch's summary."""
        self._write(entry["step"], {k: v for k, v in entry.items() if k != "step"})

    def _write(self, step: int, values: dict[str, Any]) -> None:
        self._directory.append_metrics({"step": step, "time": time.time(), **values})
        if self._tracker is not None:
            self._tracker.log({name: value for name, value in values.items() if name not in _NO_CURVES}, step=step)


def resolve_logger(log_with: str) -> str:
    """Return what `--log_with` means here: `auto` is tensorboard if it is installed, else none."""
    installed = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "wandb")}
    if log_with == "auto":
        return "tensorboard" if installed["tensorboard"] else "none"
    if log_with != "none" and not installed[log_with]:
        extra = {"tensorboard": "log", "wandb": "wandb"}[log_with]
        raise UserError(f"--log_with {log_with}: {log_with} is not installed; run `pip install 'sedd[{extra}]'`.")
    return log_with


class Progress:
    """A bar over the cells of an epoch, on standard error, and the speed since the bar appeared.

    Parameters
    ----------
    epoch, num_epochs
        The epoch under way, counted from 0, and how many there will be.
    done, n_cells
        Cells of the epoch that are done, and all of them, over all processes.
    nelbo
        The last validation's nats per cell, if there was one.
    shown
        Whether this process has a bar.

    Attributes
    ----------
    cells, seconds, wait
        Cells of all processes since the bar appeared, the time they took, and that of it spent waiting for data.
    """

    def __init__(
        self, epoch: int, num_epochs: int, done: int, n_cells: int, *, nelbo: float | None = None, shown: bool = True
    ) -> None:
        self.cells, self.seconds, self.wait = 0, 0.0, 0.0
        self._nelbo = nelbo
        self._left = n_cells - done + (num_epochs - epoch - 1) * n_cells
        self._bar = tqdm(
            total=n_cells,
            initial=done,
            desc=f"epoch {epoch + 1}/{num_epochs}",
            bar_format=_BAR,
            disable=not shown,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()

    @property
    def cells_per_s(self) -> float:
        """Cells a second over all processes."""
        return self.cells / max(self.seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for data."""
        return self.wait / max(self.seconds, 1e-9)

    def step(self, loss: float, cells: int, seconds: float, wait: float) -> None:
        """Count an optimizer step.

        Parameters
        ----------
        loss
            Its mean, in nats per cell.
        cells, seconds, wait
            What it adds to the attributes of these names.
        """
        self.cells += cells
        self.seconds += seconds
        self.wait += wait
        self._bar.set_postfix_str(self.status(loss), refresh=False)
        self._bar.update(min(cells, int(self._bar.total or 0) - self._bar.n))  # the last step can be filled up

    def status(self, loss: float) -> str:
        """Return the figures beside the bar; the time left is that of training alone, without validation."""
        left = max(self._left - self.cells, 0) / max(self.cells_per_s, 1e-9)
        bound = [] if self._nelbo is None else [f"nelbo={self._nelbo:.1f}"]
        shown = [f"loss={loss:.1f}", *bound, f"{self.cells_per_s:.0f} cells/s", f"wait={self.wait_share:.1%}"]
        return ", ".join([*shown, f"left={tqdm.format_interval(left)}"])
