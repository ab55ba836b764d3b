"""How good a model is on cells that it never saw: metrics beside baselines, and the report."""

from __future__ import annotations

import contextlib
import itertools
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from sedd import tasks
from sedd.binning import COUNT_KINDS
from sedd.checkpoint import unpack_histogram
from sedd.config import ReadingSettings
from sedd.errors import UserError, counted
from sedd.evaluation.step_curve import step_curve
from sedd.inference.cells import Cells, begins_as_trained_on, open_cells, training_data
from sedd.inference.output_place import check_report
from sedd.inference.posterior import batches
from sedd.inference.pretrained import Pretrained
from sedd.inference.reading import reading_of
from sedd.inference.sources import opened
from sedd.io.files import write_json
from sedd.io.format.histogram import rows_with
from sedd.io.format.plain import column_called
from sedd.io.outputs import only_writer_in
from sedd.kernels.mask import exact_mask
from sedd.likelihood import CellBatch, LibraryPrior, confidence_interval, nelbo
from sedd.metrics import CountBaselines, generation_table, likelihood_table, recovery_table, visible_library
from sedd.metrics.generation import MIN_CELLS
from sedd.options import check_seed, grouped, keywords_of, recorded_path
from sedd.report.figures import subsample
from sedd.report.page import write_report
from sedd.report.plots import ReportData

REPORT_FILES = ("metrics.json", "steps.json", "report.html")
"""What `evaluate` writes."""

LEAST_GENES = 20
"""Cells with counts of fewer genes may be alike by chance."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found.

    Attributes
    ----------
    metrics : {section: {metric: {"sedd": value, "baselines": {name: value}, ...}}}
        Sections likelihood, imputation, generation; see `sedd.metrics.METRICS`.
    report : Path or None
        The page, if a directory was given.
    notes : list of str
        What was not measured, and why.
    steps : list of dict
        Generation metrics by number of sampling steps; see `sedd.evaluation.step_curve.step_curve`.
    shown : ReportData
        What the page and `sedd.pl.report` show.
    """

    metrics: dict[str, Any]
    report: Path | None = None
    arrays: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    shown: ReportData = field(default_factory=ReportData, repr=False)


