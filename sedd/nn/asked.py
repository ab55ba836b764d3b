"""Laws of single genes, guided and tempered: what a step of a sampler draws from.

A law of counts has no end, and a tempered one is drawn from a table of its counts. A CPU finds out how long the table of each law has to be and
makes those of about the same length together: few genes have large counts. On a GPU that would be a wait in each step: tables are as long as
they were last, the device notes how long they had to be, and who has drawn a batch looks at that once (`Tempering.too_short`) and draws the batch
again if need be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sedd.nn.heads import draw

_ENTRIES_CPU, _ENTRIES_GPU = 1 << 20, 1 << 24  # of the tables that exist at a time
_STATES = 512
_SHORTEST = 16  # tables on a CPU have this length or twice, four times ... of it


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

    def reach(self, head: Any, readouts: tuple[Tensor, Tensor], genes: Tensor) -> Tensor:
        """Return how many values of each law are looked at, (N,) int64: to where hardly anything is left of it, when tempered too."""
        rest = 1e-9 ** max(1.0, self.temperature)
        found = head.reach(readouts[0], genes, rest=rest)
        return found if self.guidance == 1 else torch.maximum(found, head.reach(readouts[1], genes, rest=rest))

    def note(self, needed: Tensor) -> None:
        """Keep on the device how long the longest table had to be."""
        longest = needed.amax()
        self.needed = longest if self.needed is None else torch.maximum(self.needed, longest)

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
        out = self._genes.new_empty(len(self._genes), dtype=torch.float64)
        for at, table in self._tables(None):
            out[at] = table.amax(-1)
        return out

    def draw(self, u: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Draw a value of each, or of those `chosen` (n,), int64, by inversion."""
        if self._tempering.plain:
            readout, genes = (x if chosen is None else x[chosen] for x in (self._readout, self._genes))
            drawn: Tensor = self._head.draw(readout, genes, u)
            return drawn
        out = u.new_empty(len(u), dtype=torch.int64)
        for at, table in self._tables(chosen):
            out[at] = draw(table, u[at])
        return out

    def _tables(self, chosen: Tensor | None) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Yield log-probabilities of all values, guided and tempered, (n, states), normalised float64, and where in `chosen` these laws are."""
        everything = self._genes, self._readout, self._without
        genes, *readouts = everything if chosen is None else (x[chosen] for x in everything)
        for at, n in self._parts(genes, (readouts[0], readouts[1])):
            tables = (self._head.log_table(readout[at], genes[at], n) for readout in readouts)
            yield at, self._tempering.adjusted(next(tables), functools.partial(next, tables))

    def _parts(self, genes: Tensor, readouts: tuple[Tensor, Tensor]) -> Iterator[tuple[slice | Tensor, int]]:
        """Yield which laws have their tables made together, and of what length."""
        if not len(genes):
            return
        endless = self._head.endless
        if not endless or not self._head.has_kernel(readouts[0]):
            n = self._tempering.n_states if endless else len(self._head.values)
            step = max(1, (_ENTRIES_CPU if genes.device.type == "cpu" else _ENTRIES_GPU) // n)
            for at in (slice(lo, lo + step) for lo in range(0, len(genes), step)):
                if endless:
                    self._tempering.note(self._tempering.reach(self._head, (readouts[0][at], readouts[1][at]), genes[at]))
                yield at, n
            return
        # A length that hangs on no other law: what is drawn for a cell must not hang on those beside it.
        doublings = (self._tempering.reach(self._head, readouts, genes).double() / _SHORTEST).log2().ceil().clamp(min=0).long()
        for doubling in doublings.unique().tolist():
            n = _SHORTEST << doubling
            for at in (doublings == doubling).nonzero()[:, 0].split(max(1, _ENTRIES_CPU // n)):
                yield at, n
