"""The training objectives: denoising score entropy, and cross-entropy at a fixed share of masked genes.

Score entropy: Lou, Meng and Ermon (2024, arXiv 2310.16834), with its constants, so that its value is a bound on the
likelihood in nats. For the absorbing graph and normalised probabilities mu of the clean bin it is
`dsigma r (-log mu_clean)` at a masked gene, which for log-linear noise is `-log mu_clean / t`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sedd.errors import UserError
from sedd.graph import Graph, UniformGraph
from sedd.noise import Noise

OBJECTIVES = ("score_entropy", "masked")
LABEL_EMPHASIS = 10.0
"""How many times its nats a label counts in the gradient: beside those of thousands of genes it would be learned too late."""


def score_entropy(graph: Graph, noise: Noise, log_score: Tensor, tokens: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """Denoising score entropy of each gene, constants included.

    Parameters
    ----------
    log_score : (B, n_vars, n_bins + 1)
        Any log scores; they need not come from normalised probabilities.
    tokens, clean : (B, n_vars) integer
        The noised and the clean cells.
    t : (B,) in (0, 1]

    Returns
    -------
    nats : (B, n_vars), of the dtype of `log_score`
        Its expectation over noised cells, integrated over t, bounds the negative log-likelihood. Given t and the noised
        cell, its expectation over clean cells is at least 0, and least at the true scores.
    """
    t = t.double()
    dsigma = noise.dsigma(t).to(log_score.dtype)
    return dsigma[:, None] * graph.score_entropy(log_score, tokens, clean, noise.sigma(t))


def hide(tokens: Tensor, masked: Tensor, mask_token: int) -> Tensor:
    """Return the tokens as int32 with `mask_token` where `masked`; the loader's uint8 may be too narrow for it."""
    return tokens.int().masked_fill(masked, mask_token)


def diffusion_loss(
    model: nn.Module,
    graph: Graph,
    noise: Noise,
    tokens: Tensor,
    masked: Tensor | None,
    t: Tensor,
    *,
    condition: Tensor | None = None,
    library: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: Tensor | None = None,
    missing: Tensor | None = None,
    objective: str = "score_entropy",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of one batch.

    Parameters
    ----------
    model
        Called once, through its `forward`, so that wrappers such as DistributedDataParallel see the call.
    tokens : (B, n_vars) integer
        Clean tokens.
    masked : (B, n_vars) bool
        The genes to hide, drawn with probability `noise.mask_probability(t)`, or of a fixed number for the objective
        "masked". The uniform graph has no use for it (None): it corrupts the tokens itself.
    t : (B,) in (0, 1]
        Of no use to the objective "masked".
    condition, library
        As in `SEDDTransformer.forward`.
    labels, label_weight : (B, columns) int64 and float, optional
        The true labels of cells, and one over the probability that each is hidden. Where `condition` hides a label that is known,
        its negative log-probability is part of the loss as that of a hidden gene is. Needs the absorbing graph.
    missing : (B, n_vars) bool, optional
        Genes that nobody counted in a cell: hidden there whatever `masked` says, and of no part in its loss, which is of the others. Needs the
        absorbing graph.
    objective
        "score_entropy" or "masked".
    generator
        Of the uniform graph's corruption; torch's global one if not given.

    Returns
    -------
    loss : scalar float32
        What to minimise: nats per gene, those of labels `LABEL_EMPHASIS` times.
    per_cell : (B,) float32, detached
        Nats per cell: an unbiased estimate of each cell's bound for "score_entropy"; for "masked" the mean
        cross-entropy of the hidden genes times the number of genes. Of genes that are not missing.

    Raises
    ------
    UserError
        If the objective is unknown or does not go with the graph.
    """
    given: dict[str, Any] = {"condition": condition, "library": library}
    if objective not in OBJECTIVES:
        raise UserError(f"unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}.")
    if isinstance(graph, UniformGraph):
        if objective == "masked":
            raise UserError("objective 'masked' needs the absorbing graph; found the uniform one.")
        if missing is not None:
            raise UserError("genes are missing, and the uniform graph hides none; expected the absorbing one.")
        sigma = noise.sigma(t.double())
        noised = graph.sample_transition(tokens.long(), sigma, generator=generator)
        log_mu = model(noised, sigma.float(), everywhere=True, **given)
        log_score = graph.log_score(log_mu.float(), noised, sigma)
        per_cell = score_entropy(graph, noise, log_score, noised, tokens.long(), t).sum(1)
    else:
        if masked is None:
            raise UserError("the absorbing graph needs to know which genes are masked; found masked=None.")
        sigma, weight = _noise_and_weight(noise, masked, t, missing, objective)
        hidden = hide(tokens, masked if missing is None else masked | missing, graph.mask_token)
        if labels is None:
            log_mu = model(hidden, sigma.float(), targets=tokens, **given)
            log_mu = log_mu if missing is None else log_mu.masked_fill(missing, 0)
            per_cell = -log_mu.float().sum(1) * weight.float()
        else:
            log_mu, log_nu = model(hidden, sigma.float(), targets=tokens, labels=labels, **given)
            log_mu = log_mu if missing is None else log_mu.masked_fill(missing, 0)
            weighted = log_nu if label_weight is None else log_nu * label_weight
            of_labels = -weighted.sum(1)
            per_cell = -log_mu.float().sum(1) * weight.float() + of_labels
            loss = per_cell + (LABEL_EMPHASIS - 1) * of_labels
            return loss.mean() / tokens.shape[1], per_cell.detach()
    return per_cell.mean() / tokens.shape[1], per_cell.detach()


def _noise_and_weight(noise: Noise, masked: Tensor, t: Tensor, missing: Tensor | None, objective: str) -> tuple[Tensor, Tensor]:
    """Return the noise that each cell looks as if it had, of all that is hidden from it, and what a hidden gene weighs, (B,) float64."""
    if missing is None:
        if objective == "masked":
            share = masked.double().mean(1)
            return noise.sigma_at(share), 1 / share.clamp(min=1 / masked.shape[1])
        return noise.sigma(t.double()), noise.unmask_rate(t.double())
    known = (~missing).double().mean(1)
    if objective == "masked":  # so many genes are hidden, of which some are not known
        share = (masked & ~missing).double().mean(1)
        return noise.sigma_at(share + 1 - known), known / share.clamp(min=1 / masked.shape[1])
    return noise.sigma_at(1 - known + known * noise.mask_probability(t.double())), noise.unmask_rate(t.double())
