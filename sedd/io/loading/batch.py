"""What a loader gives: cells as a model takes them, or as a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch


@dataclass
class Batch:
    """Cells as a model takes them.

    Attributes
    ----------
    tokens : (B, n_vars) uint8 or uint16 tensor (float32 with `dtype="float32"`)
        Clean tokens: the mask is not applied.
    masked : (B, n_vars) bool tensor or None
        Genes to hide.
    t : (B,) float32 tensor
        Noise time in (0, 1].
    cell : (B,) int64 tensor
        Row of each cell in the store.
    labels : dict of (B,) int64 tensors
        Codes into `CellLoader.label_categories`; -1 where the label is missing.
    library : (B,) float32 tensor
        Sum of each cell's counts over the panel.
    valid : (B,) bool tensor or None
        False for cells that only fill up the last step; None when there is no padding.
    """

    tokens: torch.Tensor
    masked: torch.Tensor | None
    t: torch.Tensor
    cell: torch.Tensor
    labels: dict[str, torch.Tensor]
    library: torch.Tensor
    valid: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.cell.shape[0])


@dataclass
class CSRBatch:
    """Cells as a sparse matrix.

    Attributes
    ----------
    x : (B, n_vars) scipy CSR matrix, float32
    cell : (B,) int64
        Row of each cell in the store.
    labels : dict of (B,) int64
        Codes into `CellLoader.label_categories`; -1 where the label is missing.
    """

    x: sp.csr_matrix
    cell: np.ndarray
    labels: dict[str, np.ndarray]
