"""The bar that a run shows: loss, bound, speed, waiting, time left."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells{postfix}"


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
            bar_format=_FORMAT,
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
        """The figures beside the bar; the time left is that of training alone, without validation."""
        left = max(self._left - self.cells, 0) / max(self.cells_per_s, 1e-9)
        bound = [] if self._nelbo is None else [f"nelbo={self._nelbo:.1f}"]
        shown = [f"loss={loss:.1f}", *bound, f"{self.cells_per_s:.0f} cells/s", f"wait={self.wait_share:.1%}"]
        return ", ".join([*shown, f"left={tqdm.format_interval(left)}"])
