"""A joint distribution small enough to enumerate, and the network that knows it exactly.

`Joint` holds p(x) of a few genes with a few bins. `ExactModel` answers as `SEDDTransformer` does (`forward`, `readout`,
`readout_at`, `head`), from the table; what it says at a visible gene is p(clean | the other genes' noisy values). `exact` is a trained
model, as the tasks take it, whose network is that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from sedd.binning import Binning
from sedd.config import DataConfig, TrainConfig
from sedd.graph import AbsorbingGraph
from sedd.inference.pretrained import Pretrained
from sedd.model import SEDDTransformer
from sedd.nn.heads import SoftmaxHead
from sedd.noise import LogLinearNoise


class Joint:
    """p(x) as a tensor with one axis per gene."""

    def __init__(self, p: Tensor) -> None:
        self.p = p.double() / p.double().sum()
        self.n_vars, self.n_bins = p.ndim, p.shape[0]

    @classmethod
    def random(cls, n_vars: int = 3, n_bins: int = 4, *, seed: int = 0, sharpness: float = 2.0) -> Joint:
        """Return a joint whose log-probabilities are normal: its genes depend on each other."""
        noise = torch.randn((n_bins,) * n_vars, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return cls((sharpness * noise).exp())

    @property
    def states(self) -> Tensor:
        """All cells, (n_bins ** n_vars, n_vars), in the order of `p.flatten()`."""
        return torch.tensor(list(itertools.product(range(self.n_bins), repeat=self.n_vars)))

    @property
    def masks(self) -> Tensor:
        """All subsets of genes, (2 ** n_vars, n_vars) bool."""
        return torch.tensor(list(itertools.product([False, True], repeat=self.n_vars)))

    def entropy(self) -> float:
        """H(X) in nats."""
        return float(-(self.p * self.p.log()).sum())

    def entropy_given(self, visible: Tensor) -> float:
        """H(X | X_visible) in nats, for a (n_vars,) bool."""
        hidden = [i for i in range(self.n_vars) if not visible[i]]
        seen = self.p.sum(hidden) if hidden else self.p
        return self.entropy() + float((seen * seen.log()).sum())

    def independent(self) -> Tensor:
        """Product of the genes' marginals, as a table."""
        out = torch.ones((), dtype=torch.float64)
        for i in range(self.n_vars):
            out = out[..., None] * self.p.sum([j for j in range(self.n_vars) if j != i])
        return out

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw n cells, (n, n_vars)."""
        picked = torch.multinomial(self.p.flatten(), n, replacement=True, generator=torch.Generator().manual_seed(seed))
        return self.states[picked]

    def histogram(self, cells: Tensor) -> Tensor:
        """Return how often each state occurs among cells, (n_bins ** n_vars,) float64."""
        powers = self.n_bins ** torch.arange(self.n_vars - 1, -1, -1)
        return torch.bincount((cells * powers).sum(1), minlength=self.n_bins**self.n_vars).double()

    def total_variation(self, cells: Tensor, p: Tensor | None = None) -> float:
        """Total variation distance of the empirical distribution of cells to `p` (the joint)."""
        p = self.p if p is None else p
        return 0.5 * float((self.histogram(cells) / len(cells) - p.flatten()).abs().sum())


class TableHead(SoftmaxHead):
    """A head whose readouts are the probabilities themselves."""

    def __init__(self, n_vars: int, n_bins: int, values: Tensor | None = None) -> None:
        super().__init__(torch.zeros(n_vars, n_bins), torch.arange(n_bins).float() if values is None else values, 1)

    def log_table(self, readout: Tensor, genes: Tensor, n: int | None = None) -> Tensor:
        """Return their logarithms, (N, n_bins)."""
        return readout.log()

    def log_prob(self, readout: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        """Return those of the targets where masked, (B, n_vars)."""
        picked = readout.log().gather(-1, targets.long()[..., None]).squeeze(-1)
        return torch.where(masked, picked, 0.0)


class ExactModel(nn.Module):
    """The true conditionals of a joint; with several joints, the condition c - 1 chooses and 0 mixes them evenly.

    Asked for labels it says which of the joints the visible genes are from, all having been as probable before.

    Parameters
    ----------
    joints
        One for each label.
    uniform
        Whether visible genes may have been replaced by noise, as the uniform graph does.
    """

    def __init__(self, *joints: Joint, uniform: bool = False) -> None:
        super().__init__()
        self.joint, self.uniform = joints[0], uniform
        self.n_vars, self.n_bins = self.joint.n_vars, self.joint.n_bins
        tables = torch.stack([joint.p for joint in joints])
        self.tables = torch.cat([tables.mean(0, keepdim=True), tables])
        self.calls = 0
        self.cells_seen = 0
        self.head = TableHead(self.n_vars, self.n_bins)

    def readout(
        self, tokens: Tensor, sigma: Tensor, *, condition: Tensor | None = None, library: Tensor | None = None
    ) -> Tensor:
        """Return p(x_i | other genes' tokens) for every gene, (B, n_vars, n_bins) float64."""
        self.calls += 1
        self.cells_seen += len(tokens)
        letters = "abcdefgh"[: self.n_vars]
        n, q = self.n_bins, self.n_bins
        seen = torch.ones(len(tokens), self.n_vars, n, dtype=torch.float64)
        here = nn.functional.one_hot(tokens.long(), n + 1)[..., :n].double()
        if self.uniform:
            kept = torch.exp(-sigma.double())[:, None, None]
            here = kept * here + (1 - kept) / q
        visible = (tokens != n)[..., None]
        seen = torch.where(visible, here, seen)
        which = torch.zeros(len(tokens), dtype=torch.int64) if condition is None else condition[:, 0]
        table = self.tables[which]
        out = torch.empty_like(seen)
        for i, letter in enumerate(letters):
            others = [j for j in range(self.n_vars) if j != i]
            terms = ",".join(f"z{letters[j]}" for j in others)
            equation = f"z{letters},{terms}->z{letter}" if others else f"z{letters}->z{letter}"
            out[:, i] = torch.einsum(equation, table, *[seen[:, j] for j in others])
        return out / out.sum(-1, keepdim=True)

    def summary(self, tokens: Tensor) -> Tensor:
        """Return the tokens: all that the conditionals depend on."""
        return tokens.clone()

    def unmask(self, summary: Tensor, cells: Tensor, genes: Tensor, tokens: Tensor) -> None:
        """Make single genes visible."""
        summary[cells, genes] = tokens

    def readout_at(self, summary: Tensor, sigma: Tensor, cells: Tensor, genes: Tensor, **given: Tensor | None) -> Tensor:
        """Return `readout` of single genes, (N, n_bins)."""
        return self.readout(summary, sigma, **given)[cells, genes]

    def forward(
        self,
        tokens: Tensor,
        sigma: Tensor,
        *,
        condition: Tensor | None = None,
        library: Tensor | None = None,
        targets: Tensor | None = None,
        everywhere: bool = False,
        labels: Tensor | None = None,
    ) -> Any:
        """Return log scores, `log_mu` of the targets at masked genes, with that of hidden labels, or `log_mu` everywhere."""
        log_mu = self.readout(tokens, sigma, condition=condition, library=library).log()
        if everywhere:
            return log_mu
        if targets is not None:
            picked = log_mu.gather(-1, targets.long()[..., None]).squeeze(-1)
            of_genes = torch.where(tokens == self.n_bins, picked, 0.0)
            if labels is None:
                return of_genes
            assert condition is not None
            law = self.label_law(tokens)
            of_labels = law.log().gather(1, (labels - 1).clamp(min=0))
            return of_genes, torch.where((condition == 0) & (labels != 0), of_labels, 0.0)
        score = nn.functional.pad(log_mu - torch.expm1(sigma.double()).log()[:, None, None], (0, 1))
        settled = torch.full_like(score, -torch.inf).scatter_(-1, tokens.long()[..., None], 0.0)
        return torch.where((tokens == self.n_bins)[..., None], score, settled)


    def label_law(self, tokens: Tensor) -> Tensor:
        """Return the probability of each joint given the visible genes, (B, joints)."""
        visible = nn.functional.one_hot(tokens.long(), self.n_bins + 1)[..., : self.n_bins].double()
        seen = torch.where((tokens != self.n_bins)[..., None], visible, 1.0)
        letters = "abcdefgh"[: self.n_vars]
        equation = f"y{letters}," + ",".join(f"z{letter}" for letter in letters) + "->zy"
        p = torch.einsum(equation, self.tables[1:], *[seen[:, j] for j in range(self.n_vars)])
        return p / p.sum(1, keepdim=True)


class ExactNetwork(SEDDTransformer):
    """A `SEDDTransformer` whose distributions come from the table of a joint; all that is built on them is the real thing."""

    def __init__(self, joint: Joint, values: Tensor | None = None) -> None:
        super().__init__(joint.n_vars, joint.n_bins, hidden_dim=4, num_layers=1, num_heads=1)
        self.exact = ExactModel(joint)
        self.head = TableHead(joint.n_vars, joint.n_bins, values)

    def readout(
        self, tokens: Tensor, sigma: Tensor, *, condition: Tensor | None = None, library: Tensor | None = None
    ) -> Tensor:
        """Return p(x_i | other genes' tokens) for every gene."""
        return self.exact.readout(tokens, sigma)

    def summary(self, tokens: Tensor) -> Tensor:
        """Return the tokens: all that the conditionals depend on."""
        return self.exact.summary(tokens)

    def unmask(self, summary: Tensor, cells: Tensor, genes: Tensor, tokens: Tensor) -> None:
        """Make single genes visible."""
        self.exact.unmask(summary, cells, genes, tokens)

    def readout_at(self, summary: Tensor, sigma: Tensor, cells: Tensor, genes: Tensor, **given: Tensor | None) -> Tensor:
        """Return `readout` of single genes."""
        return self.exact.readout_at(summary, sigma, cells, genes)

    def readout_by_part(
        self, tokens: Tensor, sigmas: Sequence[Tensor], parts: Sequence[Tensor], **given: Tensor | None
    ) -> Iterator[Tensor]:
        """Hide one part of the genes after the other."""
        for sigma, part in zip(sigmas, parts, strict=True):
            yield self.exact.readout(tokens.index_fill(1, part, self.mask_token), sigma)[:, part]


def exact(joint: Joint, values: np.ndarray | None = None) -> Pretrained:
    """Return a model that knows a joint, for the tasks: gene0, gene1, ...

    Parameters
    ----------
    values : (n_bins,), optional
        The count that each token decodes to; the token itself if not given.
    """
    n_bins = joint.n_bins
    return Pretrained(
        path=Path("exact"),
        model=ExactNetwork(joint, None if values is None else torch.as_tensor(values).float()).eval(),
        genes=np.array([f"gene{i}" for i in range(joint.n_vars)], dtype=object),
        binning=Binning("identity", n_bins, None, np.arange(n_bins) if values is None else values),
        noise=LogLinearNoise(),
        graph=AbsorbingGraph(n_bins),
        categories={},
        histogram=sp.csr_array((joint.n_vars, n_bins), dtype=np.int64),
        libraries=np.ones(1, np.float32),
        state={"args": TrainConfig(data=DataConfig(data_path="toy.h5ad")).to_flat(), "data": {"is_counts": True}, "epoch": 0, "var": {}},
    )


class ExactNetworkWithLabels(ExactNetwork):
    """An `ExactNetwork` of several joints, all as probable before, that answers which one a cell is from."""

    def __init__(self, *joints: Joint) -> None:
        super().__init__(joints[0])
        self.config |= {"answer_labels": True, "condition_sizes": [len(joints)]}
        self.exact = ExactModel(*joints)

    def label_laws(self, tokens: Tensor, sigma: Tensor, **given: Tensor | None) -> list[Tensor]:
        """Return the probability of each joint given the visible genes."""
        return [self.exact.label_law(tokens).log()]


def exact_with_labels(*joints: Joint) -> Pretrained:
    """Return a model that knows joints, whose names are a, b, ... of the condition column `kind`."""
    return replace(exact(joints[0]), model=ExactNetworkWithLabels(*joints).eval(), categories={"kind": list("abcdefgh"[: len(joints)])})


class FreeModel(nn.Module):
    """A network over a toy joint that can be trained: one table of logits per noisy neighbourhood, a small MLP."""

    def __init__(self, n_vars: int, n_bins: int, width: int = 64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.n_vars, self.n_bins = n_vars, n_bins
            self.net = nn.Sequential(
                nn.Linear(n_vars * (n_bins + 1) + 1, width), nn.GELU(), nn.Linear(width, width), nn.GELU()
            )
            self.out = nn.Linear(width, n_vars * n_bins)

    def forward(
        self,
        tokens: Tensor,
        sigma: Tensor,
        *,
        condition: Tensor | None = None,
        library: Tensor | None = None,
        targets: Tensor | None = None,
        everywhere: bool = False,
    ) -> Tensor:
        """Return `log_mu` of targets at masked genes, or of every bin of every gene."""
        seen = nn.functional.one_hot(tokens.long(), self.n_bins + 1).float().flatten(1)
        hidden = self.net(torch.cat([seen, sigma.float().log()[:, None]], 1))
        log_mu = self.out(hidden).view(-1, self.n_vars, self.n_bins).log_softmax(-1)
        if everywhere:
            return log_mu
        assert targets is not None
        return log_mu.gather(-1, targets.long()[..., None]).squeeze(-1) * (tokens == self.n_bins)
