"""A trained sedd model on a prepared task: the same cells, masks and molecules as its peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anndata
import numpy as np
import torch

from sedd import tasks
from sedd.errors import UserError
from sedd.inference import posterior
from sedd.inference.cells import open_cells
from sedd.inference.pretrained import Pretrained
from sedd.likelihood import CellBatch, nelbo
from sedd.sampling import AnalyticSampler


def aligned(model: Pretrained, counts: Any, genes: np.ndarray) -> anndata.AnnData:
    """Counts as an AnnData, after a check that the model has these genes and takes each count as a token of its own."""
    if set(model.genes) != set(genes):
        raise UserError(
            f"{model.path}: was trained on other genes than the task's {len(genes)}; train on what --export wrote, with "
            "--genes all."
        )
    adata = anndata.AnnData(counts.astype(np.float32))
    adata.var_names = genes
    return adata


def batches(
    model: Pretrained, adata: anndata.AnnData, batch_size: int = 64, *, whole: bool = False
) -> Iterator[tuple[int, int, Any, Any]]:
    """Tokens of successive cells in the task's gene order: (lo, hi, tokens, context)."""
    cells = open_cells(model, adata, "all", None)
    for here in posterior.batches(model, cells, batch_size, "quality", False, whole=whole):
        yield here.lo, here.hi, here.tokens, here.context


def gene_order(model: Pretrained, genes: np.ndarray) -> np.ndarray:
    """Where each gene of the task is in the model's panel."""
    position = {gene: i for i, gene in enumerate(model.genes)}
    return np.array([position[gene] for gene in genes])


def likelihood(model: Pretrained, adata: anndata.AnnData, n_masks: int, seed: int, *, whole: bool) -> np.ndarray:
    """Bound on the negative log likelihood of each cell's counts, nats; given their total if cells are seen `whole`."""
    given = (CellBatch(tokens, **context) for _, _, tokens, context in batches(model, adata, whole=whole))
    return nelbo(model.model, model.graph, model.noise, given, n_masks=n_masks, seed=seed).per_cell


@torch.no_grad()
def impute(model: Pretrained, adata: anndata.AnnData, hidden: np.ndarray) -> dict[str, np.ndarray]:
    """Predictive mean, log probability and `P(X < true)` of hidden entries, each (n_cells, n_vars), 0 where shown."""
    order = gene_order(model, adata.var_names.to_numpy())
    out = {name: np.zeros(hidden.shape) for name in ("mean", "log_prob", "cdf_below")}
    for lo, hi, tokens, context in batches(model, adata):
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        mask[:, order] = torch.from_numpy(hidden[lo:hi])
        shown = tokens.masked_fill(mask.to(tokens.device), model.binning.n_bins)
        readout = model.model.readout(shown, model.sigma(mask), **context)
        rows, genes = torch.from_numpy(hidden[lo:hi]).nonzero(as_tuple=True)
        columns = torch.from_numpy(order)[genes]
        where = (lo + rows.numpy(), genes.numpy())
        found = model.model.head.distribution(readout[rows, columns], columns, tokens[rows, columns])
        for name, values in zip(("log_prob", "cdf_below", "mean"), found, strict=True):
            out[name][where] = values
    return out


def denoise(model: Pretrained, adata: anndata.AnnData, seed: int) -> dict[str, np.ndarray]:
    """Denoised counts: by default, without similar cells, fast, with own counts in full, from the other genes alone, and by the mean of the logarithm."""
    settings: dict[str, Any] = {"seed": seed, "progress": False}
    made = tasks.denoise(model, adata, log1p=True, **settings)[:, adata.var_names]
    alone = tasks.denoise(model, adata, similar_cells="none", **settings)[:, adata.var_names]
    full = tasks.denoise(model, adata, own_counts="full", **settings)[:, adata.var_names]
    others = tasks.denoise(model, adata, own_counts="none", **settings)[:, adata.var_names]
    fast = tasks.denoise(model, adata, rounds=1, folds=2, **settings)[:, adata.var_names]
    return {
        "sedd": np.asarray(made.X, np.float64),
        "sedd, no similar cells": np.asarray(alone.X, np.float64),
        "sedd, one round of two folds": np.asarray(fast.X, np.float64),
        "sedd, own counts in full": np.asarray(full.X, np.float64),
        "sedd, other genes only": np.asarray(others.X, np.float64),
        "sedd, mean of the logarithm": np.expm1(np.asarray(made.layers["sedd_log1p"], np.float64)),
    }


class ForwardRateSampler(AnalyticSampler):
    """A common mistake, for comparison: genes are unmasked at the rate at which the forward process masks them.

    That rate is largest where nearly all is masked: of 100 steps the first unmasks 99.995 % of the genes, each drawn from
    its own distribution, where the right share is 1 %.
    """

    def survival(self) -> torch.Tensor:
        """Return the product over steps of `exp(-(t - s) dsigma(t))`, and 0 after the last."""
        t = 1 - torch.arange(self.num_steps, dtype=torch.float64) / self.num_steps
        curve = torch.exp(-self.noise.dsigma(t) / self.num_steps).cumprod(0)
        curve[-1] = 0
        return curve


def generate_by_forward_rate(model: Pretrained, n: int, num_steps: int, seed: int) -> np.ndarray:
    """Cells as that sampler draws them, (n, n_vars) in the order of the model's genes."""
    sampler = ForwardRateSampler(model.model, model.graph, model.noise, num_steps=num_steps)
    start = torch.full((n, len(model.genes)), model.graph.mask_token, device=model.device)
    return model.binning.decode(sampler.sample(start, seed=seed).cpu().numpy())
