"""The reverse process: from masks (or noise) to cells.

Under the absorbing graph a masked gene is unmasked between t and s < t with a probability that depends on the schedule
alone, and its value is then drawn from `mu`, its distribution given the genes visible at t. So *when* each gene is unmasked
is drawn before anything else, and the network is asked only for the genes of the step at hand, only in cells that have
any. Steps that unmask nothing in a cell cost nothing, and cells need not be in the same step to share a batch.

The network is given the noise that goes with the share of the cell that is masked, which is what it saw in training; for
whole cells it is the noise of the step up to chance, and for imputation it is right where the time of the step is not.

All draws are by inversion of a float64 cumulative sum with 53-bit uniform numbers: Gumbel noise in float32 makes
improbable values rarer than they are (Zheng et al. 2024, arXiv 2409.02908).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sedd.errors import UserError
from sedd.graph import AbsorbingGraph, Graph, UniformGraph, check_states
from sedd.kernels.random_bits import uniforms
from sedd.noise import Noise

ORDERS = ("random", "confidence")
_WHEN, _VALUE, _STEP = 10, 11, 12  # streams of draws; the steps of the uniform graph follow _STEP
_MAX_PROBABILITIES = 1 << 24  # (gene, bin) pairs whose probabilities exist at a time, 128 MiB in float64

Progress = Callable[[int, int], None]


def draw(log_p: Tensor, u: Tensor) -> Tensor:
    """Draw by inversion, in float64.

    Parameters
    ----------
    log_p : (N, n) log-probabilities up to a constant of the row, or (n,) shared by all draws
    u : (N,) float64 in [0, 1)

    Returns
    -------
    drawn : (N,) int64; never a value of probability 0

    Raises
    ------
    UserError
        If a probability is not a number.
    """
    log_p = log_p.double()
    cumulative = (log_p - log_p.amax(-1, keepdim=True)).exp_().cumsum(-1)
    total = cumulative[..., -1]
    if not bool(torch.isfinite(total).all()):
        raise UserError("a probability of the model is not a number: its training has diverged. Use an earlier checkpoint.")
    point = u * total
    return torch.searchsorted(cumulative, point if log_p.ndim == 1 else point[:, None], right=True).view(-1)


class Sampler(ABC):
    """Draws the unknown genes of cells, given the known ones.

    Parameters
    ----------
    model
        A `SEDDTransformer`, or anything with its `readout` and `log_mu`. Is put into evaluation mode and back.
    graph, noise
        Those the model was trained for.
    num_steps
        Steps of the reverse process. Genes unmasked in one step are independent given those before; so more steps let
        genes agree better, and one step draws every gene from its own distribution.
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
        num_steps: int = 64,
        temperature: float = 1.0,
        order: str = "random",
        guidance: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        if num_steps < 1:
            raise UserError(f"num_steps is {num_steps}; expected at least 1, such as 64.")
        if not 0 < temperature < float("inf"):
            raise UserError(f"temperature is {temperature}; expected more than 0; 1 is the model itself.")
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
            If guidance is asked for and nothing is given to be guided by, or a token is none of the model's states.
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
        try:
            # Many small batches cost more than few large ones, so batches differ by at most one cell.
            n_batches = -(-len(out) // self.batch_size)
            for i, rows in enumerate(torch.arange(len(out)).tensor_split(n_batches) if n_batches else ()):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                given = [None if x is None else x[part] for x in (condition, library)]
                done = (i, n_batches)
                run(out[part], names[part], given, seed, _report(progress, done))
        finally:
            self.model.train(training)
        return out

    # -- the absorbing graph -----------------------------------------------------------------------------------------

    def _at_random(
        self, tokens: Tensor, names: Tensor, given: list[Tensor | None], seed: int, report: Progress
    ) -> None:
        """Unmask `tokens` in place, each gene in the step drawn for it."""
        n_vars = tokens.shape[1]
        unknown = tokens == self.graph.mask_token
        curve = self.survival().to(tokens.device).flip(0)
        u = uniforms(seed, _WHEN, names, n_vars)
        step = self.num_steps - torch.searchsorted(curve, u, right=True)
        # A cell's turns are its own steps that unmask something, numbered without gaps.
        turn = _dense_rank(step.masked_fill(~unknown, self.num_steps))
        n_turns = 1 + torch.where(unknown, turn, -1).amax(1)
        u = uniforms(seed, _VALUE, names, n_vars)
        total = int(n_turns.max())
        for k in range(total):
            rows = (n_turns > k).nonzero().squeeze(1)
            where = (turn[rows] == k) & unknown[rows]
            self._unmask(tokens, rows, where, u[rows], given)
            report(k + 1, total)

    def _by_confidence(
        self, tokens: Tensor, names: Tensor, given: list[Tensor | None], seed: int, report: Progress
    ) -> None:
        """Unmask `tokens` in place: of a step's candidates those whose best value is the most probable."""
        unknown = (tokens == self.graph.mask_token).sum(1)
        u = uniforms(seed, _VALUE, names, tokens.shape[1])
        left_after = torch.floor(self.survival().to(tokens.device)[:, None] * unknown + 1e-6).long()
        for k in range(self.num_steps):
            masked = tokens == self.graph.mask_token
            n_now = masked.sum(1) - left_after[k]
            rows = (n_now > 0).nonzero().squeeze(1)
            if len(rows):
                for part, at in self._pieces(masked[rows]):
                    here = rows[part]
                    log_mu = self._log_mu(tokens[here], at, [_take(x, here) for x in given])
                    confidence = torch.full(at.shape, -torch.inf, dtype=log_mu.dtype, device=tokens.device)
                    rank = confidence.masked_scatter(at, log_mu.amax(-1)).argsort(dim=1, descending=True, stable=True).argsort(1)
                    surest = rank < n_now[here, None]
                    tokens[here] = tokens[here].masked_scatter(surest, draw(log_mu[surest[at]], u[here][surest]))
            report(k + 1, self.num_steps)

    def _unmask(self, tokens: Tensor, rows: Tensor, where: Tensor, u: Tensor, given: list[Tensor | None]) -> None:
        """Draw the genes `where` of the cells `rows`, (len(rows), n_vars), in place."""
        for part, at in self._pieces(where):
            here = rows[part]
            log_mu = self._log_mu(tokens[here], at, [_take(x, here) for x in given])
            tokens[here] = tokens[here].masked_scatter(at, draw(log_mu, u[part][at]))

    def _pieces(self, where: Tensor) -> list[tuple[slice, Tensor]]:
        """Split cells so that the probabilities of their genes to draw fit in memory."""
        n = max(1, -(-int(where.sum()) * self.graph.n_bins // _MAX_PROBABILITIES))
        step = max(1, -(-len(where) // n))
        return [(slice(lo, lo + step), where[lo : lo + step]) for lo in range(0, len(where), step)]

    def _log_mu(self, tokens: Tensor, where: Tensor, given: list[Tensor | None]) -> Tensor:
        """Return log-probabilities at the genes `where`, row by row, (N, n_bins)."""
        sigma = self.noise.sigma_at((tokens == self.graph.mask_token).double().mean(1))
        return self._tempered(tokens, sigma, where, given)

    def _tempered(self, tokens: Tensor, sigma: Tensor, where: Tensor, given: list[Tensor | None]) -> Tensor:
        """Return what is drawn from: the network's log-probabilities, guided and tempered, normalised float64."""
        cells, genes = where.nonzero(as_tuple=True)
        condition, library = given

        def ask(condition: Tensor | None, library: Tensor | None) -> Tensor:
            readout = self.model.readout(tokens, sigma.float(), condition=condition, library=library)
            return self.model.log_mu(readout, cells, genes).double()

        log_mu = ask(condition, library)
        if self.guidance != 1:
            log_mu = ask(None, None).lerp(log_mu, self.guidance)
        if self.temperature != 1 or self.guidance != 1:
            log_mu = (log_mu / self.temperature).log_softmax(-1)
        return log_mu

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
        everywhere = torch.ones_like(known)
        state = (uniforms(seed, _STEP, names, n_vars) * n_bins).long()
        for k in range(n):
            t, s = 1 - k / n, 1 - (k + 1) / n
            sigma = self.noise.sigma(torch.full((len(tokens),), t, dtype=torch.float64, device=tokens.device))
            moved = uniforms(seed, _STEP + 3 * k + 1, names, n_vars) < -torch.expm1(-sigma)[:, None]
            other = (uniforms(seed, _STEP + 3 * k + 2, names, n_vars) * n_bins).long()
            state = torch.where(known, torch.where(moved, other, observed), state)
            u = uniforms(seed, _STEP + 3 * k + 3, names, n_vars)
            for part, at in self._pieces(everywhere):
                log_mu = self._tempered(state[part], sigma[part], at, [_take(x, part) for x in given])
                p = self.step_probabilities(log_mu.view(*at.shape, n_bins), state[part], t, s)
                state[part] = draw(p.log().flatten(0, 1), u[part].flatten()).view(at.shape)
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
        s = 1 - torch.arange(1, self.num_steps + 1, dtype=torch.float64) / self.num_steps
        curve = self.noise.mask_probability(s) / self.noise.mask_probability(1.0)
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
        t = 1 - torch.arange(self.num_steps, dtype=torch.float64) / self.num_steps
        leave = self.noise.unmask_rate(t) / self.num_steps
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


def _take(values: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if values is None else values[rows]


def _dense_rank(values: Tensor) -> Tensor:
    """Replace the numbers of each row by 0, 1, 2 ... in their order; equal numbers stay equal."""
    ordered, place = values.sort(1)
    rises = torch.zeros_like(ordered)
    rises[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
    return torch.empty_like(ordered).scatter_(1, place, rises.cumsum(1))


def _report(progress: Progress | None, batch: tuple[int, int]) -> Progress:
    """Turn the progress within one of several batches into that of all, in thousandths."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(round(1000 * (batch[0] + done / max(1, total)) / batch[1]), 1000)

    return report
