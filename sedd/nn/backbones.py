"""What reads a partly masked cell: full attention over genes, or a few latents at a cost linear in the genes.

Both map tokens to a readout, `rank` numbers per gene, from which a head of `sedd.nn.heads` makes a law of its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd.kernels.features import count_features, count_surprises
from sedd.kernels.single_genes import add_surprises, products, sum_surprises
from sedd.nn.blocks import Block, Conditioner, Given, array_of, fourier


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


class Features(nn.Module):
    """What a visible value tells: that it is visible, whether anything was counted, and `log1p` of the count.

    A value is read as a number, so that two large counts are near to each other and none is too large.

    Parameters
    ----------
    mask_token
        The token of a hidden gene, whose features are 0.
    bin_values : (n_bins,) or None
        The count that each token stands for; None where a token is the count itself.
    """

    def __init__(self, mask_token: int, bin_values: Tensor | None) -> None:
        super().__init__()
        self.mask_token = mask_token
        self.bin_values: Tensor | None
        self.register_buffer("bin_values", bin_values)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, n) to features (B, 3, n)."""
        if self.has_kernel(tokens):
            return torch.from_numpy(count_features(tokens.numpy(), self.mask_token))
        visible = tokens != self.mask_token
        shown = tokens.where(visible, 0)
        counts = shown.float() if self.bin_values is None else F.embedding(shown.long(), self.bin_values[:, None])[..., 0]
        seen = visible.float()
        return torch.stack([seen, (counts > 0) * seen, counts.log1p() * seen], dim=-2)

    def surprises(self, tokens: Tensor, usual: Tensor) -> Tensor:
        """Map tokens (B, n) to the last two features less what is `usual` (n, 2), 0 where hidden, (B, 2, n)."""
        if self.has_kernel(tokens):
            return torch.from_numpy(count_surprises(tokens.numpy(), self.mask_token, usual.numpy()))
        told = self(tokens)
        return told[:, 1:] - told[:, :1] * usual.T

    def has_kernel(self, tokens: Tensor) -> bool:
        """Return whether tokens are read by a kernel of Numba."""
        return self.bin_values is None and tokens.device.type == "cpu" and not torch.compiler.is_compiling()