@keywords_of(ReadingSettings)
def evaluate(
    model: Pretrained | str | Path,
    data: tasks.Data,
    *,
    output: str | Path | None = None,
    cells: str | None = None,
    layer: str | None = None,
    raw: bool = False,
    imputed: tasks.Data | None = None,
    generated: tasks.Data | None = None,
    hide: float | None = None,
    n_masks: int = 32,
    max_cells: int = 20_000,
    num_steps: int = 32,
    steps: Sequence[int] = (1, 4, 16),
    umap: bool = True,
    batch_size: int = 256,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    **reading: Any,
) -> Evaluation:
    """Measure likelihood, imputation and generation on held-out cells, beside baselines learned on the training cells.

    Parameters
    ----------
    model
        A checkpoint, the directory of a run or a loaded model.
    data
        The data of the training run, whose validation cells are then used, or other cells on the same genes.
    output
        Directory for metrics.json, steps.json, report.html and its figures.
    cells : {"val", "all"}, optional
        Which cells to evaluate; "val" for the data of the training run, else "all".
    layer, raw, **reading
        As in `sedd.impute`.
    imputed
        What `impute(..., hide=...)` made of the same cells; made here if not given.
    generated
        What `generate` made; as many cells as are held out are made here if not given.
    hide
        Share of genes to hide for imputation; the `mask_ratio` of the training run if not given.
    n_masks
        Masks per cell of the likelihood bound, stratified over the number of hidden genes.
    max_cells
        Of more held-out cells, and of more training cells for the baselines, a random sample of so many is measured; memory and time grow
        with it, and not with the data.
    steps
        Fewer sampling steps to try, for the curve of quality against steps.
    overwrite
        Replace these files in `output`.
    umap
        Draw a UMAP as well, where `umap-learn` is installed.
    num_steps, batch_size, seed, progress
        As in `sedd.generate`.

    Returns
    -------
    found : Evaluation
        `metrics`, a nested dict that `sedd.metrics.metrics_table` makes a table of; `steps`, a row per number of steps; `notes`, sentences
        that a reader should know; `report`, the path of the page, if `output` was given. `sedd.pl.report(found)` draws its figures.

    Raises
    ------
    UserError
        On bad input, before anything is written.

    Examples
    --------
    >>> found = sedd.evaluate(model, adata, output="report")  # doctest: +SKIP
    >>> print(sedd.metrics.metrics_table(found.metrics))  # doctest: +SKIP
    """
    grouped(reading, ReadingSettings)  # refuses what is no setting
    check_seed(seed)
    if any(number < 1 for number in steps):
        raise UserError(f"--steps is {' '.join(map(str, steps))}; expected numbers of sampling steps, such as 1 4 16.")
    if max_cells < MIN_CELLS:
        raise UserError(f"--max_cells is {max_cells}; expected at least {MIN_CELLS}, as cells are compared with one another.")
    check_report(output, REPORT_FILES, overwrite=overwrite)
    model = Pretrained.load(model)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(opened(data, reading=reading_of(model, reading)))
        own, rounding = begins_as_trained_on(source.obs.index, model.state), bool(reading.get("round"))
        part = cells or ("val" if own else "all")
        held_out = open_cells(model, source, part, layer, raw, rounding=rounding)
        if own:
            train = open_cells(model, source, "train", layer, raw, rounding=rounding)
        else:
            trained = opened(training_data(model, source.name, "the baselines are learned on its training cells"), reading=reading_of(model, {}))
            train = open_cells(model, stack.enter_context(trained), "train", None)
        names, notes = held_out.obs.index, []
        held_out.hide(train.missing_in_some)
        sample = _sample(held_out, max_cells, seed)
        for kind, chosen, taken in (("held-out", held_out, sample), ("training", train, _sample(train, max_cells, seed + 1))):
            if taken is not None:
                notes.append(f"Measured on {len(taken):,} of the {len(chosen):,} {kind} cells, drawn at random (--max_cells).")
                chosen.keep(taken)
        counts, train_counts = _matrix(held_out), _matrix(train)
        held_out.report_rounded()
        name = source.name
    if own and not _as_trained_on(model, train_counts):
        notes.append(
            "The data have the names of the training cells and other counts, and the validation cells were found by their names. If these are other cells, give them "
            "names of their own: adata.obs_names = 'new_' + adata.obs_names."
        )
    if seen := _seen(counts[:, ~held_out.missing], train_counts[:, ~held_out.missing]):
        notes.append(
            f"At least {seen:,} of the {counts.shape[0]:,} cells measured {'has' if seen == 1 else 'have'} the counts of a training cell, gene by gene: the model "
            "has seen them, so the numbers are better than of new cells. Evaluate on the data of the training, all of it, whose validation cells are then taken."
        )
    hidden = None
    if model.knows_masks:
        hide = hide if hide is not None else model.config.model.mask_ratio
        hidden = _hidden_entries(model, held_out, imputed, hide, seed, names, sample)
    if generated is None:  # what cannot be drawn with is said before hours of measuring
        model.sampler("analytic", num_steps=num_steps, batch_size=batch_size)

    likelihood, nats = _likelihood(model, held_out, counts, train_counts, n_masks, batch_size, seed, progress)
    metrics: dict[str, Any] = {"likelihood": likelihood}
    arrays: dict[str, Any] = {"nats": nats}
    if model.categories:
        notes.append(
            f"The NELBO and the imputation are given each cell's {', '.join(model.categories)}; the baselines are not."
        )
    if hidden is not None:
        metrics["imputation"], entries = _imputation(model, held_out, counts, train_counts, hidden, batch_size)
        arrays.update(entries)
    else:
        notes.append(
            "Imputation was not measured: the uniform graph, which the model was trained with, hides no genes."
        )
    if generated is None:
        generated = tasks.generate(
            model, max(len(held_out), MIN_CELLS), num_steps=num_steps, batch_size=batch_size, seed=seed, progress=progress
        )
    with opened(generated, "the generated cells") as given:
        fake = _matrix(Cells(given, model.genes, real=True))
        made = given.whole()
    known = ~held_out.missing
    if not known.all():
        notes.append(
            f"{(~known).sum()} of the model's {known.size} genes are not in the data, or not in all of its cells. They were masked throughout; the likelihood and "
            "all tables are of the others."
        )
        fake, counts, train_counts = fake[:, known], counts[:, known], train_counts[:, known]
    numbers = {"held out": counts.shape[0], "trained on": train_counts.shape[0], "generated": fake.shape[0]}
    few = [f"{counted(n, 'cell')} {'is' if n == 1 else 'are'} {kind}" for kind, n in numbers.items() if n < MIN_CELLS]
    curve: list[dict[str, Any]] = []
    if few:
        notes.append(
            f"Generation was not measured: {' and '.join(few)}, and cells are compared with one another, at least {MIN_CELLS} of each kind. "
            "Hold out more, by sedd train --val_fraction, or evaluate on other cells."
        )
    else:
        metrics["generation"] = generation_table(fake, counts, train_counts, seed=seed)
        if steps:
            curve = step_curve(model, made, counts, train_counts, known, steps, batch_size=batch_size, seed=seed, progress=progress)
    shown = _shown(model, metrics, arrays, notes, curve, (counts, fake, train_counts), held_out, made, name)
    found = Evaluation(metrics=metrics, arrays=arrays, notes=notes, steps=curve, shown=shown)
    return found if output is None else replace(found, report=_write(found, umap, Path(output)))


