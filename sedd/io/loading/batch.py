"""What a loader gives: cells as a model takes them, or as a sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch


@dataclass
class Batch:
    """Cells as a model takes them.

    Attributes
    ----------
    tokens : (B, n_vars) uint8, uint16 or int32 tensor (float32 with `dtype="float32"`)
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
    block : (n,) uint8 tensor or None
        The page-locked memory that all of these lie in, if they do.
    """

    tokens: torch.Tensor
    masked: torch.Tensor | None
    t: torch.Tensor
    cell: torch.Tensor
    labels: dict[str, torch.Tensor]
    library: torch.Tensor
    valid: torch.Tensor | None = None
    block: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.cell.shape[0])

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; from page-locked memory in one copy, for which nobody waits: hold the batch until it is done."""
        moved = None if self.block is None else self.block.to(device, non_blocking=True)

        def there(part: torch.Tensor | None) -> torch.Tensor | None:
            if part is None or moved is None:
                return part if part is None else part.to(device, non_blocking=True)
            start, size = part.storage_offset() * part.element_size(), part.numel() * part.element_size()
            return moved[start : start + size].view(part.dtype).view(part.shape)

        fields: dict[str, Any] = {name: there(getattr(self, name)) for name in ("tokens", "masked", "t", "cell", "library", "valid")}
        return Batch(**fields, labels={name: codes for name, own in self.labels.items() if (codes := there(own)) is not None}, block=moved)


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
