"""A model goes over cells batch by batch, and what it makes of them becomes a new AnnData or is put beside the cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import numpy as np

from sedd import __version__
from sedd.config import ReadingSettings
from sedd.errors import UserError, warn_user
from sedd.inference.cells import Cells, open_cells, place_of_counts
from sedd.inference.output_file import Beside, assemble, attach, check_tables
from sedd.inference.output_parts import open_parts
from sedd.inference.posterior import TaskBatch, batches
from sedd.inference.pretrained import Pretrained
from sedd.inference.reading import reading_of
from sedd.inference.sources import Source, opened
from sedd.io.format.plain import column_called
from sedd.options import check_seed, grouped, recorded_path

Data: TypeAlias = ad.AnnData | str | Path


def all_arguments(own: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a task by name, those of how its data are read among them; one name is a list of it.

    Raises
    ------
    UserError
        If `as_if` is no mapping, the seed no seed, or what is read is said in no way that there is.
    """
    (reading,) = grouped(own["reading"], ReadingSettings)
    found = {**{name: value for name, value in own.items() if name != "reading"}, **asdict(reading)}
    for name in ("predict", "without", "given", "new_genes"):
        if isinstance(found.get(name), str):
            found[name] = [found[name]]
    if not isinstance(found.get("as_if") or {}, Mapping):
        raise UserError(f'as_if is {found["as_if"]!r}; expected columns and their labels, such as {{"batch": "b1"}}.')
    if "seed" in found:
        check_seed(found["seed"])
    return found


def in_obsm(made: dict[str, np.ndarray], cells: np.ndarray) -> Beside:
    """Put all that was made into obsm, under its names."""
    return Beside(obsm=made)


def for_each_batch(
    task: str,
    model: Pretrained,
    arguments: dict[str, Any],
    make: Callable[[TaskBatch], dict[str, np.ndarray]],
    details: dict[str, Any],
    *,
    beside: Callable[[dict[str, np.ndarray], np.ndarray], Beside] | None = None,
    first: Callable[[Cells, Sequence[str] | None], dict[str, Any]] | None = None,
) -> ad.AnnData:
    """Return what `make` gives for each batch of cells, put together.

    Parameters
    ----------
    arguments
        All arguments of the task. Of the labels in the data the model is given those of the columns `given`, if there is such an
        argument, else all that it knows, but those of `as_if`.
    details
        What the result's uns records of how it was made, beside which genes were missing.
    beside
        Where what was made of the cells is to be put beside them: gives its places, block by block of successive cells, from what was
        made of them and their numbers in the data. The model then sees cells whole. Else it is a new table.
    first
        What is to be learned from the cells before: is given them and the columns whose labels the model sees, and gives more details.
    """
    names = ("data", "cells", "layer", "raw", "batch_size", "output", "progress")
    data, cells, layer, raw, batch_size, output, progress = (arguments[name] for name in names)
    with opened(data, reading=reading_of(model, arguments)) as source:
        chosen = open_cells(model, source, cells, layer, raw, rounding=arguments["round"])
        for column in arguments.get("given") or ():
            if column_called(chosen.obs, column) is None:
                there = ", ".join(map(str, chosen.obs.columns)) or "none"
                raise UserError(f"--given {column}: {source.name} has no such obs column; there are: {there}.")
        before = source.record()
        if before is not None:
            details = {**details, "before": before}
        in_memory = isinstance(data, ad.AnnData)
        tables = chosen.tables() if beside is None or in_memory else {}
        if output is not None and in_memory:
            check_tables(source.name, {**tables, "uns": {**tables["uns"], "sedd": before or {}}})
        if beside is None:
            _warn_of_other_counts(model, source, layer, raw)
        if chosen.missing.any():
            details = {**details, "missing_genes": np.asarray(model.genes[chosen.missing], dtype=object)}
        labels = arguments.get("given")
        if labels is None:  # those that are replaced by others need not be known
            labels = [column for column in model.categories if column not in (arguments.get("as_if") or ())]
        if first is not None:
            details = {**details, **first(chosen, labels)}
        done = described(model, task, details)
        with open_parts(task, model, arguments, len(chosen)) as parts:
            empty = 0
            for here in batches(model, chosen, batch_size, task, progress, parts, whole=beside is not None, labels=labels):
                empty += int((~here.counts.any(1)).sum())
                parts.add(here.lo, here.digest, **here.made_alike(make))
            if empty:
                warn_user(
                    f"{source.name}: {empty} of its {len(chosen)} cells {'has' if empty == 1 else 'have'} no counts of the model's genes: what "
                    "comes out for them rests on zeros alone. Leave them out, as quality control does."
                )
            chosen.report_rounded()
            source.check_unchanged()
            if beside is None:
                chosen.report_inexact()
                return assemble(output, {**tables, "uns": {**tables["uns"], "sedd": done}}, parts)
            return attach(output, data, source, None if cells == "all" else chosen.indices, parts, done, beside)


def _warn_of_other_counts(model: Pretrained, source: Source, layer: str | None, raw: bool) -> None:
    """Say that the layer `counts` of a result is not that of the data, where it is not."""
    place = place_of_counts(model, source, layer, raw)
    if "counts" in source.layers and place != ("counts", False) and not source.same_values(place, ("counts", False)):
        where = ".raw" if place[1] else "X" if place[0] is None else f"the layer {place[0]}"
        warn_user(
            f"{source.name}: the model was given {where}, and that is what the layer counts of the result holds; the layer counts of the data "
            "has other values and is not in it. If those are the counts, pass --layer counts."
        )


def described(model: Pretrained, task: str, details: dict[str, Any]) -> dict[str, Any]:
    """Return what `uns["sedd"]` of a result records of how it was made."""
    done = {"task": task, "version": __version__, "checkpoint": recorded_path(model.path), "epoch": int(model.state["epoch"])}
    return {**done, "binning": model.binning.kind, **details}
