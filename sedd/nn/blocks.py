"""Transformer block with AdaLN-zero conditioning, and the vector it is conditioned on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def fourier(x: Tensor, n: int, period: float) -> Tensor:
    """Cosines and sines of `x` at the frequencies 1..n of `period`, preceded by `x / period` itself.

    Parameters
    ----------
    x : (B,) any real dtype
    n : number of frequencies
    period : the range of `x` over which the slowest wave runs once

    Returns
    -------
    features : (B, 2 n + 1) float32
    """
    scaled = x.float().unsqueeze(-1) / period
    angle = 2 * math.pi * scaled * torch.arange(1, n + 1, device=x.device)
    return torch.cat([scaled, angle.cos(), angle.sin()], dim=-1)


def array_of(weights: Tensor) -> np.ndarray:
    """Return weights on the CPU for a kernel of Numba, float32: a copy where several processes may divide them.

    FSDP frees what it gathered between passes, which it cannot while an array looks at it.
    """
    weights = weights.detach().float()
    several = dist.is_available() and dist.is_initialized()
    return np.asarray((weights.clone() if several else weights).numpy())


class Given(NamedTuple):
    """What cells are conditioned on.

    Attributes
    ----------
    vectors : (n, hidden_dim)
    rows : (B,) int64, or None
        Which vector belongs to each cell. If None, there is one for each, or a single one for all.
    """

    vectors: Tensor
    rows: Tensor | None


class Conditioner(nn.Module):
    """One vector per cell from the noise level, the categorical conditions and the library size.

    Parameters
    ----------
    hidden_dim
        Width of the vector.
    condition_sizes
        Number of categories of each condition column; code 0 is null and category c is coded c + 1.
    condition_library
        Whether log total counts are taken; NaN is null.
    """

    FREQUENCIES = 8
    LIBRARY_PERIOD = 16.0  # log total counts lie in (0, 16)

    def __init__(self, hidden_dim: int, condition_sizes: Sequence[int], condition_library: bool) -> None:
        super().__init__()
        n_features = 2 * self.FREQUENCIES + 1
        self.noise = nn.Sequential(nn.Linear(n_features, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        self.columns = nn.ModuleList(nn.Embedding(size + 1, hidden_dim) for size in condition_sizes)
        self.library = nn.Linear(n_features + 1, hidden_dim) if condition_library else None

    def flops(self, ) -> int:
        """Count the operations of the matrix products for one cell."""
        layers = [one for one in (*self.noise, self.library) if isinstance(one, nn.Linear)]
        return sum(2 * one.weight.numel() for one in layers)

    def forward(self, sigma: Tensor, condition: Tensor | None, library: Tensor | None) -> Given:
        """Return the conditioning vectors of cells, given (B,), (B, columns) and (B,)."""
        if torch.is_grad_enabled() or sigma.device.type != "cpu":
            return Given(self._vectors(sigma, condition, library), None)
        # Most tasks give many cells the same: what follows from it alone is computed once.
        columns = [sigma.double(), *([] if condition is None else condition.double().T), *([] if library is None else [library.double()])]
        _, first, rows = np.unique(torch.stack(columns, 1).numpy(), axis=0, return_index=True, return_inverse=True)
        given = (None if x is None else x[torch.from_numpy(first)] for x in (condition, library))
        vectors = self._vectors(sigma[torch.from_numpy(first)], *given)
        return Given(vectors, None if len(first) == 1 else torch.from_numpy(rows.reshape(-1)))

    def _vectors(self, sigma: Tensor, condition: Tensor | None, library: Tensor | None) -> Tensor:
        # The share of genes that are masked, not sigma, which grows without bound as t -> 1.
        masked_share = -torch.expm1(-sigma)
        # Half a period, since a wave that closes on itself could not tell "all masked" from "none".
        out = self.noise(fourier(masked_share, self.FREQUENCIES, 2.0))
        if condition is None:
            condition = torch.zeros(sigma.shape[0], len(self.columns), dtype=torch.int64, device=sigma.device)
        for column, embedding in enumerate(self.columns):
            out = out + embedding(condition[:, column])
        if self.library is not None:
            if library is None:
                library = torch.full_like(sigma, math.nan)
            known = ~library.isnan()
            waves = fourier(library.nan_to_num(), self.FREQUENCIES, self.LIBRARY_PERIOD)
            features = torch.cat([waves, torch.ones_like(waves[:, :1])], dim=-1)
            out = out + self.library(features * known.unsqueeze(-1))
        return F.silu(out)


class Block(nn.Module):
    """Pre-norm transformer block whose norms and residual gates are set by the conditioning (AdaLN-zero).

    With one token there is nothing to attend to and the block is a residual MLP.

    Parameters
    ----------
    dim, num_heads, dropout
        Width, attention heads and dropout on both branches.
    attend
        Whether the block has an attention branch.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, attend: bool = True, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.branches = 2 if attend else 1
        self.modulation = nn.Linear(dim, 3 * self.branches * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        if attend:
            self.qkv = nn.Linear(dim, 3 * dim)
            self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_ratio * dim, dim)
        )

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """Map tokens (B, N, dim), given conditioning, to tokens (B, N, dim)."""
        modulation = self.modulation(given.vectors)
        if given.rows is not None:
            modulation = modulation[given.rows]
        shift, scale, gate, *attention = modulation.unsqueeze(1).chunk(3 * self.branches, dim=-1)
        if attention:
            x = x + attention[2] * self._attend(_modulate(x, attention[0], attention[1]))
        return x + gate * F.dropout(self.mlp(_modulate(x, shift, scale)), self.dropout, self.training)

    def flops(self, tokens: int) -> int:
        """Count the operations of the matrix products of a forward pass of one cell of so many tokens, two for each product."""
        dim = self.modulation.in_features
        attention = 2 * tokens * 4 * dim * dim + 4 * tokens * tokens * dim if self.branches == 2 else 0
        return 2 * 3 * self.branches * dim * dim + attention + sum(2 * tokens * one.weight.numel() for one in self.mlp if isinstance(one, nn.Linear))

    def _attend(self, x: Tensor) -> Tensor:
        batch, n, dim = x.shape
        q, k, v = self.qkv(x).view(batch, n, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(out.transpose(1, 2).reshape(batch, n, dim))
        return F.dropout(out, self.dropout, self.training)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