def _sample(cells: Cells, most: int, seed: int) -> np.ndarray | None:
    """Return places of `most` of the cells, in order; None where there are no more."""
    return None if len(cells) <= most else np.sort(np.random.default_rng(seed).choice(len(cells), most, replace=False))


def _matrix(cells: Cells) -> sp.csr_matrix:
    step = 1024
    blocks = [sp.csr_matrix(cells.counts(lo, min(lo + step, len(cells)))) for lo in range(0, len(cells), step)]
    return sp.vstack(blocks, format="csr")


def _as_trained_on(model: Pretrained, train: sp.csr_matrix) -> bool:
    """Whether genes are seen in as many cells of `train` as in those of the training; True where that cannot be told."""
    known = unpack_histogram(model.state["histogram"])
    counted_in = np.asarray(known.sum(axis=1)).ravel()  # fewer than all where a file lacks the gene
    if model.binning.kind not in COUNT_KINDS or train.shape[0] != counted_in.max():  # of many cells only some are here
        return True
    return bool((np.diff(train.tocsc().indptr) == counted_in - rows_with(known, 0)).all())


def _seen(counts: sp.csr_matrix, train: sp.csr_matrix) -> int:
    """Return how many cells have the very counts of a training cell; cells of few genes may be alike by chance and do not count."""

    def rows(matrix: sp.csr_matrix) -> Iterator[bytes]:
        for lo, hi in itertools.pairwise(matrix.indptr):
            if hi - lo >= LEAST_GENES:
                yield matrix.indices[lo:hi].astype(np.int64).tobytes() + matrix.data[lo:hi].tobytes()

    known = set(map(hash, rows(train)))
    return sum(hash(row) in known for row in rows(counts))


def _tokens(model: Pretrained, counts: sp.csr_matrix) -> np.ndarray:
    return model.binning.tokens(counts.toarray())


