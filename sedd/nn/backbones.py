"""What reads a partly masked cell: full attention over genes, or a few latents at a cost linear in the genes.

Both map tokens to a readout, `rank` numbers per gene, from which a head of `sedd.nn.heads` makes a distribution over bins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd.nn.blocks import Block


class GeneEmbedding(nn.Module):
    """A vector per gene: learned, or projected from pretrained ones.

    Parameters
    ----------
    n_vars, dim
        Number of genes and width.
    pretrained : (n_vars, p) or None
        Vectors known beforehand; only their projection is learned, so that it applies to genes never trained on.
    """

    def __init__(self, n_vars: int, dim: int, pretrained: Tensor | None) -> None:
        super().__init__()
        self.pretrained: Tensor | None
        if pretrained is None:
            self.register_buffer("pretrained", None)
            self.weight = nn.Parameter(torch.randn(n_vars, dim) / dim**0.5)
        else:
            self.register_buffer("pretrained", pretrained.float())
            self.projection = nn.Linear(pretrained.shape[1], dim)

    def forward(self) -> Tensor:
        """Return the vectors of all genes, (n_vars, dim)."""
        return self.weight if self.pretrained is None else self.projection(self.pretrained)


def bin_features(bin_values: Tensor) -> Tensor:
    """Return what a visible bin tells: that it is visible, whether anything was counted, and `log1p` of the count.

    Parameters
    ----------
    bin_values : (n_bins,)
        The count each bin stands for.

    Returns
    -------
    features : (n_bins + 1, 3)
        Those of the mask token, the last, are 0.
    """
    seen = torch.ones_like(bin_values)
    return F.pad(torch.stack([seen, (bin_values > 0).float(), bin_values.log1p()], dim=1), (0, 0, 0, 1))


class FullBackbone(nn.Module):
    """Every gene is a token and attends to every other."""

    def __init__(
        self,
        genes: GeneEmbedding,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        bin_values: Tensor,
        rank: int,
    ) -> None:
        super().__init__()
        self.genes = genes
        features = bin_features(bin_values)
        # The bins start out ordered by their counts; the mask, whose features are 0, starts out apart.
        self.bins = nn.Embedding.from_pretrained(features @ torch.randn(features.shape[1], dim) / dim**0.5, freeze=False)
        with torch.no_grad():
            self.bins.weight[-1].normal_(std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout) for _ in range(num_layers))
        self.readout = nn.Linear(dim, rank)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def trunk(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B, n_vars) and conditioning (B, dim) to states (B, n_vars, dim)."""
        x = self.genes() + self.bins(tokens)
        for block in self.blocks:
            x = block(x, c)
        return F.layer_norm(x, x.shape[-1:])

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B, n_vars) and conditioning (B, dim) to readouts (B, n_vars, rank)."""
        return self.readout(self.trunk(tokens, c))


class LatentBackbone(nn.Module):
    """Latents sum up the visible genes, the blocks run among latents, each gene reads its answer back.

    The visible genes enter as `sum_j features(x_j) (outer) gene_j`, a linear attention: its cost, and that of reading back, is
    linear in the genes and takes two matrix products. Values enter as differences from what is usual for the gene: else
    the sum tells first of all which genes are visible, which is chance, and learning is slower and ends worse.
    """

    def __init__(
        self,
        genes: GeneEmbedding,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        marginals: Tensor,
        bin_values: Tensor,
        rank: int,
        num_latents: int,
    ) -> None:
        super().__init__()
        self.genes = genes
        self.dim, self.rank, self.num_latents = dim, rank, num_latents
        self.features: Tensor
        self.register_buffer("features", bin_features(bin_values))
        self.usual = nn.Parameter(marginals @ self.features[:-1])
        self.read = nn.Linear(self.features.shape[1] * dim, num_latents * dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, attend=num_latents > 1) for _ in range(num_layers))
        self.write = nn.Linear(num_latents * dim, dim * rank)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def trunk(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B, n_vars) and conditioning (B, dim) to latents (B, num_latents, dim)."""
        values = F.embedding(tokens, self.features)
        values = values - values[..., :1] * self.usual  # the first feature is 1 where visible and 0 where masked
        pooled = (values.transpose(1, 2) @ self.genes()).flatten(1)
        x = self.read(pooled).view(-1, self.num_latents, self.dim)
        for block in self.blocks:
            x = block(x, c)
        return F.layer_norm(x, x.shape[-1:])

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B, n_vars) and conditioning (B, dim) to readouts (B, n_vars, rank)."""
        factors = self.write(self.trunk(tokens, c).flatten(1)).view(-1, self.dim, self.rank)
        return self.genes() @ factors