class FullBackbone(nn.Module):
    """Every gene is a token and attends to every other."""

    WAVES = 4
    """Cosines and sines of `log1p` of a count, so that a value need not act in proportion to it."""

    def __init__(
        self, genes: GeneEmbedding, dim: int, num_layers: int, num_heads: int, dropout: float, features: Features, rank: int
    ) -> None:
        super().__init__()
        self.genes, self.features = genes, features
        self.values = nn.Linear(3 + 2 * self.WAVES + 1, dim, bias=False)
        self.hidden = nn.Parameter(torch.randn(dim) / dim**0.5)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout) for _ in range(num_layers))
        self.readout = nn.Linear(dim, rank)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def flops(self, n_vars: int) -> int:
        """Count the operations of the matrix products of a forward pass of one cell; the vectors of genes are made once for all."""
        ends = sum(2 * n_vars * one.weight.numel() for one in (self.values, self.readout))
        return ends + sum(block.flops(n_vars) for block in self.blocks if isinstance(block, Block))

    def trunk(self, tokens: Tensor, given: Given) -> Tensor:
        """Map tokens (B, n_vars) and conditioning to states (B, n_vars, dim)."""
        told = self.features(tokens).transpose(-1, -2)
        seen = told[..., :1]
        waves = fourier(told[..., 2], self.WAVES, Conditioner.LIBRARY_PERIOD) * seen
        x = self.genes() + self.values(torch.cat([told, waves], -1)) + (1 - seen) * self.hidden
        for block in self.blocks:
            x = block(x, given)
        return F.layer_norm(x, x.shape[-1:])

    def forward(self, tokens: Tensor, given: Given) -> Tensor:
        """Map tokens (B, n_vars) and conditioning to readouts (B, n_vars, rank)."""
        return self.readouts(self.trunk(tokens, given))

    def readouts(self, states: Tensor) -> Tensor:
        """Map what `trunk` returns to readouts (B, n_vars, rank)."""
        return self.readout(states)

    def of_cell(self, states: Tensor) -> Tensor:
        """Return of what `trunk` returns the part that is about the cell as a whole, (B, dim)."""
        return states.mean(1)

    def summary(self, tokens: Tensor) -> Tensor:
        """Return what `readout_at` needs to know of cells: here all their tokens."""
        return tokens.clone()

    def unmask(self, summary: Tensor, cells: Tensor, genes: Tensor, tokens: Tensor) -> None:
        """Make the genes (N,) of the cells (N,) visible in `summary`."""
        summary[cells, genes] = tokens

    def readout_at(self, summary: Tensor, given: Given, cells: Tensor, genes: Tensor) -> Tensor:
        """Return the readouts of single genes, (N, rank)."""
        return self(summary, given)[cells, genes]

    def readout_by_part(self, tokens: Tensor, given: Sequence[Given], parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Hide one part of the genes after the other and return the readouts of that part, (B, n, rank) each."""
        for part, here in zip(parts, given, strict=True):
            yield self(tokens.index_fill(1, part, self.features.mask_token), here)[:, part]


class LatentBackbone(nn.Module):
    """Latents sum up the visible genes, the blocks run among latents, each gene reads its answer back.

    The visible genes enter as `sum_j features(x_j) (outer) gene_j`, a linear attention: its cost, and that of reading back, is
    linear in the genes and takes two matrix products. Values enter as differences from what is usual for the gene: else
    the sum tells first of all which genes are visible, which is chance, and learning is slower and ends worse. Since it is a
    sum, a gene that becomes visible is one more term: a sampler never goes through all genes again.

    Parameters
    ----------
    usual : (n_vars, 2)
        Over the training cells, how often each gene is above 0 and the mean of its `log1p`.
    """

    usual: Tensor

    def __init__(
        self,
        genes: GeneEmbedding,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        features: Features,
        rank: int,
        usual: Tensor,
        num_latents: int,
    ) -> None:
        super().__init__()
        self.genes, self.features = genes, features
        self.dim, self.rank, self.num_latents = dim, rank, num_latents
        self.register_buffer("usual", usual.float().contiguous())
        self.read = nn.Linear(2 * dim, num_latents * dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, attend=num_latents > 1) for _ in range(num_layers))
        self.write = nn.Linear(num_latents * dim, rank * dim)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def flops(self, n_vars: int) -> int:
        """Count the operations of the matrix products of a forward pass of one cell; the vectors of genes are made once for all."""
        ends = 2 * n_vars * self.dim * (2 + self.rank) + sum(2 * one.weight.numel() for one in (self.read, self.write))
        return ends + sum(block.flops(self.num_latents) for block in self.blocks if isinstance(block, Block))

    def summary(self, tokens: Tensor, part: Tensor | None = None) -> Tensor:
        """Return the sum over the visible genes of each cell, or of those of a `part`, whose tokens alone are given, (B, 2 dim)."""
        usual, genes = (self.usual, self.genes()) if part is None else (self.usual[part], self.genes()[part])
        if torch.is_grad_enabled() or not self.features.has_kernel(tokens) or genes.dtype != torch.float32:
            return (self.features.surprises(tokens, usual) @ genes).flatten(1)
        sums, left = map(torch.from_numpy, sum_surprises(tokens.numpy(), self.features.mask_token, usual.numpy(), array_of(genes)))
        if left.all():
            return (self.features.surprises(tokens, usual) @ genes).flatten(1)
        if left.any():
            sums[left] = (self.features.surprises(tokens[left], usual) @ genes).float()  # of half precision under autocast
        return sums.flatten(1)

    def unmask(self, summary: Tensor, cells: Tensor, genes: Tensor, tokens: Tensor) -> None:
        """Make the genes (N,) of the cells (N,) visible in `summary`."""
        if self.features.has_kernel(tokens):
            sums = summary.numpy().reshape(len(summary), 2, self.dim)
            vectors, usual = array_of(self.genes()), self.usual.numpy()
            add_surprises(sums, vectors, usual, genes.numpy(), cells.numpy(), tokens.numpy())
            return
        told = self.features.surprises(tokens[None], self.usual[genes])[0].T
        summary.index_add_(0, cells, (told.unsqueeze(2) * self.genes()[genes].unsqueeze(1)).flatten(1))

    def _latents(self, summary: Tensor, given: Given) -> Tensor:
        x = self.read(summary).view(-1, self.num_latents, self.dim)
        for block in self.blocks:
            x = block(x, given)
        return F.layer_norm(x, x.shape[-1:])

    def _factors(self, latents: Tensor) -> Tensor:
        return self.write(latents.flatten(1)).view(-1, self.rank, self.dim)

    def trunk(self, tokens: Tensor, given: Given) -> Tensor:
        """Map tokens (B, n_vars) and conditioning to latents (B, num_latents, dim)."""
        return self._latents(self.summary(tokens), given)

    def forward(self, tokens: Tensor, given: Given) -> Tensor:
        """Map tokens (B, n_vars) and conditioning to readouts (B, n_vars, rank)."""
        return self.readouts(self.trunk(tokens, given))

    def readouts(self, latents: Tensor) -> Tensor:
        """Map what `trunk` returns to readouts (B, n_vars, rank)."""
        return self._read(self.genes(), self._factors(latents))

    def of_cell(self, latents: Tensor) -> Tensor:
        """Return of what `trunk` returns the part that is about the cell as a whole: all of it, (B, num_latents dim)."""
        return latents.flatten(1)

    def slopes(self, by_readout: Tensor) -> Tensor:
        """Return the change by a latent, (n_vars, num_latents dim), of what changes by a gene's readout, (n_vars, rank), float64."""
        write = self.write.weight.detach().double().view(self.rank, self.dim, -1)
        genes = self.genes().detach().double()
        return torch.stack([(genes @ write[r]) * by_readout[:, r, None] for r in range(self.rank)]).sum(0)

    def _read(self, genes: Tensor, factors: Tensor) -> Tensor:
        """Return the products of genes (n, dim) with factors (B, rank, dim), (B, n, rank), as one product of matrices, not B narrow ones."""
        # The cells of a gene lie together, as the kernels of a law of counts take them.
        wide = genes @ factors.permute(2, 1, 0).reshape(self.dim, -1)
        return wide.view(len(genes), self.rank, -1).permute(2, 0, 1)

    def readout_at(self, summary: Tensor, given: Given, cells: Tensor, genes: Tensor) -> Tensor:
        """Return the readouts of single genes, (N, rank)."""
        factors = self._factors(self._latents(summary, given))
        if factors.device.type == "cpu" and not torch.is_grad_enabled():
            arrays = (array_of(self.genes()), factors.float().numpy(), genes.numpy(), cells.numpy())
            return torch.from_numpy(products(*arrays))
        return torch.einsum("nd,nrd->nr", self.genes()[genes], factors[cells])

    def readout_by_part(self, tokens: Tensor, given: Sequence[Given], parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Hide one part of the genes after the other and return the readouts of that part, (B, n, rank) each.

        The sum over the genes that stay is made of those of the other parts, and only the part is read: all parts together cost
        one pass over the genes. It is not the sum of all less the part's own, whose rounding would hint at what is hidden.
        """
        sums, genes = [self.summary(tokens[:, part], part) for part in parts], self.genes()
        for k, (part, here) in enumerate(zip(parts, given, strict=True)):
            others = [own for i, own in enumerate(sums) if i != k]
            shown = torch.stack(others).sum(0) if others else torch.zeros_like(sums[k])
            yield self._read(genes[part], self._factors(self._latents(shown, here)))
