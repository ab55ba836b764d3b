"""From a gene's readout to a law of its values: of all counts (`CountHead`), or of the bins of binned data (`SoftmaxHead`).

`LabelHeads` are of the cell as a whole. The other two answer the same questions. Whole cells are given as `readout` (B, n_vars, rank) with a mask of where answers are wanted;
single positions as `readout` (N, rank) and `genes` (N,).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd.errors import UserError
from sedd.kernels import count_law, count_law_draws, count_law_moments, count_law_torch
from sedd.kernels.count_law_draws import COMPONENTS, LOG_MEAN
from sedd.kernels.count_law_moments import Sums
from sedd.nn.blocks import array_of

# (position, bin) pairs whose probabilities exist at a time: what stays in a core's cache, what keeps a GPU busy.
CHUNK_CPU, CHUNK_GPU = 1 << 17, 1 << 24
_TRIED = 256  # what the search for the most probable count of a gene takes on a GPU, in such pairs


def chunks(n: int, like: Tensor) -> Iterator[slice]:
    """Cut `n` positions into slices small enough for `like`'s device, given its last dimension, the bins."""
    step = max(1, (CHUNK_CPU if like.device.type == "cpu" else CHUNK_GPU) // like.shape[-1])
    return (slice(start, start + step) for start in range(0, n, step))


def draw(log_p: Tensor, u: Tensor) -> Tensor:
    """Draw by inversion, in float64.

    Parameters
    ----------
    log_p : (N, n) log-probabilities up to a constant of the row, or (n,) shared by all draws
    u : (N,) float64 in [0, 1)

    Returns
    -------
    drawn : (N,) int64; never a value of probability 0; -1 where a probability is not a number
    """
    log_p = log_p.double()
    # A GPU adds up in parts, whose sums need not ascend.
    cumulative = (log_p - log_p.amax(-1, keepdim=True)).exp_().cumsum(-1).cummax(-1).values
    total = cumulative[..., -1]
    point = u * total
    drawn = torch.searchsorted(cumulative, point if log_p.ndim == 1 else point[:, None], right=True).view(-1)
    return drawn.where(total.isfinite(), -1)


def diverged() -> UserError:
    """Return the error of a law that is not a number. Values drawn on a GPU are looked at once for many: to look is to wait for it."""
    return UserError("a probability of the model is not a number: its training has diverged. Use an earlier checkpoint.")


class CountHead(nn.Module):
    """A mixture of three negative binomials over all counts, see `sedd.kernels.count_law`.

    Each gene has a law of its own, which starts at a fit to its training counts; the readout moves its nine numbers along
    directions that all genes share.

    Parameters
    ----------
    start : (n_vars, 3, 3), from `sedd.kernels.count_law_fit.fit`
    rank
        Length of a readout.

    Attributes
    ----------
    endless : bool
        Whether a law has no last value.
    """

    endless = True

    def __init__(self, start: Tensor, rank: int) -> None:
        super().__init__()
        self.start = nn.Parameter(start.float().clone())
        # The first direction moves all means, the second shifts weight between components, the third spreads them.
        moves = torch.randn(rank, COMPONENTS, 3) / 2
        tilt = torch.linspace(-1, 1, COMPONENTS)
        for r in range(min(rank, 3)):
            moves[r] = 0
        moves[0, :, 1] = 1
        if rank > 1:
            moves[1, :, 0] = tilt
        if rank > 2:
            moves[2, :, 1], moves[2, :, 2] = tilt / 2, 0.5
        self.moves = nn.Parameter(moves)

    def flops(self, masked: int) -> int:
        """Count the operations of the matrix products for the laws of so many masked genes."""
        return 2 * masked * self.moves.numel()

    def log_prob(self, readout: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """Return log-probabilities of counts, (B, n_vars) float32, 0 where not masked."""
        with torch.autocast(readout.device.type, enabled=False):
            if readout.device.type == "cpu":
                return _CountLogProb.apply(readout.float(), self.start, self.moves, targets, masked)
            return count_law_torch.log_probs(self._raw(readout.float()), targets).masked_fill(~masked, 0)

    def _raw(self, readout: Tensor, genes: Tensor | None = None) -> Tensor:
        """Return the nine numbers of each law, (..., 3, 3), in the precision of `readout` (..., rank), whose last but one dimension is of `genes`."""
        start, moves = self.start.to(readout.dtype), self.moves.to(readout.dtype)
        return (start if genes is None else start[genes]) + torch.einsum("...r,rjc->...jc", readout, moves)

    def _host(self) -> tuple[np.ndarray, np.ndarray]:
        return array_of(self.start.cpu()), array_of(self.moves.cpu())

    def add_moments(
        self,
        sums: Sums,
        readout: Tensor,
        masked: Tensor,
        *,
        genes: Tensor | None = None,
        **given: Any,
    ) -> None:
        """Add the expectations of the masked entries to `sums`.

        Parameters
        ----------
        genes : (n,) int64, optional
            The genes of the columns of all other arrays but the sums, which have a column for each gene; all genes by default.
        **given
            `counts`, `by_own` and `scale` of `sedd.kernels.count_law_moments.add_moments`, as tensors on the device.
        """
        if readout.device.type != "cpu":
            self._add_on_device(sums, readout, masked, genes, **given)
            return
        start, moves = self._host()
        columns = None if genes is None else genes.numpy()
        start = start if columns is None else start[columns]
        asked = readout.detach().float().numpy(), start, moves, masked.numpy()
        host = {name: value.contiguous().numpy() for name, value in given.items() if value is not None}
        count_law_moments.add_moments(sums, *asked, columns=columns, **host)

    def _add_on_device(
        self, sums: Sums, readout: Tensor, masked: Tensor, genes: Tensor | None, *, counts: Tensor | None = None, by_own: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:  # fmt: skip
        scale = scale if sums.log1p.numel() else None
        raw = self._raw(readout.detach().double(), genes)
        found = count_law_torch.moments(raw, counts=counts, by_own=by_own, scale=scale)
        for total, own in zip(sums, found, strict=True):
            if own is None or not total.numel():
                continue
            own = own.masked_fill(~masked, 0)
            total.add_(own) if genes is None else total.index_add_(1, genes, own)

    def draw(self, readout: Tensor, genes: Tensor, u: Tensor) -> Tensor:
        """Draw counts, (N,) int64, by inversion of (N,) float64 uniform numbers; -1 where a law is not a number.

        A GPU draws others than a CPU, from the same laws.
        """
        if not self.has_kernel(readout):
            return count_law_torch.draw(self._raw(readout.detach().double(), genes), u)
        drawn = count_law_draws.draw(_host(readout), *self._host(), genes.numpy(), u.numpy())
        return torch.from_numpy(drawn)

    def usual_means(self) -> tuple[Tensor, Tensor]:
        """Each gene's mean where its law starts, (n_vars,), and the change of its logarithm by a readout, (n_vars, rank), float64."""
        start, moves = self.start.detach().double(), self.moves.detach().double()
        log_weight = start[..., 0].log_softmax(-1)
        log_part = log_weight + start[..., 1].clamp(*LOG_MEAN)  # what each component adds to the mean
        # A logit moves its own weight, and all weights by their sum staying 1.
        of_weight = moves[None, ..., 0] - (log_weight.exp() @ moves[..., 0].T).unsqueeze(-1)
        slopes = (log_part.softmax(-1).unsqueeze(1) * (of_weight + moves[None, ..., 1])).sum(-1)
        return log_part.logsumexp(-1).exp(), slopes

    def best(self, readout: Tensor, genes: Tensor) -> Tensor:
        """Log-probability of the most probable count of each, (N,) float64."""
        if not self.has_kernel(readout):
            step = CHUNK_GPU // _TRIED
            parts = (slice(lo, lo + step) for lo in range(0, len(genes), step))
            found = [count_law_torch.best(self._raw(readout[at].detach().double(), genes[at])) for at in parts]
            return torch.cat([readout.new_empty(0, dtype=torch.float64), *found])
        return torch.from_numpy(count_law_draws.best(_host(readout), *self._host(), genes.numpy()))

    def has_kernel(self, readout: Tensor) -> bool:
        """Return whether laws are read by a kernel of Numba, on the host."""
        return readout.device.type == "cpu"

    def reach(self, readout: Tensor, genes: Tensor, rest: float = 1e-9) -> Tensor:
        """How many counts, from 0 on, leave less than `rest` of each law, (N,) int64, where the readouts are; on a GPU some more."""
        if not self.has_kernel(readout):
            return count_law_torch.reach(self._raw(readout.detach().double(), genes), math.log(rest))
        return torch.from_numpy(count_law_draws.reach(_host(readout), *self._host(), genes.numpy(), rest))

    def log_table(self, readout: Tensor, genes: Tensor, n: int | None = None) -> Tensor:
        """Log-probabilities of the counts 0 .. n - 1, (N, n) float64; by default as many as the law that goes on the longest needs."""
        n = int(self.reach(readout, genes).amax()) if n is None else n
        if not self.has_kernel(readout):
            raw = self._raw(readout.detach().double(), genes)
            return count_law_torch.log_probs(raw.unsqueeze(1), torch.arange(n, device=raw.device))
        return torch.from_numpy(count_law_draws.table(_host(readout), *self._host(), genes.numpy(), n))

    def distribution(self, readout: Tensor, genes: Tensor, counts: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`log P(count)`, `P(less than count)` and the mean, (N,) float64 each."""
        given = genes.cpu().numpy(), counts.cpu().numpy()
        return count_law_draws.distribution(_host(readout), *self._host(), *given)


def _host(readout: Tensor) -> np.ndarray:
    return np.ascontiguousarray(readout.detach().float().cpu().numpy())


class _CountLogProb(torch.autograd.Function):
    """`CountHead.log_prob` and its gradient in one pass over the masked genes."""

    @staticmethod
    def forward(ctx: Any, readout: Tensor, start: Tensor, moves: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        readout_, start_, moves_ = readout.detach().numpy(), array_of(start), array_of(moves)
        log_p, slopes = count_law.log_probs(
            readout_, start_, moves_, targets.numpy(), masked.numpy(), slopes=any(ctx.needs_input_grad)
        )
        ctx.arrays = slopes, readout_, moves_
        return torch.from_numpy(log_p)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        to_readout, to_start, to_moves = count_law.gradients(ctx.arrays[0], gradient.numpy(), *ctx.arrays[1:])
        return torch.from_numpy(to_readout), torch.from_numpy(to_start), torch.from_numpy(to_moves), None, None


class SoftmaxHead(nn.Module):
    """Low-rank logits of bins, smooth in their values at the start, over a bias started at the genes' log-marginals.

    Parameters
    ----------
    log_marginals : (n_vars, n_bins)
    bin_values : (n_bins,)
    rank
        Length of a readout.
    """

    endless = False
    values: Tensor

    def __init__(self, log_marginals: Tensor, bin_values: Tensor, rank: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(log_marginals.clone())
        self.register_buffer("values", bin_values.float().clone())
        place = bin_values.log1p() / bin_values.log1p().max().clamp(min=1e-6)
        # The cosines of a DCT: smooth functions of log(1 + count), from slow to fast.
        waves = torch.cos(torch.pi * place * torch.arange(1, rank + 1).unsqueeze(1))
        self.basis = nn.Parameter(waves)

    def usual_means(self) -> tuple[Tensor, Tensor]:
        """Each gene's mean where its law starts, (n_vars,), and the change of its logarithm by a readout, (n_vars, rank), float64."""
        p, basis, values = self.bias.detach().double().softmax(-1), self.basis.detach().double(), self.values.double()
        mean = p @ values
        slopes = (p * values) @ basis.T - mean.unsqueeze(-1) * (p @ basis.T)
        return mean, slopes / mean.clamp(min=1e-12).unsqueeze(-1)

    def best(self, readout: Tensor, genes: Tensor) -> Tensor:
        """Log-probability of the most probable bin of each, (N,) float64."""
        tables = (self.log_table(readout[at], genes[at]) for at in chunks(len(genes), self.values))
        return torch.cat([readout.new_empty(0, dtype=torch.float64), *(table.amax(-1).double() for table in tables)])

    def log_table(self, readout: Tensor, genes: Tensor, n: int | None = None) -> Tensor:
        """Return log-probabilities of all bins, (N, n_bins) float32."""
        with torch.autocast(readout.device.type, enabled=False):
            return torch.addmm(F.embedding(genes, self.bias), readout.float(), self.basis).log_softmax(-1)

    def flops(self, masked: int) -> int:
        """Count the operations of the matrix products for the laws of so many masked genes."""
        return 2 * masked * self.basis.numel()

    def log_prob(self, readout: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """Return log-probabilities of bins, (B, n_vars) float32, 0 where not masked; logits exist for a chunk of positions."""
        cells, genes = _asked(masked)
        with torch.autocast(readout.device.type, enabled=False):
            at = readout[cells, genes].float(), self.basis, self.bias, genes, targets.long()[cells, genes]
            found = torch.zeros(masked.shape, device=readout.device).index_put((cells, genes), _LogSoftmaxOf.apply(*at))
            return found if readout.device.type == "cpu" else found.masked_fill(~masked, 0)

    def add_moments(
        self,
        sums: Sums,
        readout: Tensor,
        masked: Tensor,
        *,
        genes: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Add the expectations of the masked entries to `sums`, each bin taken as its value: bins know no rate behind a count."""
        cells, places = _asked(masked)
        values = self.values.double()
        for part in chunks(len(places), values):
            rows, columns = cells[part], places[part]
            whose, counted = columns if genes is None else genes[columns], masked[rows, columns].double()
            p = self.log_table(readout[rows, columns], whose).double().exp()
            mean = p @ values
            # Around the mean: the difference of two large moments would cancel.
            around = (p * (values - mean.unsqueeze(-1)).square()).sum(-1)
            found = [torch.ones_like(mean), mean, around + mean.square(), p[:, 0]]
            if sums.log1p.numel() and scale is not None:
                found.append((p * torch.log1p(scale[rows, None] * values)).sum(1))
            for total, own in zip(sums, found, strict=False):
                if total.numel():
                    total.index_put_((rows, whose), own * counted, accumulate=True)

    def draw(self, readout: Tensor, genes: Tensor, u: Tensor) -> Tensor:
        """Draw bins, (N,) int64, by inversion of (N,) float64 uniform numbers."""
        if not len(genes):
            return genes
        return torch.cat([draw(self.log_table(readout[at], genes[at]), u[at]) for at in chunks(len(genes), self.values)])

    def distribution(self, readout: Tensor, genes: Tensor, counts: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`log P(bin)`, `P(lower bin)` and the mean value, (N,) float64 each."""
        out = np.empty((3, len(genes)))
        for at in chunks(len(genes), self.values):
            table = self.log_table(readout[at], genes[at]).double()
            here = counts[at].long()[:, None]
            log_p, cumulative = table.gather(1, here)[:, 0], table.exp().cumsum(1)
            below = ((cumulative / cumulative[:, -1:]).gather(1, here)[:, 0] - log_p.exp()).clamp_min(0)
            out[:, at] = torch.stack([log_p, below, table.exp() @ self.values.double()]).cpu().numpy()
        return out[0], out[1], out[2]


def _asked(masked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cells and genes (N,) of the masked entries; on a GPU of all entries, as it would have to wait to know how many these are."""
    if masked.device.type == "cpu":
        cells, genes = masked.nonzero(as_tuple=True)
        return cells, genes
    at = torch.arange(masked.numel(), device=masked.device)
    return at // masked.shape[1], at % masked.shape[1]


class _LogSoftmaxOf(torch.autograd.Function):
    """`log_softmax(bias[genes] + readout @ basis)` at `targets`, in float32 and in chunks.

    The gradient makes the logits again, so that neither pass holds more than a chunk of them.
    """

    @staticmethod
    def forward(ctx: Any, readout: Tensor, basis: Tensor, bias: Tensor, genes: Tensor, targets: Tensor) -> Tensor:
        out = readout.new_empty(len(genes))
        log_total = torch.empty_like(out)
        for part in chunks(len(genes), basis):
            logits = torch.addmm(bias[genes[part]], readout[part], basis)
            log_total[part] = logits.logsumexp(-1)
            out[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - log_total[part]
        ctx.save_for_backward(readout, basis, bias, genes, targets, log_total)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        readout, basis, bias, genes, targets, log_total = ctx.saved_tensors
        to_readout, to_basis, to_bias = torch.empty_like(readout), torch.zeros_like(basis), torch.zeros_like(bias)
        for part in chunks(len(genes), basis):
            delta = torch.addmm(bias[genes[part]], readout[part], basis)
            delta.sub_(log_total[part, None]).exp_().mul_(-gradient[part, None])
            delta.scatter_add_(-1, targets[part, None], gradient[part, None])
            torch.mm(delta, basis.T, out=to_readout[part])
            to_basis.addmm_(readout[part].T, delta)
            to_bias.index_add_(0, genes[part], delta)
        return to_readout, to_basis, to_bias, None, None


class LabelHeads(nn.Module):
    """The laws of a cell's labels, one head for each condition column, which start at how frequent the labels are.

    Parameters
    ----------
    width
        Of the state of a cell.
    log_shares
        For each column the logarithms of the shares of its labels, (size,).
    """

    def __init__(self, width: int, log_shares: Sequence[Tensor]) -> None:
        super().__init__()
        self.columns = nn.ModuleList()
        for shares in log_shares:
            head = nn.Linear(width, len(shares))
            nn.init.zeros_(head.weight)
            head.bias.data.copy_(shares)
            self.columns.append(head)

    def log_tables(self, state: Tensor) -> list[Tensor]:
        """Map states (B, width) to the log-probabilities of all labels of each column, (B, size) float32."""
        with torch.autocast(state.device.type, enabled=False):
            return [head(state.float()).log_softmax(-1) for head in self.columns]

    def log_prob(self, state: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
        """Return log-probabilities of labels, (B, columns) float32, 0 where not asked; label k of a column is k + 1."""
        at = (labels - 1).clamp(min=0)
        picked = [table.gather(1, at[:, k, None]) for k, table in enumerate(self.log_tables(state))]
        return torch.cat(picked, 1).masked_fill(~asked, 0)