def _likelihood(
    model: Pretrained,
    cells: Cells,
    counts: sp.csr_matrix,
    train: sp.csr_matrix,
    n_masks: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the bound and the baselines: on counts, or on tokens where bins are not of whole numbers."""
    names, missing = torch.from_numpy(cells.indices), torch.from_numpy(cells.missing)
    given = (
        CellBatch(here.tokens, here.context["condition"], here.context["library"], names[here.lo : here.hi], missing)
        for here in batches(model, cells, batch_size, "likelihood", progress, whole=True)
    )
    per_cell = nelbo(model.model, model.graph, model.noise, given, n_masks=n_masks, seed=seed).per_cell
    of_counts = model.binning.kind in COUNT_KINDS
    given_total = per_cell
    totals = np.asarray(counts.sum(1)).ravel()
    by_total = (
        model.model.config["condition_library"] and not cells.missing.any()
    )  # which is unknown where genes are missing
    known = ~cells.missing
    counts, train = counts[:, known], train[:, known]
    if by_total:  # a function of the counts: paid for, p(x) is comparable again
        per_cell = given_total + LibraryPrior.fit(np.asarray(train.sum(1)).ravel()).nats(totals)
    if of_counts:
        baselines = CountBaselines.fit(train)
        rows = likelihood_table(baselines, per_cell, counts)
        if by_total:
            scaled = baselines.log_probs(
                np.arange(counts.shape[1])[None, :], counts.toarray().astype(np.int64), totals[:, None]
            )["NB, library-scaled"]
            rows["nats_per_cell_given_total"] = {
                "sedd": float(given_total.mean()),
                "ci": confidence_interval(given_total),
                "baselines": {"NB, library-scaled": -float(scaled.sum(1).mean())},
            }
    else:
        baselines = CountBaselines.fit(sp.csr_matrix(_tokens(model, train)))
        rows = likelihood_table(baselines, per_cell, sp.csr_matrix(_tokens(model, counts)))
        for row in rows.values():  # a count law says nothing about bins
            row["baselines"] = {"gene marginals": row["baselines"]["gene marginals"]}
    return rows, per_cell


def _hidden_entries(
    model: Pretrained, cells: Cells, imputed: tasks.Data | None, hide: float, seed: int, names: pd.Index, sample: np.ndarray | None
) -> np.ndarray:
    """Which entries of the `cells` were hidden, (n_cells, n_vars) bool; they are a `sample` of those of these `names`, if not all of them."""
    if imputed is None:
        if not 0 < hide < 1:
            raise UserError(f"--hide is {hide}; expected a share between 0 and 1, such as 0.15.")
        hidden = exact_mask(seed, 0, cells.indices, len(model.genes), max(1, round(hide * len(model.genes))))
    else:
        with opened(imputed) as made:
            if "sedd_hidden" not in made.layers or list(made.obs.index) != list(names):
                raise UserError(
                    f"--imputed: was not made from these {len(names)} cells by `sedd impute --hide`; expected the same cells "
                    "in the same order and the layer sedd_hidden. Leave --imputed out to have it made here."
                )
            hidden = made.rows("sedd_hidden").take(np.arange(len(cells)) if sample is None else sample).toarray().astype(bool)
    hidden[:, cells.missing] = False  # shown to nobody: there is no truth to compare with
    if not hidden.any():
        raise UserError("no entry is hidden, so there is nothing to recover; pass --hide 0.15.")
    return hidden


@torch.no_grad()
def _imputation(
    model: Pretrained, cells: Cells, counts: sp.csr_matrix, train: sp.csr_matrix, hidden: np.ndarray, batch_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Recovery of the hidden entries, and (true, mean, cdf) of each for the figures."""
    means, log_probs, belows = [], [], []
    for here in batches(model, cells, batch_size, "imputation", False):
        asked = hidden[here.lo : here.hi]
        shown, mask = here.hide(asked, model.binning.n_bins)
        readout = model.model.readout(shown, model.sigma(mask), **here.context)
        rows, genes = torch.from_numpy(asked).to(mask.device).nonzero(as_tuple=True)
        log_prob, at, mean = model.model.head.distribution(readout[rows, genes], genes, here.tokens[rows, genes])
        means.append(mean)
        log_probs.append(log_prob)
        belows.append(at)
    cell, gene = np.nonzero(hidden)
    true_counts = np.asarray(counts[cell, gene]).ravel()
    baselines = CountBaselines.fit(train)
    library = visible_library(counts, hidden | cells.missing, baselines.share)[cell]
    mean, log_p, below = np.concatenate(means), np.concatenate(log_probs), np.concatenate(belows)
    of_counts = model.binning.kind in COUNT_KINDS
    upto = np.minimum(below + np.exp(log_p), 1.0)
    table = recovery_table(
        baselines,
        gene=gene,
        true=true_counts.astype(np.int64) if of_counts else true_counts,
        predicted=mean,
        log_prob=log_p if of_counts else None,
        cdf_below=below if of_counts else None,
        cdf=upto if of_counts else None,
        library=library,
    )
    return table, {"hidden_true": true_counts, "hidden_mean": mean, "hidden_cdf_below": below, "hidden_cdf": upto}


def _shown(
    model: Pretrained,
    metrics: dict[str, Any],
    arrays: dict[str, Any],
    notes: list[str],
    steps: list[dict[str, Any]],
    matrices: tuple[sp.csr_matrix, sp.csr_matrix, sp.csr_matrix],
    held_out: Cells,
    made: ad.AnnData,
    name: str,
) -> ReportData:
    """Return what a report shows of an evaluation on the data of this name."""
    args = model.state["args"]
    real, fake, train = matrices
    settings = {
        "Data": {
            "data": recorded_path(name),
            "held-out cells": real.shape[0],
            "training cells": train.shape[0],
            "genes": real.shape[1],
        },
        "Model": {k: args[k] for k in ("attention", "hidden_dim", "num_layers", "num_latents", "objective")}
        | {"graph": model.config.model.graph, "noise": model.config.model.noise},
        "Training": {k: args[k] for k in ("batch_size", "learning_rate", "ema_decay", "num_bins", "binning", "seed")},
        "Run": {"checkpoint": recorded_path(model.path), "epochs": model.state["epoch"], "machine": platform.machine()},
    }
    column = next((c for c in model.categories if column_called(held_out.obs, c) is not None), None)
    (real, real_labels), (fake, fake_labels) = (  # no more of them is drawn, so no more is kept
        subsample(counts, None if column is None or (labels := column_called(obs, column)) is None else labels.astype(str).to_numpy()) for counts, obs in ((real, held_out.obs), (fake, made.obs))
    )
    sides: dict[str, Any] = {"real": real, "generated": fake, "reference": subsample(train)[0], "real_labels": real_labels, "generated_labels": fake_labels}
    return ReportData(
        title=f"A diffusion model of {Path(name).stem}",
        history=model.state["history"],
        metrics=metrics,
        settings=settings,
        notes=notes,
        steps=steps,
        **(sides if "generation" in metrics else {}),  # else too few cells to draw
        **{k: v for k, v in arrays.items() if k.startswith("hidden_")},
    )


def _write(found: Evaluation, umap: bool, output: Path) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(UserError), only_writer_in(output):  # removes what a killed process left, unless a run is at work there
        pass
    written: list[str] = []
    try:
        output.mkdir(exist_ok=True)  # as it is gone again where it was empty
        for name, value in (("metrics.json", found.metrics), ("steps.json", found.steps)):  # first, as they are small and took the time
            write_json(output / name, plain(value))
            written.append(name)
        return write_report(output / "report.html", found.shown, umap=umap)
    except OSError as error:
        for folder in (output / "figures", output):
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
        kept = f"The numbers are in {' and '.join(written)} there; make room and evaluate again with --overwrite" if written else "Make room and evaluate again"
        raise OSError(f"{output}: the report cannot be written ({error.strerror or error}). {kept}.") from error


def plain(value: Any) -> Any:
    """Nested containers of numbers as JSON has them; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
