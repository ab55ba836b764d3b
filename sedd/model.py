"""SEDDTransformer: the network that tells, for every masked gene of a cell, how likely each bin is.

Genes are a set: a gene is known by its embedding, never by its place, so permuting genes together with what belongs to
them permutes the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd.config import MODEL_SIZES
from sedd.errors import UserError
from sedd.nn.backbones import FullBackbone, GeneEmbedding, LatentBackbone
from sedd.nn.blocks import Conditioner
from sedd.nn.heads import NegativeBinomialHead, SoftmaxHead, chunks

HEADS: dict[str, type[SoftmaxHead] | type[NegativeBinomialHead]] = {"softmax": SoftmaxHead, "nb": NegativeBinomialHead}
# What a model holds for each gene besides its vector: where its output starts, and what is usual for it.
PER_GENE = {"head.bias", "backbone.usual"}


class SEDDTransformer(nn.Module):
    """Posterior of the masked genes of a cell given its visible ones.

    Parameters
    ----------
    n_vars, n_bins
        Genes and value tokens; `mask_token == n_bins`.
    hidden_dim, num_layers, num_heads, dropout
        Size of the transformer.
    attention
        "latent": `num_latents` latents sum up the genes and the layers run among them, at a cost linear in the genes.
        "full": every gene attends to every gene.
    head
        "softmax": free probabilities over bins. "nb": a negative binomial whose tail falls into the top bin.
    rank
        Numbers per gene from which its logits are made.
    log_marginals : (n_vars, n_bins), optional
        Smoothed log-marginals of the genes over the training cells, where the output starts. Uniform when left out.
    bin_values : (n_bins,), optional
        The count each bin stands for; the bin's index when left out.
    condition_sizes
        Number of categories of each condition column.
    condition_library
        Whether the log total count of a cell can be given.
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
        head: str = "softmax",
        rank: int = 4,
        log_marginals: Any = None,
        bin_values: Any = None,
        condition_sizes: Sequence[int] = (),
        condition_library: bool = False,
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
            "head": head,
            "rank": int(rank),
            "condition_sizes": [int(size) for size in condition_sizes],
            "condition_library": bool(condition_library),
        }
        if gene_embeddings is not None:
            gene_embeddings = _table(gene_embeddings, (n_vars, gene_embedding_dim or -1), "gene_embeddings", None)
        elif gene_embedding_dim is not None:
            gene_embeddings = torch.zeros(n_vars, gene_embedding_dim)
        self.config["gene_embedding_dim"] = None if gene_embeddings is None else gene_embeddings.shape[1]
        _check(self.config)
        self.n_vars, self.n_bins, self.mask_token = int(n_vars), int(n_bins), int(n_bins)
        marginals = _table(log_marginals, (n_vars, n_bins), "log_marginals", torch.zeros(n_vars, n_bins))
        values = _table(bin_values, (n_bins,), "bin_values", torch.arange(n_bins))

        self.conditioner = Conditioner(hidden_dim, condition_sizes, condition_library)
        genes = GeneEmbedding(n_vars, hidden_dim, gene_embeddings)
        size = (genes, hidden_dim, num_layers, num_heads, dropout)
        self.backbone: FullBackbone | LatentBackbone
        if attention == "full":
            self.backbone = FullBackbone(*size, values, rank)
        else:
            self.backbone = LatentBackbone(*size, marginals.softmax(-1), values, rank, num_latents)
        self.head = HEADS[head](marginals, values, rank)

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
        """Log scores of all states, or the log-probabilities of `targets` alone, or those of all bins `everywhere`.

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

        Returns
        -------
        log_score : (B, n_vars, n_bins + 1) float32
            At a masked gene `log mu + log r`, `r = 1 / expm1(sigma)`, and 0 for the mask token. A visible gene is settled:
            0 for its own token and -inf for any other.
        log_mu : (B, n_vars) float32, when `targets` are given
            As `log_mu_of`.
        log_mu : (B, n_vars, n_bins) float32, when `everywhere`
        """
        if targets is not None:
            return self.log_mu_of(tokens, sigma, targets, condition=condition, library=library)
        tokens = tokens.long()
        readout = self.readout(tokens, sigma, condition=condition, library=library)
        if everywhere:
            genes = torch.arange(self.n_vars, device=tokens.device).repeat(len(tokens))
            return self.head.log_mu(readout.flatten(0, 1), genes).view(*tokens.shape, self.n_bins)
        score = torch.full((*tokens.shape, self.n_bins + 1), -torch.inf, device=tokens.device)
        score.scatter_(-1, tokens.unsqueeze(-1), 0.0)
        log_r = -torch.log(torch.expm1(sigma.float()))
        cells, genes = (tokens == self.mask_token).nonzero(as_tuple=True)
        log_mu = self.log_mu(readout, cells, genes) + log_r[cells].unsqueeze(-1)
        return score.index_put((cells, genes), F.pad(log_mu, (0, 1)))

    def readout(
        self, tokens: Tensor, sigma: Tensor, *, condition: Tensor | None = None, library: Tensor | None = None
    ) -> Tensor:
        """Run the trunk once; `log_mu` makes distributions of what it returns, (B, n_vars, rank)."""
        return self.backbone(tokens.long(), self.conditioner(sigma, condition, library))

    def log_mu(self, readout: Tensor, cells: Tensor, genes: Tensor) -> Tensor:
        """Log-probabilities of all bins at the positions asked for.

        Parameters
        ----------
        readout : (B, n_vars, rank), from `readout`
        cells, genes : (N,) int64

        Returns
        -------
        log_mu : (N, n_bins) float32
        """
        return self.head.log_mu(readout[cells, genes], genes)

    def log_mu_of(
        self,
        tokens: Tensor,
        sigma: Tensor,
        targets: Tensor,
        *,
        condition: Tensor | None = None,
        library: Tensor | None = None,
    ) -> Tensor:
        """Log-probability of `targets` at the masked genes, 0 elsewhere, (B, n_vars) float32."""
        readout = self.readout(tokens, sigma, condition=condition, library=library)
        return self._at_masked(readout, tokens, targets)

    @torch.no_grad()
    def for_genes(self, log_marginals: Any, gene_embeddings: Any, known: Sequence[int] | None = None) -> SEDDTransformer:
        """Return the same network for another gene panel, which it knows by pretrained gene vectors.

        Parameters
        ----------
        log_marginals : (n, n_bins)
            Of the genes of the new panel, where the output of genes new to the network starts.
        gene_embeddings : (n, p)
            Their vectors, of the kind this model was trained with.
        known : (n,) int, optional
            Place of each gene in this model's panel, whose learned marginals it keeps, or -1 where it is new.

        Raises
        ------
        UserError
            If this model learned a vector per gene instead of projecting pretrained ones.
        """
        if self.config["gene_embedding_dim"] is None:
            raise UserError(
                "this model learned a vector per gene and cannot know others; train it with pretrained gene embeddings."
            )
        marginals = torch.as_tensor(log_marginals).float()
        settings = {**self.config, "n_vars": len(marginals)}
        model = SEDDTransformer(**settings, log_marginals=marginals, gene_embeddings=gene_embeddings)
        learned = self.state_dict()
        fresh = model.state_dict()
        state = {name: value for name, value in learned.items() if name not in (*PER_GENE, "backbone.genes.pretrained")}
        places = torch.full((len(marginals),), -1) if known is None else torch.as_tensor(known)
        for name in PER_GENE & fresh.keys():
            new = fresh[name]
            if name == "backbone.usual":
                new = marginals.softmax(-1) @ learned["backbone.features"][:-1].to(marginals)
            state[name] = torch.where(places[:, None] >= 0, learned[name].to(new)[places.clamp(min=0)], new)
        model.load_state_dict(state, strict=False)
        return model.to(next(self.parameters()).device).train(self.training)

    def compiled(self) -> Any:
        """Return the network with what has static shapes compiled: all but `_at_masked`, as batches differ in their masked genes."""
        # Not a decorator of it, which would import the compiler, slower than torch itself, whether or not it is used.
        self._at_masked = torch.compiler.disable(self._at_masked)  # type: ignore[method-assign]
        return torch.compile(self, dynamic=False)

    def _at_masked(self, readout: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        cells, genes = (tokens == self.mask_token).nonzero(as_tuple=True)
        log_mu = self.head.log_mu_of(readout[cells, genes], genes, targets[cells, genes].long())
        return torch.zeros(tokens.shape, device=tokens.device).index_put((cells, genes), log_mu)

    @torch.no_grad()
    def expectation(
        self,
        tokens: Tensor,
        sigma: Tensor,
        values: Tensor,
        *,
        condition: Tensor | None = None,
        library: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of the decoded counts.

        Parameters
        ----------
        tokens, sigma, condition, library
            As in `forward`.
        values : (n_bins,) float
            What each bin decodes to.

        Returns
        -------
        mean, var : (B, n_vars) float32
            A visible gene has its own value and variance 0.
        """
        tokens = tokens.long()
        values = values.to(device=tokens.device, dtype=torch.float32)
        readout = self.readout(tokens, sigma, condition=condition, library=library)
        masked = tokens == self.mask_token
        mean = values[tokens.masked_fill(masked, 0)]
        var = torch.zeros_like(mean)
        cells, genes = masked.nonzero(as_tuple=True)
        for part in chunks(len(genes), values):
            at = (cells[part], genes[part])
            p = self.log_mu(readout, *at).exp()
            mean[at] = p @ values
            # Around the mean: the difference of two large moments would cancel.
            var[at] = (p * (values - mean[at].unsqueeze(-1)).square()).sum(-1)
        return mean, var

    def embed(
        self, tokens: Tensor, sigma: Tensor, *, condition: Tensor | None = None, library: Tensor | None = None
    ) -> Tensor:
        """State of the trunk, averaged over its tokens, (B, hidden_dim)."""
        return self.backbone.trunk(tokens.long(), self.conditioner(sigma, condition, library)).mean(1)


class SEDDTransformerSmall(SEDDTransformer):
    """The `small` of `MODEL_SIZES`."""

    def __init__(self, n_vars: int, n_bins: int, **kwargs: Any) -> None:
        super().__init__(n_vars, n_bins, **{**MODEL_SIZES["small"], **kwargs})


class SEDDTransformerMedium(SEDDTransformer):
    """The `medium` of `MODEL_SIZES`."""

    def __init__(self, n_vars: int, n_bins: int, **kwargs: Any) -> None:
        super().__init__(n_vars, n_bins, **{**MODEL_SIZES["medium"], **kwargs})


class SEDDTransformerLarge(SEDDTransformer):
    """The `large` of `MODEL_SIZES`."""

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
    if config["head"] not in HEADS:
        raise UserError(f"head is {config['head']!r}; expected 'softmax' or 'nb'.")


def _table(given: Any, shape: tuple[int, ...], name: str, default: Tensor | None) -> Tensor:
    table = torch.as_tensor(default if given is None else given).float()
    if table.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, table.shape, strict=True)):
        raise UserError(f"{name} has shape {tuple(table.shape)}; expected {shape}.")
    return table
