"""The reverse process: from masks (or noise) to cells.

Under the absorbing graph a masked gene is unmasked between t and s < t with a probability that depends on the schedule
alone, and its value is then drawn from `mu`, its distribution given the genes visible at t. So *when* each gene is unmasked
is drawn before anything else, and the network is asked only for the genes of the step at hand, only in cells that have
any. Steps that unmask nothing in a cell cost nothing, and cells need not be in the same step to share a batch.

Under the absorbing graph, a model sums up a cell's visible genes once (`summary`), is told of each that becomes visible
(`unmask`), and asked for the genes of a step alone (`readout_at`): a step costs the network's blocks and those genes.

The network is given the noise that goes with the share of the cell that is masked, which is what it saw in training; for
whole cells it is the noise of the step up to chance, and for imputation it is right where the time of the step is not.

All draws are by inversion of a float64 cumulative sum with 53-bit uniform numbers: Gumbel noise in float32 makes
improbable values rarer than they are (Zheng et al. 2024, arXiv 2409.02908).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedd.errors import UserError
from sedd.graph import AbsorbingGraph, Graph, UniformGraph, check_states
from sedd.kernels.random_bits import uniforms
from sedd.kernels.turns import Turns, turns
from sedd.nn.asked import Asked, Tempering
from sedd.nn.heads import diverged, draw
from sedd.noise import Noise

ORDERS = ("random", "confidence")
_WHEN, _VALUE, _STEP = 10, 11, 12  # streams of draws; the steps of the uniform graph follow _STEP
_HOTTEST = 10  # a law of counts has no end: hotter, its tail is longer than memory
_MAX_PROBABILITIES = 1 << 24  # (gene, bin) pairs whose probabilities exist at a time, 128 MiB in float64

Progress = Callable[[int, int], None]


def step_times(num_steps: int) -> Tensor:
    """Return the times at which steps that unmask genes begin and the last one ends, `1 - (i / num_steps)**3`, (num_steps + 1,) float64.

    Of as many steps of equal length each draws as many genes, so the first draws many that do not know of each other: 16 of these
    make cells as good as 128 of equal length (`docs/results.md`).
    """
    return 1 - (torch.arange(num_steps + 1, dtype=torch.float64) / num_steps) ** 3


class Sampler(ABC):
    """Draws the unknown genes of cells, given the known ones.

    Parameters
    ----------
    model
        A `SEDDTransformer`, or anything with its `summary`, `unmask`, `readout_at` and `head`; for the uniform graph, that gives
        the laws of all genes `everywhere`. Is put into evaluation mode and back.
    graph, noise
        Those the model was trained for.
    num_steps
        Steps of the reverse process. Genes unmasked in one step are independent given those before; so more steps let
        genes agree better, and one step draws every gene from its own distribution. The first steps are the shortest: what is drawn
        first decides what kind of cell it becomes (`step_times`).
    temperature
        Of each draw: below 1 sharpens, 1 is the model itself.
    order
        "random" is the reverse process. "confidence" unmasks the genes first that the model is surest of. It is biased:
        the genes it leaves to be drawn together are those that vary most, whose dependence a step cannot draw, and the
        bound on the likelihood is not of what it draws. It is exact only where no step unmasks two genes of a cell.
    guidance
        Strength w of classifier-free guidance (Ho and Salimans 2022): `mu` is made proportional to
        `mu_given^w mu_null^(1-w)`. 1 is the conditional model itself, exactly, at half the cost.
    batch_size
        Cells that go through the network at a time.

    Raises
    ------
    UserError
        If a setting is out of range.
    """

    def __init__(
        self,
        model: Any,
        graph: Graph,
        noise: Noise,
        *,
        num_steps: int = 32,
        temperature: float = 1.0,
        order: str = "random",
        guidance: float = 1.0,
        batch_size: int = 256,
    ) -> None:
        if num_steps < 1:
            raise UserError(f"num_steps is {num_steps}; expected at least 1, such as 64.")
        if not 0 < temperature <= _HOTTEST:
            raise UserError(f"temperature is {temperature}; expected more than 0 and at most {_HOTTEST}; 1 is the model itself.")
        if order not in ORDERS:
            raise UserError(f"unknown order {order!r}; expected one of {', '.join(ORDERS)}.")
        if not 0 <= guidance < float("inf"):
            raise UserError(f"guidance is {guidance}; expected 0 or more; 1 is the conditional model itself.")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; expected at least 1.")
        n_bins = getattr(model, "n_bins", graph.n_bins)
        if n_bins != graph.n_bins:
            raise UserError(f"the model has {n_bins} states and the graph {graph.n_bins}; expected as many.")
        if order == "confidence" and not isinstance(graph, AbsorbingGraph):
            raise UserError("order 'confidence' needs the absorbing graph; the uniform one unmasks nothing.")
        self.model, self.graph, self.noise = model, graph, noise
        self.num_steps, self.temperature, self.order = int(num_steps), float(temperature), order
        self.guidance, self.batch_size = float(guidance), int(batch_size)
        self._tempering = Tempering(temperature, guidance)
        self._wrong: Tensor | None = None

    @abstractmethod
    def survival(self) -> Tensor:
        """Return the probability that a gene is still masked after each step, (num_steps,) float64, ending with 0."""

    @abstractmethod
    def step_probabilities(self, log_mu: Tensor, tokens: Tensor, t: float, s: float) -> Tensor:
        """Return where each gene goes in the step from t to s, (B, n_vars, n_bins + 1) float64."""

    @torch.no_grad()
    def sample(
        self,
        tokens: Tensor,
        *,
        condition: Tensor | None = None,
        library: Tensor | None = None,
        seed: int = 0,
        cells: Any = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw what is unknown.

        Parameters
        ----------
        tokens : (B, n_vars) integer
            `mask_token` where unknown; everything else is kept as it is.
        condition, library
            As in `SEDDTransformer.forward`, one row per cell.
        seed, cells
            The draws of a cell are a function of `seed` and its number in `cells` (its row if not given), and not of the
            cells beside it.
        progress
            Called with (done, total) now and then.

        Returns
        -------
        drawn : (B, n_vars) int64 without `mask_token`

        Raises
        ------
        UserError
            If guidance is asked for and nothing is given to be guided by, a token is none of the model's states, or a law is not a number.
        """
        check_states(tokens, self.graph.mask_token)
        if self.guidance != 1 and condition is None and library is None:
            raise UserError(
                f"guidance is {self.guidance} and there is nothing to be guided by; give a condition or leave it at 1."
            )
        names = torch.arange(len(tokens)) if cells is None else torch.as_tensor(cells)
        names = names.to(device=tokens.device, dtype=torch.int64)
        out = tokens.long().clone()
        run = self._by_confidence if self.order == "confidence" else self._at_random
        if isinstance(self.graph, UniformGraph):
            run = self._among_values
        training = self.model.training
        self.model.eval()
        self._wrong = self._tempering.needed = None
        try:
            # Many small batches cost more than few large ones, so batches differ by at most one cell.
            n_batches = -(-len(out) // self.batch_size)
            for i, rows in enumerate(torch.arange(len(out)).tensor_split(n_batches) if n_batches else ()):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                given = [None if x is None else x[part] for x in (condition, library)]
                done = (i, n_batches)
                before = out[part].clone()
                run(out[part], names[part], given, seed, _report(progress, done))
                while self._tables_too_short():
                    out[part] = before
                    run(out[part], names[part], given, seed, _report(progress, done))
        finally:
            self.model.train(training)
        return out

    # -- the absorbing graph -----------------------------------------------------------------------------------------

    def _at_random(
        self, tokens: Tensor, names: Tensor, given: list[Tensor | None], seed: int, report: Progress
    ) -> None:
        """Unmask `tokens` in place, each gene in the step drawn for it."""
        unknown = tokens == self.graph.mask_token
        self.unmask(tokens, turns(unknown.cpu().numpy(), names.cpu().numpy(), self.survival().numpy(), seed, _WHEN, _VALUE), given, report)

    def unmask(self, tokens: Tensor, order: Turns, given: list[Tensor | None], report: Progress) -> None:
        """Make the hidden genes of `tokens` visible in place, turn after turn. On a GPU no turn waits for the device.

        Parameters
        ----------
        tokens : (B, n_vars) int64
        order
            Which genes when, known to the host: so all shapes are.
        given
            Condition and library of the cells.
        report
            Called after each turn.
        """
        cells, genes, u, here, rows, share = (torch.from_numpy(x).to(tokens.device) for x in order[:6])
        ends, row_ends = ([0, *x.tolist()] for x in order[6:])
        summary = self.model.summary(tokens)
        for k in range(len(ends) - 1):
            at, whose = slice(ends[k], ends[k + 1]), slice(row_ends[k], row_ends[k + 1])
            # Cells that have nothing to do in this turn are done with.
            own = rows[whose]
            part = summary if len(own) == len(summary) else summary[own]
            law = self._asked(part, share[whose], here[at], genes[at], [_take(x, own) for x in given])
            drawn = self._number(law.draw(u[at]))
            tokens[cells[at], genes[at]] = drawn
            self.model.unmask(summary, cells[at], genes[at], drawn)
            report(k + 1, len(ends) - 1)

    def _number(self, drawn: Tensor) -> Tensor:
        """Return what was drawn, with 0 where a law was not a number: that it happened is kept, and looked at when a batch is done."""
        wrong = drawn < 0
        self._wrong = wrong.any() if self._wrong is None else self._wrong | wrong.any()
        return drawn.masked_fill(wrong, 0)

    def _tables_too_short(self) -> bool:
        """Look, once a batch is drawn, at what its steps have noted on the device: whether it has to be drawn again.

        Raises
        ------
        UserError
            If a law was not a number.
        """
        wrong, needed = self._wrong, self._tempering.needed
        self._wrong = None
        noted = [torch.zeros((), dtype=torch.int64) if x is None else x.long() for x in (wrong, needed)]
        is_wrong, length = torch.stack([x.to(noted[0].device) for x in noted]).tolist()
        if is_wrong:
            raise diverged()
        return self._tempering.too_short(length)

    def _asked(self, summary: Tensor, share: Tensor, cells: Tensor, genes: Tensor, given: list[Tensor | None]) -> Asked:
        return Asked(self.model, self._tempering, summary, self.noise.sigma_at(share).float(), cells, genes, given)

    def _by_confidence(
        self, tokens: Tensor, names: Tensor, given: list[Tensor | None], seed: int, report: Progress
    ) -> None:
        """Unmask `tokens` in place: of a step's candidates those whose best value is the most probable."""
        hidden = (tokens == self.graph.mask_token).sum(1).cpu().numpy()
        left = np.floor(self.survival().numpy()[:, None] * hidden + 1e-6).astype(np.int64)
        left = np.minimum.accumulate(np.concatenate([hidden[None], left]))
        self.unmask_surest(tokens, left, uniforms(seed, _VALUE, names, tokens.shape[1]), given, report)

    def unmask_surest(self, tokens: Tensor, left: np.ndarray, u: Tensor, given: list[Tensor | None], report: Progress) -> None:
        """Make the genes of `tokens` that the model is surest of visible in place, step after step. On a GPU no step waits for the device.

        Parameters
        ----------
        tokens : (B, n_vars) int64
        left : (num_steps + 1, B) int64
            How many genes of each cell are hidden before the first step and after each, known to the host: so all shapes are.
        u : (B, n_vars) float64
            What values are drawn by.
        given
            Condition and library of the cells.
        report
            Called after each step.
        """
        device = tokens.device
        summary = self.model.summary(tokens)
        for k in range(len(left) - 1):
            working = np.flatnonzero(left[k] > left[k + 1])
            n_here, n_now = left[k, working], (left[k] - left[k + 1])[working]
            if len(working):
                rows, number = (torch.from_numpy(x).to(device) for x in (working, n_here))
                mine, place = _counted(n_here, device)
                # Hidden genes first, in order.
                masked = (tokens[rows] == self.graph.mask_token).to(torch.uint8)
                genes = masked.argsort(dim=1, descending=True, stable=True)[mine, place]
                part, given_here = summary[rows], [_take(x, rows) for x in given]
                law = self._asked(part, number.double() / tokens.shape[1], mine, genes, given_here)
                confidence = torch.full((len(working), int(n_here.max())), -torch.inf, dtype=torch.float64, device=device)
                confidence[mine, place] = law.best()
                surest = confidence.argsort(dim=1, descending=True, stable=True)
                whose, first = _counted(n_now, device)
                chosen = ((number.cumsum(0) - number)[whose] + surest[whose, first]).sort().values
                cells, genes = rows[mine[chosen]], genes[chosen]
                drawn = self._number(law.draw(u[cells, genes], chosen))
                tokens[cells, genes] = drawn
                self.model.unmask(summary, cells, genes, drawn)
            report(k + 1, len(left) - 1)

    # -- the uniform graph -------------------------------------------------------------------------------------------

    def _among_values(
        self, tokens: Tensor, names: Tensor, given: list[Tensor | None], seed: int, report: Progress
    ) -> None:
        """Walk `tokens` in place from uniform values to cells.

        Known genes are shown to the network as noisy as the others are at that time and put back at the end. So what is
        drawn for the others follows them only loosely (on a joint of three genes it was nearer to the marginals than to
        the conditional), where it is exact for the absorbing graph; `sedd.tasks.impute` refuses it.
        """
        n_vars, n_bins, n = tokens.shape[1], self.graph.n_bins, self.num_steps
        known, observed = tokens != self.graph.mask_token, tokens.clone()
        state = (uniforms(seed, _STEP, names, n_vars) * n_bins).long()
        for k in range(n):
            t, s = 1 - k / n, 1 - (k + 1) / n
            sigma = self.noise.sigma(torch.full((len(tokens),), t, dtype=torch.float64, device=tokens.device))
            moved = uniforms(seed, _STEP + 3 * k + 1, names, n_vars) < -torch.expm1(-sigma)[:, None]
            other = (uniforms(seed, _STEP + 3 * k + 2, names, n_vars) * n_bins).long()
            state = torch.where(known, torch.where(moved, other, observed), state)
            u = uniforms(seed, _STEP + 3 * k + 3, names, n_vars)
            for part in torch.arange(len(state)).split(max(1, _MAX_PROBABILITIES // (n_vars * n_bins))):
                shown = (state[part], sigma[part].float())
                condition, library = (_take(x, part) for x in given)
                log_mu = self.model(*shown, everywhere=True, condition=condition, library=library)
                log_mu = self._tempering.adjusted(log_mu, functools.partial(self.model, *shown, everywhere=True))
                p = self.step_probabilities(log_mu, state[part], t, s)
                state[part] = self._number(draw(p.log().flatten(0, 1), u[part].flatten())).view(p.shape[:2])
            report(k + 1, n)
        tokens.copy_(torch.where(known, observed, state))

    def _sigmas(self, t: float, s: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Noise at t and s for each cell; nothing is left of it at s = 0, where the last step denoises."""
        sigma = self.noise.sigma(torch.full((len(like),), t, dtype=torch.float64, device=like.device))
        earlier = self.noise.sigma(torch.full_like(sigma, s)) if s > 0 else torch.zeros_like(sigma)
        return sigma, earlier


class AnalyticSampler(Sampler):
    """Each step follows the exact posterior of the forward process, given `mu` at its start."""

    def survival(self) -> Tensor:
        """Return `(1 - exp(-sigma(s))) / (1 - exp(-sigma(1)))` after each step, and 0 after the last."""
        curve = self.noise.mask_probability(step_times(self.num_steps)[1:]) / self.noise.mask_probability(1.0)
        curve[-1] = 0
        return curve

    def step_probabilities(self, log_mu: Tensor, tokens: Tensor, t: float, s: float) -> Tensor:
        """Return the posterior of the forward process at s, given the tokens at t."""
        sigma, earlier = self._sigmas(t, s, tokens)
        return self.graph.posterior(log_mu, tokens, sigma, earlier)


class EulerSampler(Sampler):
    """Each step follows the reverse rate `dsigma Q(y, x) p_t(y) / p_t(x)` at its start; the last one denoises.

    For the absorbing graph and log-linear noise it is the analytic sampler: there the reverse rate is 1 / t.
    """

    def survival(self) -> Tensor:
        """Return the product over steps of `1 - (t - s) dsigma(t) r(t)`, and 0 after the last."""
        times = step_times(self.num_steps)
        leave = self.noise.unmask_rate(times[:-1]) * -times.diff()
        curve = (1 - leave.clamp(max=1)).cumprod(0)
        curve[-1] = 0
        return curve

    def step_probabilities(self, log_mu: Tensor, tokens: Tensor, t: float, s: float) -> Tensor:
        """Return an Euler step's probabilities; a gene that would leave with more than 1 leaves."""
        sigma, earlier = self._sigmas(t, s, tokens)
        if s <= 0:
            return self.graph.posterior(log_mu, tokens, sigma, earlier)
        rate = self.noise.dsigma(torch.tensor(t, dtype=torch.float64)) * self.graph.transposed_rate(tokens).clamp(min=0)
        jump = (t - s) * rate.to(log_mu.device) * self.graph.log_score(log_mu, tokens, sigma).exp()
        jump = jump.scatter(-1, tokens[..., None], 0.0)
        leave = jump.sum(-1, keepdim=True)
        jump = jump / leave.clamp(min=1)
        return jump.scatter(-1, tokens[..., None], (1 - leave).clamp(min=0))


SAMPLERS: dict[str, type[AnalyticSampler] | type[EulerSampler]] = {"analytic": AnalyticSampler, "euler": EulerSampler}


def make_sampler(name: str, model: Any, graph: Graph, noise: Noise, **settings: Any) -> AnalyticSampler | EulerSampler:
    """Make a sampler by its name.

    Parameters
    ----------
    name
        "analytic" or "euler".
    model, graph, noise, **settings
        As in `Sampler`.

    Raises
    ------
    UserError
        If there is no such sampler or a setting is out of range.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; expected one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name](model, graph, noise, **settings)


def _counted(numbers: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return of as many things of each row as `numbers` (n,) on the host says their rows and their places within these, int64 on `device`."""
    total, there = int(numbers.sum()), torch.from_numpy(numbers).to(device)
    rows = torch.repeat_interleave(torch.arange(len(numbers), device=device), there, output_size=total)
    return rows, torch.arange(total, device=device) - (there.cumsum(0) - there)[rows]


def _take(values: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if values is None else values[rows]


def _report(progress: Progress | None, batch: tuple[int, int]) -> Progress:
    """Turn the progress within one of several batches into that of all, in thousandths."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(round(1000 * (batch[0] + done / max(1, total)) / batch[1]), 1000)

    return report
