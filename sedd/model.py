"""SEDDTransformer: the network that gives, for every masked gene of a cell, the law of its count.

Genes are a set: a gene is known by its embedding, never by its place, so permuting genes together with what belongs to
them permutes the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd.binning import UNBOUNDED
from sedd.config import MODEL_SIZES
from sedd.errors import UserError
from sedd.kernels.count_law_fit import fit
from sedd.kernels.count_law_moments import Sums
from sedd.nn.backbones import Features, FullBackbone, GeneEmbedding, LatentBackbone
from sedd.nn.blocks import Conditioner
from sedd.nn.heads import CountHead, LabelHeads, SoftmaxHead

# What a model holds for each gene besides its vector: where its output starts, and what is usual for it.
PER_GENE = {"head.start", "head.bias", "backbone.usual"}


class SEDDTransformer(nn.Module):
    """Posterior of the masked genes of a cell given its visible ones.

    Parameters
    ----------
    n_vars, n_bins
        Genes and value tokens; `mask_token == n_bins`. With `sedd.binning.UNBOUNDED` a token is a count and a gene's law is one of
        all counts, else it is a free one of the bins.
    hidden_dim, num_layers, num_heads, dropout
        Size of the transformer.
    attention
        "latent": `num_latents` latents sum up the genes and the layers run among them, at a cost linear in the genes.
        "full": every gene attends to every gene.
    rank
        Numbers per gene that move its law.
    histogram : (n_vars, max_count + 1) scipy.sparse, optional
        How many training cells have each count of each gene: where laws of counts start.
    log_marginals : (n_vars, n_bins), optional
        Smoothed log-marginals of the genes over the training cells, where laws of bins start. Uniform when left out.
    bin_values : (n_bins,), optional
        The count each bin stands for; the bin's index when left out.
    condition_sizes
        Number of categories of each condition column.
    condition_library
        Whether the log total count of a cell can be given.
    answer_labels
        Whether a label that is hidden is answered as a hidden gene is.
    label_shares : sequence of (size,), optional
        For each condition column the shares of its labels among the training cells, where their laws start. Equal when left out.
    gene_embeddings : (n_vars, p), optional
        Pretrained gene vectors to project instead of learning one per gene.
    gene_embedding_dim
        Their width p, to rebuild a model whose vectors come from its `state_dict`.

    Raises
    ------
    UserError
        If the sizes do not fit together.
    """

    def __init__(
        self,
        n_vars: int,
        n_bins: int,
        *,
        hidden_dim: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.1,
        attention: str = "latent",
        num_latents: int = 1,
        rank: int = 4,
        histogram: Any = None,
        log_marginals: Any = None,
        bin_values: Any = None,
        condition_sizes: Sequence[int] = (),
        condition_library: bool = False,
        answer_labels: bool = False,
        label_shares: Sequence[Any] | None = None,
        gene_embeddings: Any = None,
        gene_embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "n_vars": int(n_vars),
            "n_bins": int(n_bins),
            "hidden_dim": int(hidden_dim),
            "num_layers": int(num_layers),
            "num_heads": int(num_heads),
            "dropout": float(dropout),
            "attention": attention,
            "num_latents": int(num_latents),
            "rank": int(rank),
            "condition_sizes": [int(size) for size in condition_sizes],
            "condition_library": bool(condition_library),
            "answer_labels": bool(answer_labels),
        }
        if gene_embeddings is not None:
            gene_embeddings = _table(gene_embeddings, (n_vars, gene_embedding_dim or -1), "gene_embeddings", None)
        elif gene_embedding_dim is not None:
            gene_embeddings = torch.zeros(n_vars, gene_embedding_dim)
        self.config["gene_embedding_dim"] = None if gene_embeddings is None else gene_embeddings.shape[1]
        _check(self.config)
        self.n_vars, self.n_bins, self.mask_token = int(n_vars), int(n_bins), int(n_bins)
        self.is_of_counts = n_bins == UNBOUNDED
        self.conditioner = Conditioner(hidden_dim, condition_sizes, condition_library)
        genes = GeneEmbedding(n_vars, hidden_dim, gene_embeddings)
        self.head: CountHead | SoftmaxHead
        if self.is_of_counts:
            values, start = None, torch.zeros(n_vars, 3, 3) if histogram is None else torch.from_numpy(fit(histogram))
            self.head, usual = CountHead(start, rank), _usual_of_counts(n_vars, histogram)
        else:
            values = _table(bin_values, (n_bins,), "bin_values", torch.arange(n_bins))
            marginals = _table(log_marginals, (n_vars, n_bins), "log_marginals", torch.zeros(n_vars, n_bins))
            self.head, usual = SoftmaxHead(marginals, values, rank), _usual_of_bins(marginals, values)
        size = (genes, hidden_dim, num_layers, num_heads, dropout, Features(self.mask_token, values), rank)
        self.backbone: FullBackbone | LatentBackbone
        self.backbone = FullBackbone(*size) if attention == "full" else LatentBackbone(*size, usual, num_latents)
        self.labels: LabelHeads | None = None
        if answer_labels:  # last, so that all other weights start as they would without
            shares = [np.ones(n) / n for n in condition_sizes] if label_shares is None else label_shares
            logs = [_table(np.log(own), (n,), "label_shares", None) for own, n in zip(shares, condition_sizes, strict=True)]
            self.labels = LabelHeads(hidden_dim if attention == "full" else num_latents * hidden_dim, logs)

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
        """Log-probabilities of `targets`, or of all bins `everywhere`, or log scores of all states.

        Parameters
        ----------
        tokens : (B, n_vars) integer, `mask_token` where masked
        sigma : (B,) total noise
        condition : (B, columns) int64, optional
            Category c of a column as c + 1; 0 is null.
        library : (B,) float, optional
            Log total count; NaN is null.
        targets : (B, n_vars) integer, optional
            The clean tokens. Training calls the module with them, so that wrappers of `forward` see every call.
        everywhere
            Whether every gene is asked for, masked or not, as a process without masks needs it.
        labels : (B, columns) int64, optional
            The true labels, with `targets`: of a model that answers labels, those that `condition` hides are asked for too.

        Returns
        -------
        log_score : (B, n_vars, n_bins + 1) float32
            At a masked gene `log mu + log r`, `r = 1 / expm1(sigma)`, and 0 for the mask token. A visible gene is settled:
            0 for its own token and -inf for any other.
        log_mu : (B, n_vars) float32, when `targets` are given
            At the masked genes, 0 elsewhere.
        log_mu, log_nu : (B, n_vars), (B, columns) float32, when `labels` are given as well
            `log_nu` of the labels that are known and hidden, 0 elsewhere.
        log_mu : (B, n_vars, n_bins) float32, when `everywhere`

        Raises
        ------
        UserError
            If a table of all states is asked for and there are as many as counts.
        """
        masked = tokens == self.mask_token
        if labels is not None and targets is not None:
            states = self.backbone.trunk(tokens, self.conditioner(sigma, condition, library))
            asked = labels != 0 if condition is None else (labels != 0) & (condition == 0)
            log_nu = self._heads().log_prob(self.backbone.of_cell(states), labels, asked)
            return self._at_masked(self.backbone.readouts(states), targets, masked), log_nu
        readout = self.readout(tokens, sigma, condition=condition, library=library)
        if targets is not None:
            return self._at_masked(readout, targets, masked)
        if isinstance(self.head, CountHead):
            raise UserError("a law of all counts has no table of its states; pass targets, or ask head.log_table.")
        genes = torch.arange(self.n_vars, device=tokens.device).repeat(len(tokens))
        log_mu = self.head.log_table(readout.flatten(0, 1), genes).view(*tokens.shape, self.n_bins)
        if everywhere:
            return log_mu
        log_r = -torch.log(torch.expm1(sigma.float()))
        settled = torch.full((*tokens.shape, self.n_bins + 1), -torch.inf, device=tokens.device)
        settled.scatter_(-1, tokens.long().unsqueeze(-1), 0.0)
        return torch.where(masked.unsqueeze(-1), F.pad(log_mu + log_r[:, None, None], (0, 1)), settled)

    def _at_masked(self, readout: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
        return self.head.log_prob(readout, targets, masked)

    def _heads(self) -> LabelHeads:
        if self.labels is None:
            raise UserError("this model gives no labels; expected one that was trained with answer_labels.")
        return self.labels

    def label_laws(
        self, tokens: Tensor, sigma: Tensor, *, condition: Tensor | None = None, library: Tensor | None = None
    ) -> list[Tensor]:
        """Return the log-probabilities of all labels of each condition column, (B, size) float32, given what is visible.

        Raises
        ------
        UserError
            If the model does not answer labels.
        """
        heads = self._heads()
        return heads.log_tables(self.backbone.of_cell(self.backbone.trunk(tokens, self.conditioner(sigma, condition, library))))

    def readout(
        self, tokens: Tensor, sigma: Tensor, *, condition: Tensor | None = None, library: Tensor | None = None
    ) -> Tensor:
        """Run the trunk once; `head` makes laws of what it returns, (B, n_vars, rank)."""
        return self.backbone(tokens, self.conditioner(sigma, condition, library))

    def summary(self, tokens: Tensor) -> Tensor:
        """Return what `readout_at` needs to know of cells; a sampler updates it by `unmask`."""
        return self.backbone.summary(tokens)

    def unmask(self, summary: Tensor, cells: Tensor, genes: Tensor, tokens: Tensor) -> None:
        """Make single genes visible in `summary`: `tokens` (N,) of `genes` (N,) in `cells` (N,)."""
        self.backbone.unmask(summary, cells, genes, tokens)

    def readout_at(
        self,
        summary: Tensor,
        sigma: Tensor,
        cells: Tensor,
        genes: Tensor,
        *,
        condition: Tensor | None = None,
        library: Tensor | None = None,
    ) -> Tensor:
        """As `readout`, of single genes alone, (N, rank); sigma, condition and library have a row for each of `summary`."""
        return self.backbone.readout_at(summary, self.conditioner(sigma, condition, library), cells, genes)

    def readout_by_part(
        self,
        tokens: Tensor,
        sigmas: Sequence[Tensor],
        parts: Sequence[Tensor],
        *,
        condition: Tensor | None = None,
        library: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Hide one part of the genes of all cells after the other.

        Parameters
        ----------
        tokens : (B, n_vars)
        sigmas
            The noise (B,) of the cells while each part is hidden.
        parts
            The genes (n,) of each part, int64.

        Yields
        ------
        readout : (B, n, rank), of the genes of each part
        """
        conditioned = [self.conditioner(sigma, condition, library) for sigma in sigmas]
        return self.backbone.readout_by_part(tokens, conditioned, parts)

    @torch.no_grad()
    def for_genes(self, start: Any, gene_embeddings: Any, known: Sequence[int] | None = None) -> SEDDTransformer:
        """Return the same network for another gene panel, which it knows by pretrained gene vectors.

        Parameters
        ----------
        start
            Of the genes of the new panel, where the output of genes new to the network starts: `histogram` (n, max_count + 1) of
            a law of counts, or `log_marginals` (n, n_bins).
        gene_embeddings : (n, p)
            Their vectors, of the kind this model was trained with.
        known : (n,) int, optional
            Place of each gene in this model's panel, whose learned law it keeps, or -1 where it is new.

        Raises
        ------
        UserError
            If this model learned a vector per gene instead of projecting pretrained ones.
        """
        if self.config["gene_embedding_dim"] is None:
            raise UserError(
                "this model learned a vector per gene and cannot know others; train it with pretrained gene embeddings."
            )
        n_vars = start.shape[0]
        given = {"histogram": start} if self.is_of_counts else {"log_marginals": start, "bin_values": self.head.values}
        model = SEDDTransformer(**{**self.config, "n_vars": n_vars}, **given, gene_embeddings=gene_embeddings)
        learned, fresh = self.state_dict(), model.state_dict()
        state = {name: value for name, value in learned.items() if name not in (*PER_GENE, "backbone.genes.pretrained")}
        places = torch.full((n_vars,), -1) if known is None else torch.as_tensor(known)
        for name in PER_GENE & fresh.keys():
            new, old = fresh[name], learned[name].to(fresh[name])[places.clamp(min=0)]
            state[name] = torch.where((places >= 0).view(-1, *[1] * (new.ndim - 1)), old, new)
        model.load_state_dict(state, strict=False)
        return model.to(next(self.parameters()).device).train(self.training)

    def flops(self, n_vars: int, masked: int) -> int:
        """Count the operations of the matrix products that train on one cell, `masked` of its genes hidden: three times those of a forward pass."""
        return 3 * (self.conditioner.flops() + self.backbone.flops(n_vars) + self.head.flops(masked))

    def compiled(self, device: torch.device, *, graphs: bool = False) -> Any:
        """Return the network compiled for a device; for a CPU without the law of the masked genes, of which it has a kernel of Numba.

        Parameters
        ----------
        device
            Where it will be.
        graphs
            Record what a GPU does for each size of batch, and play it back (CUDA graphs).
        """
        # Not a decorator of it, which would import the compiler, slower than torch itself, whether or not it is used.
        if device.type == "cpu":
            self._at_masked = torch.compiler.disable(self._at_masked)  # type: ignore[method-assign]
        return torch.compile(self, dynamic=False, mode="reduce-overhead" if graphs else None)

    @torch.no_grad()
    def expectation(
        self, tokens: Tensor, sigma: Tensor, *, condition: Tensor | None = None, library: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of the counts.

        Parameters
        ----------
        tokens, sigma, condition, library
            As in `forward`.

        Returns
        -------
        mean, var : (B, n_vars) float32
            A visible gene has its own value and variance 0.
        """
        return self.expectation_of(self.readout(tokens, sigma, condition=condition, library=library), tokens)

    @torch.no_grad()
    def expectation_of(self, readout: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `expectation`, of what `readout` returned for the same tokens."""
        masked = tokens == self.mask_token
        sums = Sums.of_zeros(tuple(tokens.shape), device=tokens.device)
        self.head.add_moments(sums, readout, masked)
        mean, std = (x.float() for x in sums.mean_and_std())
        return torch.where(masked, mean, self.values_of(tokens.long().masked_fill(masked, 0))), std.square()

    def values_of(self, tokens: Tensor) -> Tensor:
        """Return the values that visible tokens stand for, float32."""
        return tokens.float() if isinstance(self.head, CountHead) else self.head.values[tokens.long()]

    @torch.no_grad()
    def embedding_basis(self) -> Tensor | None:
        """Return what makes an embedding of the latents, (num_latents hidden_dim, hidden_dim); None with full attention.

        Distances between latents times the basis are those between the `log1p(CP10k)` that genes are expected to have, to first order
        around the usual law of each: what moves no gene, or all alike, is no distance. Columns are the principal directions
        of this map, the strongest first; their signs are those of their largest entries.
        """
        if not isinstance(self.backbone, LatentBackbone):
            return None
        mean, by_readout = self.head.usual_means()
        share = mean / mean.sum().clamp(min=1e-12)
        slopes = self.backbone.slopes(by_readout)
        slopes = (slopes - share @ slopes) * (1e4 * share / (1 + 1e4 * share)).unsqueeze(-1)
        strength, directions = torch.linalg.eigh(slopes.T @ slopes)
        first = torch.arange(len(strength) - 1, len(strength) - 1 - self.config["hidden_dim"], -1, device=strength.device)
        directions, strength = directions[:, first], strength[first].clamp(min=0).sqrt()
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        return (directions * largest.sign() * strength).float()

    def embed(
        self, tokens: Tensor, sigma: Tensor, *, condition: Tensor | None = None, library: Tensor | None = None, basis: Tensor | None = None
    ) -> Tensor:
        """State of a cell, (B, hidden_dim): its latents times `embedding_basis`, or with full attention the mean over its genes.

        Parameters
        ----------
        basis
            What `embedding_basis` returned, for who embeds many batches.
        """
        state = self.backbone.of_cell(self.backbone.trunk(tokens, self.conditioner(sigma, condition, library)))
        basis = self.embedding_basis() if basis is None else basis
        return state if basis is None else state.float() @ basis


class SEDDTransformerSmall(SEDDTransformer):
    """`SEDDTransformer` of the size `small` (128 channels, 4 layers, 4 heads: a laptop, thousands of cells); each of its arguments can be given as well."""

    def __init__(self, n_vars: int, n_bins: int, **kwargs: Any) -> None:
        super().__init__(n_vars, n_bins, **{**MODEL_SIZES["small"], **kwargs})


class SEDDTransformerMedium(SEDDTransformer):
    """`SEDDTransformer` of the size `medium` (256 channels, 6 layers, 8 heads: tens of thousands of cells); each of its arguments can be given as well."""

    def __init__(self, n_vars: int, n_bins: int, **kwargs: Any) -> None:
        super().__init__(n_vars, n_bins, **{**MODEL_SIZES["medium"], **kwargs})


class SEDDTransformerLarge(SEDDTransformer):
    """`SEDDTransformer` of the size `large` (512 channels, 12 layers, 16 heads: several GPUs, millions of cells); each of its arguments can be given as well."""

    def __init__(self, n_vars: int, n_bins: int, **kwargs: Any) -> None:
        super().__init__(n_vars, n_bins, **{**MODEL_SIZES["large"], **kwargs})


def _check(config: dict[str, Any]) -> None:
    for name in ("n_vars", "hidden_dim", "num_layers", "num_heads", "num_latents", "rank"):
        if config[name] < 1:
            raise UserError(f"{name} is {config[name]}; expected at least 1.")
    if config["n_bins"] < 2:
        raise UserError(f"n_bins is {config['n_bins']}; a gene needs at least 2 bins to have a distribution.")
    if config["hidden_dim"] % config["num_heads"]:
        raise UserError(
            f"hidden_dim {config['hidden_dim']} is not divisible by num_heads {config['num_heads']}; "
            "choose a multiple, such as 32 per head."
        )
    if not 0 <= config["dropout"] < 1:
        raise UserError(f"dropout is {config['dropout']}; expected 0 <= dropout < 1.")
    if config["attention"] not in ("latent", "full"):
        raise UserError(f"attention is {config['attention']!r}; expected 'latent' or 'full'.")


def _table(given: Any, shape: tuple[int, ...], name: str, default: Tensor | None) -> Tensor:
    table = torch.as_tensor(default if given is None else given).float()
    if table.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, table.shape, strict=True)):
        raise UserError(f"{name} has shape {tuple(table.shape)}; expected {shape}.")
    return table


def _usual_of_counts(n_vars: int, histogram: Any) -> Tensor:
    """How often each gene of a histogram is above 0, and the mean of its `log1p`, (n_vars, 2)."""
    if histogram is None:
        return torch.zeros(n_vars, 2)
    entries = histogram.tocoo()
    rows, counts = entries.coords
    told = (np.ones(len(counts)), np.minimum(counts, 1), np.log1p(counts))
    n_cells, *sums = (np.bincount(rows, entries.data * values, n_vars) for values in told)
    return torch.from_numpy(np.stack(sums, 1) / np.maximum(n_cells, 1)[:, None]).float()


def _usual_of_bins(log_marginals: Tensor, values: Tensor) -> Tensor:
    return log_marginals.softmax(-1) @ torch.stack([(values > 0).float(), values.log1p()], 1)
