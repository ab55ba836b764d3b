"""How probable cells are to a model, and how surprising among held-out cells of the same depth."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch

from sedd.config import ReadingSettings
from sedd.errors import UserError
from sedd.inference.applying import Data, all_arguments, for_each_batch
from sedd.inference.cells import Cells, begins_as_trained_on, open_cells, training_data
from sedd.inference.output_file import Beside
from sedd.inference.output_place import check_output
from sedd.inference.posterior import TaskBatch, batches
from sedd.inference.pretrained import Pretrained
from sedd.inference.reading import reading_of
from sedd.inference.sources import Source, opened
from sedd.io.format.plain import column_called
from sedd.likelihood import CellBatch, nelbo_and_excess
from sedd.metrics.surprise import MIN_REFERENCE, surprise
from sedd.options import keywords_of

MAX_REFERENCE = 2000
"""Cells to compare with, at most: evenly spaced ones of those that there are."""


@keywords_of(ReadingSettings)
def score(
    model: Pretrained | str | Path,
    data: Data,
    *,
    reference: Data | None = None,
    given: Sequence[str] = (),
    n_masks: int = 16,
    cells: str = "all",
    layer: str | None = None,
    raw: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **reading: Any,
) -> ad.AnnData:
    """Tell how improbable each cell is to the model, and how it stands among held-out cells of the same depth.

    Nats are larger for deeper cells and for types that have much to say, so cells are compared by what they cost *more* than the
    model expected, given what it saw of them. A cell of a type that was not there in training, a doublet or one with counts of
    others costs more than expected. No label is looked at, but those of `given`.

    Parameters
    ----------
    model, data, cells, layer, raw, batch_size, seed, resume, overwrite, progress, **reading
        As in `sedd.impute`.
    reference
        Cells to compare with, read as `data` are; of more than 2,000 evenly spaced ones. The validation cells of the training run
        if not given. Genes that `data` lack, or some cells of a store, are hidden in all, so that like is compared with like.
    given
        Condition columns whose labels in `data`, and in the reference, the model is given: is a cell improbable as one of its type?
    n_masks
        Masks per cell of the bound, of sizes spread from one gene to all. They go by `seed` and the place of a cell in the call, so a cell
        that is scored in another place differs by chance; more masks make that less.
    output
        As in `sedd.embed`.
    **reading
        How the data are read; as those of the training were, where one is not given:

    Returns
    -------
    scored : AnnData
        The input with `obs["sedd_nats"]`, a bound on -log p of the cell's counts of the genes that are there, and
        `obs["sedd_surprise"]`, which share of the reference cells of about the same total count exceeds what was expected of it by less, in (0, 1). With
        `output`, its obs, var and uns alone.

    Raises
    ------
    UserError
        If there are no cells to compare with, or the model was never without what it would have to do without; and on bad input.

    Examples
    --------
    >>> adata = sedd.score(model, adata)  # doctest: +SKIP
    >>> strange = adata[adata.obs["sedd_surprise"] > 0.99]  # doctest: +SKIP
    """
    arguments = all_arguments(locals())
    given = arguments["given"]
    check_output(output, overwrite=overwrite, resume=resume, data=data)
    model = Pretrained.load(model)
    _check(model, given, n_masks)
    with contextlib.ExitStack() as stack:
        settings = reading_of(model, arguments)
        source = stack.enter_context(opened(data, reading=settings))
        asked = open_cells(model, source, cells, layer, raw, rounding=arguments["round"])
        own = reference is None and begins_as_trained_on(source.obs.index, model.state)
        others: Source
        if reference is not None:
            others = stack.enter_context(opened(reference, "the reference", reading=settings))
            known = open_cells(model, others, "all", layer, raw, rounding=arguments["round"])
        elif own:
            known = open_cells(model, source, "val", layer, raw, rounding=arguments["round"])
        else:
            path = training_data(model, source.name, "cells are compared with its validation cells, or with those of --reference FILE")
            others = stack.enter_context(opened(path, reading=reading_of(model, {})))
            known = open_cells(model, others, "val", None)
        _check_reference(known, asked, given)
        for one, other in ((known, asked), (asked, known)):  # what one cell lacks is hidden from all, so that like is compared with like
            one.hide(other.missing_in_some)
        if len(known) > MAX_REFERENCE:
            known.keep(np.linspace(0, len(known) - 1, MAX_REFERENCE).round().astype(np.int64))

        def score_batch(here: TaskBatch) -> dict[str, np.ndarray]:
            missing = here.missing | asked.missing
            # Not the total: what follows from it is no evidence of what a cell is.
            batch = CellBatch(here.tokens, here.context["condition"], None, torch.from_numpy(here.cells), torch.from_numpy(missing))
            nats, excess = nelbo_and_excess(model.model, model.graph, model.noise, [batch], n_masks=n_masks, seed=seed)
            totals = here.counts[:, ~missing].sum(1, dtype=np.float64)
            return {"nats": nats[:, None], "excess": excess[:, None], "totals": totals[:, None]}

        @functools.cache
        def compared_with() -> tuple[np.ndarray, np.ndarray]:
            found = [score_batch(here) for here in batches(model, known, batch_size, "reference", progress, labels=given)]
            excess, totals = (np.concatenate([part[name] for part in found])[:, 0] for name in ("excess", "totals"))
            return excess, totals

        def beside(made: dict[str, np.ndarray], cells: np.ndarray) -> Beside:
            excess, totals = compared_with()
            itself = None
            if own:
                at = np.searchsorted(known.indices, cells).clip(max=len(known) - 1)
                itself = np.where(known.indices[at] == cells, at, -1)
            share = surprise(made["excess"][:, 0], made["totals"][:, 0], excess, totals, itself)
            return Beside(obs={"sedd_nats": made["nats"][:, 0], "sedd_surprise": share})

        details = {"n_masks": n_masks, "seed": seed, "given": np.asarray(list(given), dtype=object), "n_reference": len(known)}
        return for_each_batch("score", model, arguments, score_batch, details, beside=beside)


def _check(model: Pretrained, given: Sequence[str], n_masks: int) -> None:
    model.check_knows_masks("Scoring")
    if n_masks < 1:
        raise UserError(f"--n_masks is {n_masks}; expected at least 1, such as 16.")
    for column in given:
        if column not in model.categories:
            there = ", ".join(model.categories) or "none (train with --condition COLUMN)"
            raise UserError(f"--given {column}: the model knows no such labels; its condition columns are: {there}.")
    if model.model.config["condition_library"] and not model.config.model.condition_dropout:
        raise UserError(
            f"{model.path}: was always given a cell's total in training, and is asked here to do without; expected a model trained with "
            "--condition_dropout above 0."
        )


def _check_reference(known: Cells, asked: Cells, given: Sequence[str]) -> None:
    if len(known) < MIN_REFERENCE:
        raise UserError(
            f"{known.name}: has {len(known)} cells to compare with; expected at least {MIN_REFERENCE}. Pass more with --reference FILE."
        )
    lacking = known.var.index[known.missing & ~asked.missing]
    if len(lacking):
        raise UserError(
            f"{known.name}: lacks {len(lacking)} genes of the model that {asked.name} has (first: {lacking[0]!r}), so the two do not "
            "compare; expected cells with these genes. Leave them out of the data, or pass another --reference."
        )
    for column in given:
        if column_called(known.obs, column) is None:
            raise UserError(f"--given {column}: {known.name}, whose cells are compared with, has no such obs column.")
