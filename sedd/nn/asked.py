"""Laws of single genes, guided and tempered: what a step of a sampler draws from.

A law of counts has no end, and a tempered one is drawn from a table of its counts. A CPU finds out how long the table has to be before it
makes it. On a GPU that would be a wait in each step: tables are as long as they were last, the device notes how long they had to be, and who
has drawn a batch looks at that once (`Tempering.too_short`) and draws the batch again if need be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sedd.nn.heads import draw

_TABLES = 1 << 12  # genes whose tables exist at a time on a CPU
_ENTRIES = 1 << 24  # of the tables that exist at a time on a GPU
_STATES = 512


class Tempering:
    """How laws are changed before a value is drawn.

    Parameters
    ----------
    temperature, guidance
        As in `sedd.sampling.Sampler`.

    Attributes
    ----------
    n_states : int
        Length of a table of counts where the host does not look at what is needed.
    needed : Tensor or None
        The longest that has been needed since it was last looked at, on the device.
    """

    def __init__(self, temperature: float, guidance: float) -> None:
        self.temperature, self.guidance = float(temperature), float(guidance)
        self.n_states = _STATES
        self.needed: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether a law stays as it is."""
        return self.temperature == 1 and self.guidance == 1

    def adjusted(self, log_mu: Tensor, without: Callable[[], Tensor]) -> Tensor:
        """Return log-probabilities guided and tempered, normalised float64; `without` gives those without conditions."""
        log_mu = log_mu.double()
        if self.guidance != 1:
            log_mu = without().double().lerp(log_mu, self.guidance)
        if not self.plain:
            log_mu = (log_mu / self.temperature).log_softmax(-1)
        return log_mu

    def length(self, head: Any, readouts: tuple[Tensor, Tensor], genes: Tensor) -> int:
        """Return how long tables are, and note what is needed where it is not looked at."""
        # A law of counts is followed to where hardly anything is left of it, when tempered too.
        rest = 1e-9 ** max(1.0, self.temperature)
        if head.has_kernel(readouts[0]):
            return max(head.n_states(readout, genes, rest=rest) for readout in readouts)
        needed = torch.stack([head.reach(readout, genes, rest) for readout in readouts]).amax()
        self.needed = needed if self.needed is None else torch.maximum(self.needed, needed)
        return self.n_states

    def too_short(self, needed: int) -> bool:
        """Return whether tables were shorter than `needed`, what `self.needed` was when it was looked at; the next ones are not."""
        self.needed = None
        if needed <= self.n_states:
            return False
        self.n_states = 1 << (needed - 1).bit_length()
        return True


class Asked:
    """Laws of single genes, given the visible ones.

    Parameters
    ----------
    model, tempering
        Who is asked, and how its laws are changed.
    summary, sigma, given
        Of the cells: the model's summary, the noise that goes with the share that is masked, condition and library.
    cells, genes : (N,) int64
        Which genes of which of the cells.
    """

    def __init__(
        self, model: Any, tempering: Tempering, summary: Tensor, sigma: Tensor, cells: Tensor, genes: Tensor, given: list[Tensor | None]
    ) -> None:
        self._head, self._tempering, self._genes = model.head, tempering, genes

        def ask(condition: Tensor | None, library: Tensor | None) -> Tensor:
            asked: Tensor = model.readout_at(summary, sigma, cells, genes, condition=condition, library=library)
            return asked

        self._readout = ask(*given)
        self._without = ask(None, None) if tempering.guidance != 1 else self._readout

    def best(self) -> Tensor:
        """Return the log-probability of the most probable value of each, guided and tempered, (N,) float64."""
        if self._tempering.plain:
            found: Tensor = self._head.best(self._readout, self._genes)
            return found
        rest = self._genes.new_empty(0, dtype=torch.float64)
        return torch.cat([rest, *(self._log_table(at).amax(-1) for at in self._parts(len(self._genes)))])

    def draw(self, u: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Draw a value of each, or of those `chosen` (n,), int64, by inversion."""
        if self._tempering.plain:
            readout, genes = (x if chosen is None else x[chosen] for x in (self._readout, self._genes))
            drawn: Tensor = self._head.draw(readout, genes, u)
            return drawn
        which = torch.arange(len(self._genes), device=u.device) if chosen is None else chosen
        return torch.cat([u.new_empty(0, dtype=torch.int64), *(draw(self._log_table(which[at]), u[at]) for at in self._parts(len(u)))])

    def _parts(self, n: int) -> Iterator[slice]:
        step = _TABLES if self._readout.device.type == "cpu" else max(1, _ENTRIES // self._tempering.n_states)
        return (slice(lo, lo + step) for lo in range(0, n, step))

    def _log_table(self, at: slice | Tensor) -> Tensor:
        """Return log-probabilities of all values, guided and tempered, (N, n), normalised float64."""
        genes, readouts = self._genes[at], (self._readout[at], self._without[at])
        n = self._tempering.length(self._head, readouts, genes)
        tables = (self._head.log_table(readout, genes, n) for readout in readouts)
        return self._tempering.adjusted(next(tables), lambda: next(tables))
