"""What a user does with a model: impute, denoise, generate and embed cells. AnnData in, AnnData out.

Every prediction is the model's posterior p(hidden genes | visible genes) of a cell; the tasks differ in what they hide.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from sedd.config import ReadingSettings
from sedd.errors import UserError
from sedd.inference import posterior
from sedd.inference import similar_cells as similar
from sedd.inference.applying import Data, all_arguments, described, for_each_batch, in_obsm
from sedd.inference.cells import Cells
from sedd.inference.new_genes import with_new_genes
from sedd.inference.output_file import assemble
from sedd.inference.output_parts import open_parts
from sedd.inference.output_place import check_output
from sedd.inference.posterior import AVERAGE, TaskBatch, labels_as_if, spans_of_batches
from sedd.inference.pretrained import Pretrained
from sedd.io.format.json_table import unpacked_table
from sedd.kernels.mask import exact_mask
from sedd.options import check_seed, keywords_of


@keywords_of(ReadingSettings)
def impute(
    model: Pretrained | str | Path,
    data: Data,
    *,
    predict: Sequence[str] = (),
    hide: float = 0.0,
    cells: str = "all",
    layer: str | None = None,
    raw: bool = False,
    num_samples: int = 0,
    num_steps: int = 32,
    sampler: str = "analytic",
    folds: int = 4,
    batch_size: int = 256,
    seed: int = 0,
    new_genes: Sequence[str] = (),
    gene_embeddings: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **reading: Any,
) -> ad.AnnData:
    """Predict unobserved entries from the observed genes of the same cell.

    Genes of the panel that `data` lacks are unknown: hidden throughout, and predicted. What else counts as unobserved: the
    genes named in `predict` and a random share `hide` of each cell's genes; when both are empty, the zeros, each of which is
    predicted while it and a random 1/`folds` of the cell's genes are hidden (a zero that is shown is evidence of itself).

    Parameters
    ----------
    model
        A checkpoint, the directory of a run or a loaded model.
    data
        Cells by genes, raw counts; genes are matched by name. Of a path only a window of cells is read at a time.
    predict
        Genes to predict in every cell.
    hide : float in [0, 1)
        Share of each cell's genes to hide, for measuring how well they are recovered.
    cells : {"all", "train", "val"}
        Which cells of the data that the model was trained on.
    layer, raw
        Take counts from this layer, from X itself if it is "X", or from `.raw`. From where the training data had them if not given.
    num_samples
        Also draw this many joint samples of the hidden genes; their mean and spread are reported beside the closed-form
        mean of each gene by itself.
    num_steps, sampler
        Of the reverse process that draws them.
    folds, batch_size, seed
        See above; cells at a time; of the random choices.
    new_genes
        Genes of `data` that the model was not trained on; it knows them by their vectors.
    gene_embeddings
        A file of these vectors, for a model trained with `gene_embeddings`.
    output
        Write to this .h5ad or .zarr, a block of cells at a time, in place of keeping the result in memory. Processes of
        `accelerate launch` share the cells.
    resume
        Complete an `output` that was left unfinished; all arguments must be the same. The result is that of one run. Where the data
        were mended since, only the cells that changed are made again.
    overwrite
        Replace an `output` that is there, or start an unfinished one again.
    progress
        Show a bar.
    **reading
        Fields of `sedd.config.ReadingSettings`: modality, names of genes, rounding, what is left out. Where one is not given the data
        are read as those of the training were.

    Returns
    -------
    imputed : AnnData, cells x panel
        `X` float32: observed counts as they were, posterior means where hidden. `layers["counts"]`: the input.
        `layers["sedd_hidden"]`: 1 where predicted. `layers["sedd_std"]`: posterior standard deviation there. With samples,
        `layers["sedd_sample_k"]`, and `layers["sedd_mean"]` and `["sedd_std"]` are theirs. `uns["sedd"]`: what was done.
        obs, var, obsm and the rest of uns are those of the input. With `output`, these alone; the rest is in the file.

    Raises
    ------
    UserError
        On bad input.

    Examples
    --------
    >>> imputed = sedd.impute(model, adata, predict=["FOXP3", "IL2RA"])  # doctest: +SKIP
    """
    arguments = all_arguments(locals())
    check_output(output, overwrite=overwrite, resume=resume, data=data)
    model = with_new_genes(arguments)
    model.check_knows_masks("Imputation")
    posterior.check_draws(folds, num_samples)
    if not 0 <= hide < 1:
        raise UserError(f"--hide is {hide}; expected a share from 0 up to 1, such as 0.15.")
    reverse = model.sampler(sampler, num_steps=num_steps, batch_size=batch_size)
    chosen = _gene_mask(model, arguments["predict"])
    count = round(hide * len(chosen))
    if hide and not count:
        raise UserError(f"--hide is {hide:g}, which is none of the model's {len(chosen)} genes; expected at least {1 / len(chosen):.1g}.")
    zeros = not chosen.any() and not count

    def predict_batch(here: TaskBatch) -> dict[str, np.ndarray]:
        draws: Iterator[np.ndarray]
        if zeros:
            mean, std, _ = posterior.cross_predict(model, here, folds, 1, seed)
            hidden = here.counts == 0
            draws = (posterior.cross_draw(model, reverse, here, folds, k, seed) for k in range(num_samples))
        else:
            hidden = np.broadcast_to(chosen | here.missing, here.counts.shape).copy()
            if count:
                hidden |= exact_mask(seed, 0, here.cells, len(chosen), count)
            mean, std = posterior.predict(model, here, hidden)
            seeds = (posterior.sample_seed(seed, k) for k in range(num_samples))
            draws = (posterior.draw_hidden(model, reverse, here, hidden, at) for at in seeds)
        samples = {f"sedd_sample_{k}": np.where(hidden, values, here.counts) for k, values in enumerate(draws)}
        spread = {"sedd_std": np.where(hidden, std, 0).astype(np.float32), **posterior.spread_of(samples.values())}
        values = np.where(hidden, mean, here.counts).astype(np.float32)
        return {"X": values, "counts": here.counts, "sedd_hidden": hidden.astype(np.uint8), **samples, **spread}

    what = "zeros" if zeros else f"{hide:.0%} of the genes" if count else "chosen genes"
    details = {"hidden": what, "hide": hide, "num_samples": num_samples, "seed": seed}
    return for_each_batch("impute", model, arguments, predict_batch, details)


@keywords_of(ReadingSettings)
def denoise(
    model: Pretrained | str | Path,
    data: Data,
    *,
    cells: str = "all",
    layer: str | None = None,
    raw: bool = False,
    rounds: int = 4,
    folds: int = 4,
    own_counts: str = "learned",
    similar_cells: str = "learned",
    log1p: bool = False,
    as_if: Mapping[str, str] | None = None,
    num_samples: int = 0,
    num_steps: int = 32,
    sampler: str = "analytic",
    batch_size: int = 256,
    seed: int = 0,
    new_genes: Sequence[str] = (),
    gene_embeddings: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **reading: Any,
) -> ad.AnnData:
    """Replace every count by the rate behind it, estimated from the whole cell.

    Each gene of a cell is hidden once a round, together with a random 1/`folds` of the others, and predicted from the rest;
    predictions are averaged over `rounds` random partitions. They are averaged with those of similar cells, and the count itself then updates them.

    Parameters
    ----------
    model, data, cells, layer, raw, num_steps, sampler, batch_size, seed, new_genes, gene_embeddings, output, resume, overwrite, progress
        As in `impute`.
    rounds, folds
        More rounds average more random visible subsets; more folds show more of the cell each time.
    own_counts
        How much an entry's own count has a say in it. "full": a count is Poisson around its rate, so the law of the count, a mixture of negative binomials, is
        a mixture of gamma laws of the rate, and its posterior is one too. That takes all by which a count is off the prediction, but for chance, for the
        cell's own, also what its measurement did. "learned": of each gene the share of it that is found again in the cells of the data that are most
        similar, at least a tenth; of fewer than 100 cells a tenth. "none": the other genes alone. It has no say where a token is not a count (any `--binning` but counts).
    similar_cells
        "learned": the prediction is averaged with those of cells that make the counts about as probable, and moved by what these have counted. "none": the
        cell alone. They have no say among fewer than 100 cells, and where `own_counts` is not learned or has no say.
    log1p
        Also give the posterior predictive mean of `log1p(CP10k)`: what to expect of the same cells if they were measured once more. An
        own count has its full say in it, unless `own_counts` is "none".
    as_if
        Labels of condition columns, such as {"batch": "b1"}: what each count would be if the cell had that label and everything else
        that is seen of it were the same. "average" in place of a label averages over all labels of the column. An entry's own count was
        measured under the label that the cell has, so it has then no say in it.
    num_samples
        Also draw every entry this many times, the parts of a partition jointly; mean and spread of the draws are reported.
    **reading
        How the data are read; as those of the training were, where one is not given:

    Returns
    -------
    denoised : AnnData, cells x panel
        `X` float32: expected counts. `layers["counts"]`: the input. `layers["sedd_std"]`: standard deviation of the rate, or
        by the other genes alone that of the count. `layers["sedd_log1p"]` if asked for. With samples (by the other genes), `layers["sedd_mean"]` and `["sedd_std"]` are those of the draws. With `output`, as in `impute`.

    Raises
    ------
    UserError
        On bad input.

    Examples
    --------
    >>> denoised = sedd.denoise(model, adata, as_if={"batch": "b1"})  # doctest: +SKIP
    """
    arguments = all_arguments(locals())
    check_output(output, overwrite=overwrite, resume=resume, data=data)
    model = with_new_genes(arguments)
    model.check_knows_masks("Denoising")
    posterior.check_draws(folds, num_samples, rounds)
    given = labels_as_if(model, as_if or {})
    if own_counts not in ("learned", "full", "none"):
        raise UserError(f"--own_counts is {own_counts!r}; expected learned, full or none.")
    if similar_cells not in ("learned", "none"):
        raise UserError(f"--similar_cells is {similar_cells!r}; expected learned or none.")
    if model.binning.kind != "counts" or as_if:
        own_counts = "none"
    similar_cells = similar_cells if own_counts == "learned" else "none"
    share = None if own_counts == "none" else np.ones(len(model.genes))
    moved: similar.Moved | None = None
    if num_samples and len(given) > 1:
        raise UserError("--num_samples draws cells under one label, and --as_if asks for the average over several; name one label, or leave draws out.")
    reverse = model.sampler(sampler, num_steps=num_steps, batch_size=batch_size)

    def predict_batch(here: TaskBatch) -> dict[str, np.ndarray]:
        found = (posterior.cross_predict(model, here.under(codes), folds, rounds, seed, own_share=share, moved=moved, log1p=log1p) for codes in given)
        mean, std, log = posterior.averaged(found)
        layers = {"sedd_std": std.astype(np.float32)}
        if log is not None:
            layers["sedd_log1p"] = log.astype(np.float32)
        drawn = here.under(given[0])
        draws = (posterior.cross_draw(model, reverse, drawn, folds, k, seed) for k in range(num_samples))
        return {"X": mean.astype(np.float32), "counts": here.counts, **layers, **posterior.spread_of(draws)}

    def learn(chosen: Cells, labels: Sequence[str] | None) -> dict[str, Any]:
        nonlocal share, moved
        share, moved, facts = similar.learn(model, chosen, labels, arguments)
        return facts

    details: dict[str, Any] = {"rounds": rounds, "folds": folds, "own_counts": own_counts, "similar_cells": similar_cells, "num_samples": num_samples, "seed": seed}
    details |= {"as_if": dict(as_if)} if as_if else {}
    return for_each_batch("denoise", model, arguments, predict_batch, details, first=learn if own_counts == "learned" else None)


def generate(
    model: Pretrained | str | Path,
    n: int = 500,
    *,
    where: dict[str, str] | None = None,
    library_size: float | None = None,
    guidance: float = 1.0,
    num_steps: int = 32,
    sampler: str = "analytic",
    temperature: float = 1.0,
    order: str = "random",
    batch_size: int = 256,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> ad.AnnData:
    """Draw new cells from the model.

    Parameters
    ----------
    model
        As in `impute`.
    n
        Number of cells.
    where
        Labels of condition columns, such as {"cell_type": "B cell"}; columns left out are not conditioned on.
    library_size
        Total count over the panel to ask for, in a model conditioned on it. If None, totals of training cells are asked for,
        or, with `where`, none: the model then draws one that goes with the labels.
    guidance
        Strength of classifier-free guidance; 1 is the conditional model itself.
    num_steps, sampler, temperature, order
        Of the reverse process: more steps let genes agree better; a temperature below 1 sharpens; the order "confidence" is
        biased (`sedd.sampling.Sampler`).
    batch_size, seed, output, resume, overwrite, progress
        As in `impute`.

    Returns
    -------
    generated : AnnData, n x panel
        `X` float32 of counts, CSR where most of them are 0; obs holds the labels asked for.

    Raises
    ------
    UserError
        If a label or column is not known to the model, or a number is out of range.

    Examples
    --------
    >>> made = sedd.generate(model, 500, where={"cell_type": "B cell"})  # doctest: +SKIP
    """
    arguments = dict(locals())
    check_output(output, overwrite=overwrite, resume=resume)
    model = Pretrained.load(model)
    if n < 1:
        raise UserError(f"-n is {n}; expected at least one cell.")
    where = where or {}
    unknown = [column for column in where if column not in model.categories]
    if unknown:
        there = ", ".join(model.categories) or "none (train with --condition COLUMN)"
        raise UserError(f"the model is not conditioned on {unknown[0]!r}; its condition columns are: {there}.")
    by_library = model.model.config["condition_library"]
    check_seed(seed)
    if library_size is not None and not by_library:
        raise UserError("--library_size needs a model trained with --condition_library_size; this one was not.")
    if library_size is not None and not 0 < library_size < float("inf"):
        raise UserError(f"--library_size is {library_size:g}; expected a total count above 0, such as 2000.")
    if guidance != 1 and not where and not by_library:
        raise UserError(f"--guidance is {guidance} and there is nothing to be guided by; give --where COLUMN=LABEL or leave it at 1.")
    codes = [
        model.condition_codes(column, np.array([where[column]] if column in where else [None], object), asked=True)[0]
        for column in model.categories
    ]
    n_vars, mask = len(model.genes), model.binning.n_bins
    steps = {"num_steps": num_steps, "temperature": temperature, "guidance": guidance, "order": order}
    reverse = model.sampler(sampler, **steps, batch_size=batch_size)
    totals = np.full(n, np.nan if library_size is None else library_size)
    if by_library and library_size is None and not where:  # else the model draws totals that go with the labels
        # One total from each n-th of the training cells, in random order: few cells have the spread of many.
        rng = np.random.default_rng(seed)
        place = (rng.permutation(n) + rng.random(n)) / n
        totals = model.libraries[(place * len(model.libraries)).astype(np.int64)]
    asked = {column: model.categories[column][code - 1] for column, code in zip(model.categories, codes, strict=True) if code}
    obs = pd.DataFrame(asked, index=[f"generated_{i}" for i in range(n)])
    var = unpacked_table(model.state["var"], pd.Index(model.genes))
    details = {"n": n, "num_steps": num_steps, "sampler": sampler, "temperature": temperature, "guidance": guidance}
    with open_parts("generate", model, arguments, n) as parts:
        for lo, hi in spans_of_batches(parts.spans, batch_size, "generate", progress, parts.done):
            context: dict[str, Any] = {"condition": None, "library": None}
            if codes:
                context["condition"] = torch.tensor([codes] * (hi - lo), device=model.device)
            if by_library:
                total = np.log(np.maximum(totals[lo:hi], 1))
                context["library"] = torch.as_tensor(total, dtype=torch.float32, device=model.device)
            start = torch.full((hi - lo, n_vars), mask, device=model.device)
            tokens = reverse.sample(start, seed=seed, cells=np.arange(lo, hi), **context)
            parts.add(lo, X=sp.csr_matrix(model.binning.decode(tokens.cpu().numpy()).astype(np.float32)))
        done = described(model, "generate", {**details, "seed": seed})
        return assemble(output, {"obs": obs, "var": var, "uns": {"sedd": done}}, parts)


@keywords_of(ReadingSettings)
def embed(
    model: Pretrained | str | Path,
    data: Data,
    *,
    cells: str = "all",
    layer: str | None = None,
    raw: bool = False,
    without: Sequence[str] = (),
    batch_size: int = 256,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **reading: Any,
) -> ad.AnnData:
    """Put the state of the network for each cell beside it.

    The distance of two cells is that of the log1p(CP10k) that the model expects their genes to have, to first order; with full attention it
    is of the plain state.

    Parameters
    ----------
    model, data, cells, layer, raw, batch_size, resume, overwrite, progress
        As in `impute`.
    without
        Condition columns, such as a batch, that the embedding is to be without: it is the mean over all labels of them. What the genes
        themselves say of them stays.
    output
        An .h5ad or .zarr: with `cells="all"` and data of the same kind a copy of the file (of a store, a store), of which no more
        than a window of cells is in memory; else the cells are held in memory.
    **reading
        How the data are read; as those of the training were, where one is not given:

    Returns
    -------
    embedded : AnnData
        The input with `obsm["X_sedd"]`, (n_obs, hidden_dim) float32. With `output`, its obs, var and uns alone.

    Raises
    ------
    UserError
        On bad input.

    Examples
    --------
    >>> adata = sedd.embed(model, adata, without=["batch"])  # doctest: +SKIP
    """
    arguments = all_arguments(locals())
    check_output(output, overwrite=overwrite, resume=resume, data=data)
    model = Pretrained.load(model)
    without = arguments["without"]
    as_if = arguments["as_if"] = dict.fromkeys(without, AVERAGE)
    given, basis = labels_as_if(model, as_if), model.model.embedding_basis()

    def embed_batch(here: TaskBatch) -> dict[str, np.ndarray]:
        if here.missing.any():
            model.check_knows_masks("Embedding cells that lack genes of the model")
        shown, hidden = here.hide(np.zeros(here.counts.shape, bool), model.binning.n_bins)
        with torch.no_grad():
            states = [model.model.embed(shown, model.sigma(hidden), **here.under(codes).context, basis=basis) for codes in given]
        return {"X_sedd": torch.stack(states).float().mean(0).cpu().numpy()}

    return for_each_batch("embed", model, arguments, embed_batch, {"without": np.asarray(list(without), dtype=object)} if without else {}, beside=in_obsm)


def _gene_mask(model: Pretrained, names: Sequence[str]) -> np.ndarray:
    unknown = [name for name in names if name not in set(model.genes)]
    if unknown:
        near = difflib.get_close_matches(unknown[0].casefold(), {str(gene).casefold(): gene for gene in model.genes}, 3, 0.8)
        alike = [str(gene) for gene in model.genes if str(gene).casefold() in near]
        raise UserError(
            f"--predict: the model does not know {unknown[:3]}; "
            + (f"did you mean {' or '.join(alike)}?" if alike else f"it has {len(model.genes)} genes, such as {', '.join(map(str, model.genes[:3]))}.")
        )
    return np.isin(model.genes.astype(str), list(names))
