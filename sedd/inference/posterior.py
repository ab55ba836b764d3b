"""Batches of cells through a model: posterior means and joint draws of the genes that are hidden."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sedd.errors import UserError, warn_user
from sedd.inference.cells import Cells
from sedd.inference.output_parts import Parts, check_batch_size
from sedd.inference.pretrained import Pretrained
from sedd.io.format.plain import column_called
from sedd.kernels.count_law_moments import Sums
from sedd.kernels.mask import exact_mask
from sedd.processes import is_main, launched
from sedd.sampling import AnalyticSampler, EulerSampler

_DRAWN = 1 << 20  # rounds from here on are the partitions of joint draws, those below of posterior means


def spans_of_batches(
    spans: list[tuple[int, int]], batch_size: int, task: str, progress: bool, done: int = 0, *, shared: bool = True
) -> Iterator[tuple[int, int]]:
    """Cut spans of cells into batches, under a bar of cells with the time left; a log gets a line every 20 seconds.

    Parameters
    ----------
    spans
        Successive cells (lo, hi).
    done
        How many cells were made before.
    shared
        The cells are one process's share. What all processes look at is not.
    """
    check_batch_size(batch_size)
    quiet = 0.5 if sys.stderr.isatty() else 20.0
    total = done + sum(hi - lo for lo, hi in spans)
    shown = progress and is_main()
    task += f", the share of one of {launched()} processes" if shared and launched() > 1 else ""
    with tqdm(
        total=total, initial=done, desc=task, unit="cell", disable=not shown, mininterval=quiet, dynamic_ncols=True
    ) as bar:
        for start, end in spans:
            for lo in range(start, end, batch_size):
                hi = min(lo + batch_size, end)
                yield lo, hi
                bar.update(hi - lo)


AVERAGE, MAX_LABELS = "average", 32
"""In place of a label: all labels in turn, or of more than 32 as many that are evenly spaced."""


def labels_as_if(model: Pretrained, as_if: Mapping[str, str]) -> list[dict[int, int]]:
    """Return the labels that all cells are given in turn, whose results are averaged: the column's number and the label's code.

    Parameters
    ----------
    as_if
        A label, or "average", of some condition columns. With two averages each label of one meets as many of the other.

    Raises
    ------
    UserError
        If a column or a label is not known to the model.
    """
    given: list[dict[int, int]] = [{}]
    for column, label in as_if.items():
        if column not in model.categories:
            there = ", ".join(model.categories) or "none (train with --condition COLUMN)"
            raise UserError(f"the model is not conditioned on {column!r}; its condition columns are: {there}.")
        known = model.categories[column]
        if label == AVERAGE and label not in known:
            codes = np.unique(np.linspace(1, len(known), min(MAX_LABELS, len(known))).round().astype(int)).tolist()
        else:
            codes = model.condition_codes(column, np.array([label], object), asked=True).tolist()
        number = list(model.categories).index(column)
        given = [{**one, number: code} for one in given for code in codes]
    every = -(-len(given) // MAX_LABELS)
    return given[::every]


@dataclass(frozen=True)
class TaskBatch:
    """Cells that go through the network together.

    Attributes
    ----------
    lo, hi
        Which of the cells of the task: lo .. hi - 1, or some of these.
    counts : (B, n_vars) float32
    tokens : (B, n_vars) int64 tensor
    cells : (B,) int64
        Their numbers in the data, which name their random draws.
    context
        What the model is conditioned on: "condition" and "library", each a tensor or None.
    missing : (n_vars,) or (B, n_vars) bool
        Genes that the data lack, or each cell: unknown, so always masked. Their counts and tokens mean nothing.
    """

    lo: int
    hi: int
    counts: np.ndarray
    tokens: torch.Tensor
    cells: np.ndarray
    context: dict[str, Any]
    missing: np.ndarray

    def digest(self) -> bytes:
        """Return a digest of all that the network is given of these cells."""
        found = hashlib.blake2b(digest_size=16)
        tensors = [value.cpu().numpy() for value in self.context.values() if value is not None]
        for array in (self.counts, self.cells, self.missing, *tensors):
            found.update(np.ascontiguousarray(array).data)
        return found.digest()

    def under(self, codes: Mapping[int, int]) -> TaskBatch:
        """Return the same cells with other labels: condition columns by number, and the code that all cells get."""
        if not codes:
            return self
        condition = self.context["condition"].clone()
        for column, code in codes.items():
            condition[:, column] = code
        return replace(self, context={**self.context, "condition": condition})

    def made_alike(self, make: Callable[[TaskBatch], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return what `make` gives, arrays with a row for each cell, asked of the cells that lack the same genes at a time."""
        if self.missing.ndim == 1:
            return make(self)
        kinds, kind_of = np.unique(self.missing, axis=0, return_inverse=True)
        found: dict[str, np.ndarray] = {}
        for number, missing in enumerate(kinds):
            rows = np.flatnonzero(kind_of.ravel() == number)
            context = {name: value if value is None else value[rows] for name, value in self.context.items()}
            alike = replace(self, counts=self.counts[rows], tokens=self.tokens[rows], cells=self.cells[rows], context=context, missing=missing)
            for name, values in make(alike).items():
                found.setdefault(name, np.empty((len(self.cells), *values.shape[1:]), values.dtype))[rows] = values
        return found

    def hide(self, hidden: np.ndarray, mask_token: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens with the hidden and the missing ones masked, and the mask, (B, n_vars) each."""
        hidden = hidden | self.missing
        mask = torch.from_numpy(hidden).to(self.tokens.device)
        if not hidden.any():
            return self.tokens, mask
        return self.tokens.masked_fill(mask, mask_token), mask


def batches(
    model: Pretrained,
    source: Cells,
    batch_size: int,
    task: str,
    progress: bool,
    parts: Parts | None = None,
    *,
    whole: bool = False,
    labels: Collection[str] | None = None,
) -> Iterator[TaskBatch]:
    """Successive cells, those that `parts` lack, or all.

    A model that takes totals is given them only if cells are seen `whole`: where entries are hidden, the total would give
    their sum away. Of the labels in the data it is given those of the columns `labels`, or of all if None.
    """
    warned = False

    def read(lo: int, hi: int) -> TaskBatch:
        nonlocal warned
        counts, missing = source.counts(lo, hi), source.missing_in(lo, hi)
        if not warned and model.binning.kind == "identity" and counts.max(initial=0) >= model.binning.n_bins:
            warn_user(
                f"{source.name}: has counts up to {counts.max():.0f} or more; the model has a bin for each count up to "
                f"{model.binning.n_bins - 1}, which larger ones share. Train with a larger --num_bins to tell them apart."
            )
            warned = True
        tokens = torch.from_numpy(model.binning.tokens(counts).astype(np.int64)).to(model.device)
        context: dict[str, Any] = {"condition": None, "library": None}
        if model.categories:
            columns = [
                model.condition_codes(name, known.iloc[lo:hi].to_numpy(object))
                if (known := column_called(source.obs, name)) is not None and (labels is None or name in labels)
                else np.zeros(hi - lo, np.int64)
                for name in model.categories
            ]
            context["condition"] = torch.from_numpy(np.stack(columns, 1)).to(model.device)
        if model.model.config["condition_library"]:
            total = np.log(np.maximum(counts.sum(1), 1)).astype(np.float32)
            # With genes missing the total over the panel is not known.
            total[missing.any(-1) if whole else ...] = np.nan
            context["library"] = torch.from_numpy(total).to(model.device)
        return TaskBatch(lo, hi, counts, tokens, source.indices[lo:hi], context, missing)

    spans, done = [(0, len(source))], 0
    if parts is not None:
        parts.compare(lambda lo, hi: read(lo, hi).digest())
        spans, done = parts.spans, parts.done
    for lo, hi in spans_of_batches(spans, batch_size, task, progress, done, shared=parts is not None):
        yield read(lo, hi)


@torch.no_grad()
def predict(model: Pretrained, here: TaskBatch, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and standard deviation of the hidden entries given the others, in one forward pass."""
    shown, mask = here.hide(hidden, model.binning.n_bins)
    mean, var = model.model.expectation(shown, model.sigma(mask), **here.context)
    found = _on_host(mean, var.clamp_min(0).sqrt())
    return found[0], found[1]


def cross_predict(
    model: Pretrained,
    here: TaskBatch,
    folds: int,
    rounds: int,
    seed: int,
    *,
    own_share: np.ndarray | None = None,
    moved: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
    log1p: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Predict every entry while it is hidden with a random 1/folds of the genes, averaged over rounds.

    Parameters
    ----------
    own_share : (n_vars,), optional
        How much an entry's own count has a say in it: its rate has the posterior law under the averaged one, given the count, with this
        probability, and else the averaged law itself. Not at all if None.
    moved
        Is given counts, rates by the other genes and numbers of the cells, and says where the rates are to be; spreads move in
        proportion. Only with an `own_share`.
    log1p
        Also give the expectation of `log1p(10,000 count / total)`, the total being that of the cell; with own counts the
        predictive one, of the count if the same cells were measured once more, in which an own count has its full say.

    Returns
    -------
    mean, std, log1p : (B, n_vars) float64
        Of the count, or with own counts of the rate behind it.
    """
    # Where own counts have all the say, nothing is asked of the others alone.
    asked = ["others"] if own_share is None else ["own"] if moved is None and (own_share == 1).all() else ["own", "others"]
    found, log = _cross_predict(model, here, folds, rounds, seed, asked, log1p=log1p)
    mean, std = found[0]
    if own_share is None or len(found) == 1:
        return mean, std, log
    mean_by_others, std_by_others = found[1]
    share = np.where(here.missing, 1.0, own_share)
    # Of a count, which is Poisson around its rate; what is missing has no count of its own, in either.
    spread = np.maximum(std_by_others**2 - mean_by_others, 0)
    both = share * mean + (1 - share) * mean_by_others
    std = np.sqrt(share * (std**2 + (mean - both) ** 2) + (1 - share) * (spread + (mean_by_others - both) ** 2))
    if moved is not None:
        times = moved(here.counts, mean_by_others, here.cells) / np.maximum(mean_by_others, 1e-30)
        both, std = both * times, std * times
    return both, std, log


def cross_predict_both(model: Pretrained, here: TaskBatch, folds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of `cross_predict` in one round: by the other genes, and with the own counts in full."""
    (own, _), (others, _) = _cross_predict(model, here, folds, 1, seed, ["own", "others"])[0]
    return others, own


@torch.no_grad()
def _cross_predict(
    model: Pretrained, here: TaskBatch, folds: int, rounds: int, seed: int, asked: Sequence[str], *, log1p: bool = False
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray | None]:
    """Mean and standard deviation by "own" counts too or by the "others" alone, of each that is asked; and the logarithm of the first."""
    n_vars = here.tokens.shape[1]
    known = ~here.missing
    tokens = here.hide(np.zeros(here.tokens.shape, bool), model.binning.n_bins)[0]
    per_count = 1e4 / np.maximum(here.counts[:, known].sum(1, dtype=np.float64), 1)
    device = tokens.device
    sums = [Sums.of_zeros(here.tokens.shape, log1p=log1p and name == asked[0], device=device) for name in asked]
    counts, scale, by_own = (torch.from_numpy(array).to(device) for array in (here.counts, per_count, known))
    for round_ in range(rounds):
        fold = _folds(seed, round_, np.zeros(1, np.int64), n_vars, folds)[0]
        parts = [np.flatnonzero(fold == k) for k in range(folds)]
        parts = [part for part in parts if len(part)]
        places = [torch.from_numpy(part).to(device) for part in parts]
        # A part is hidden in all cells, so the noise is that of one share.
        levels = [(here.missing.sum() + known[part].sum()) / n_vars for part in parts]
        sigmas = [model.noise.sigma_at(torch.full((len(tokens),), level, dtype=torch.float64)).float() for level in levels]
        sigmas = [sigma.to(device) for sigma in sigmas]
        readouts = model.model.readout_by_part(tokens, sigmas, places, **here.context)
        for place, readout in zip(places, readouts, strict=True):
            everywhere = torch.ones(readout.shape[:2], dtype=torch.bool, device=device)
            for name, one in zip(asked, sums, strict=True):
                given = {"by_own": by_own[place], "counts": counts[:, place]} if name == "own" else {}
                model.model.head.add_moments(one, readout, everywhere, genes=place, scale=scale, **given)
    logs = [sums[0].log1p / sums[0].evidence] if log1p else []
    found = _on_host(*(x for one in sums for x in one.mean_and_std()), *logs)  # the only copy from the device
    pairs = [(found[2 * k], found[2 * k + 1]) for k in range(len(asked))]
    return pairs, found[-1] if log1p else None


def _on_host(*tensors: torch.Tensor) -> np.ndarray:
    """Return tensors of one shape as one array (n, ...), in one copy."""
    return np.asarray(torch.stack(tensors).cpu().numpy())


def averaged(
    found: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return mean, standard deviation and expected logarithm of an even mixture of laws of which these are given."""
    means, stds, logs = zip(*found, strict=True)
    if len(means) == 1:
        return means[0], stds[0], logs[0]
    mean = np.mean(means, 0)
    std = np.sqrt(np.mean([s**2 + (m - mean) ** 2 for m, s in zip(means, stds, strict=True)], 0))
    return mean, std, None if logs[0] is None else np.mean(logs, 0)


def draw_hidden(
    model: Pretrained, sampler: AnalyticSampler | EulerSampler, here: TaskBatch, hidden: np.ndarray, seed: int
) -> np.ndarray:
    """One joint draw of the hidden entries given the others, decoded to counts, (B, n_vars)."""
    shown, _ = here.hide(hidden, model.binning.n_bins)
    return model.binning.decode(sampler.sample(shown, seed=seed, cells=here.cells, **here.context).cpu().numpy())


def cross_draw(
    model: Pretrained, sampler: AnalyticSampler | EulerSampler, here: TaskBatch, folds: int, k: int, seed: int
) -> np.ndarray:
    """Return the k-th draw of every entry, the parts of a random partition drawn jointly one after the other, (B, n_vars)."""
    fold = _folds(seed, _DRAWN + k, here.cells, here.tokens.shape[1], folds)
    out = np.zeros(here.tokens.shape, np.float32)
    for part in range(folds):
        hidden = fold == part
        drawn = draw_hidden(model, sampler, here, hidden, sample_seed(seed, k * folds + part))
        out[hidden] = drawn[hidden]
    return out


def check_draws(folds: int, num_samples: int, rounds: int = 1) -> None:
    """Check the partitions of a cell's genes, and how many draws are made.

    Raises
    ------
    UserError
        If there are fewer than 2 folds, no round, or a negative number of draws.
    """
    if num_samples < 0:
        raise UserError(f"--num_samples is {num_samples}; expected 0 or more.")
    if folds < 2 or rounds < 1:
        raise UserError(f"folds is {folds} and rounds {rounds}; expected at least 2 folds and 1 round.")


def _folds(seed: int, round_: int, cells: np.ndarray, n_vars: int, folds: int) -> np.ndarray:
    """Return a random partition of each cell's genes into `folds` parts of equal size, (B, n_vars)."""
    fold = np.zeros((len(cells), n_vars), np.int64)
    for k in range(1, folds):  # nested: the k * n / folds smallest hashes of a cell are the parts 0 .. k-1
        fold += ~exact_mask(seed, round_, cells, n_vars, k * n_vars // folds)
    return fold


def sample_seed(seed: int, k: int) -> int:
    """Return the seed of the k-th of several draws of the same cells."""
    return seed + 1_000_003 * (k + 1)


def spread_of(draws: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Layers of the mean and the standard deviation of draws that are seen one at a time (Welford 1962, which does not cancel)."""
    n, mean, second = 0, np.zeros(()), np.zeros(())
    for n, values in enumerate(draws, 1):
        before = values - mean
        mean = mean + before / n
        second = second + before * (values - mean)
    if not n:
        return {}
    return {"sedd_mean": mean.astype(np.float32), "sedd_std": np.sqrt(second / n).astype(np.float32)}
