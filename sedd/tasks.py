"""What a user does with a model: impute, denoise, generate and embed cells. AnnData in, AnnData out.

Every prediction is the model's posterior p(hidden genes | visible genes) of a cell; the tasks differ in what they hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from sedd import __version__
from sedd.binning import COUNT_KINDS, smoothed_log_shares
from sedd.errors import UserError
from sedd.inference import posterior
from sedd.inference.cells import Cells, cells_of_split, opened, read_anndata
from sedd.inference.output_file import assemble, attach
from sedd.inference.output_parts import identity, open_pieces
from sedd.inference.posterior import batches, spans_of_batches
from sedd.inference.pretrained import Pretrained
from sedd.kernels.mask import exact_mask
from sedd.nn.gene_vectors import read_gene_vectors
from sedd.sampling import make_sampler

Data: TypeAlias = ad.AnnData | str | Path


def impute(
    model: Pretrained | str | Path,
    data: Data,
    *,
    predict: Sequence[str] = (),
    hide: float = 0.0,
    cells: str = "all",
    layer: str | None = None,
    num_samples: int = 0,
    num_steps: int = 64,
    sampler: str = "analytic",
    folds: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> ad.AnnData:
    """Predict unobserved entries from the observed genes of the same cell.

    What counts as unobserved, first match wins: the genes of the panel that `data` lacks, those named in `predict` and a
    random share `hide` of each cell's genes; when all three are empty, the zeros, each of which is predicted while it and
    a random 1/`folds` of the cell's genes are hidden (a zero that is shown is evidence of itself).

    Parameters
    ----------
    model
        A checkpoint, an experiment directory or a loaded model.
    data
        Cells by genes, raw counts; genes are matched by name. Of a path only a window of cells is read at a time.
    predict
        Genes to predict in every cell.
    hide : float in [0, 1)
        Share of each cell's genes to hide, for measuring how well they are recovered.
    cells : {"all", "train", "val"}
        Which cells of the data that the model was trained on.
    layer
        Take counts from this layer instead of X.
    num_samples
        Also draw this many joint samples of the hidden genes; their mean and spread are reported beside the closed-form
        mean of each gene by itself.
    num_steps, sampler
        Of the reverse process that draws them.
    folds, batch_size, seed
        See above; cells at a time; of the random choices.
    output
        Write to this .h5ad or .zarr, a block of cells at a time, in place of keeping the result in memory. Processes of
        `accelerate launch` share the cells.
    resume
        Go on with an `output` that was begun with the same arguments and stopped; the result is that of one run.
    progress
        Show a bar.

    Returns
    -------
    imputed : AnnData, cells x panel
        `X` float32: observed counts as they were, posterior means where hidden. `layers["counts"]`: the input.
        `layers["sedd_hidden"]`: 1 where predicted. `layers["sedd_std"]`: posterior standard deviation there. With samples,
        `layers["sedd_sample_k"]`, and `layers["sedd_mean"]` and `["sedd_std"]` are theirs. `uns["sedd"]`: what was done.
        obs and var are those of the input. With `output`, obs, var and uns alone; the rest is in the file.

    Raises
    ------
    UserError
        On bad input.
    """
    model = Pretrained.load(model)
    model.check_knows_masks("Imputation")
    if not 0 <= hide < 1:
        raise UserError(f"--hide is {hide}; expected a share from 0 up to 1, such as 0.15.")
    reverse = _sampler(model, num_samples, sampler, num_steps, batch_size)
    with opened(data, layer or model.state["args"]["layer"]) as adata:
        source = open_cells(model, adata, cells, layer, _name(data))
        named = _gene_mask(model, predict) | source.missing
        zeros = not named.any() and hide == 0
        count = round(hide * len(named))
        what = "zeros" if zeros else "missing and chosen genes" if not count else f"{hide:.0%} of the genes"
        drawn_by = {"num_samples": num_samples, "num_steps": num_steps, "sampler": sampler}
        asked = {"predict": list(predict), "hide": hide, "cells": cells, "layer": layer, "folds": folds, "seed": seed}
        made_from = identity(model, data, output, resume, task="impute", batch_size=batch_size, **asked, **drawn_by)
        size = {"n_obs": len(source), "n_vars": len(named), "batch_size": batch_size}
        with open_pieces(output, made_from, resume=resume, **size) as pieces:
            for lo, hi, counts, tokens, context in batches(model, source, batch_size, "impute", progress, pieces):
                here = source.indices[lo:hi]
                hidden = np.broadcast_to(named, counts.shape).copy()
                if count:
                    hidden |= exact_mask(seed, 0, here, len(named), count)
                if zeros:
                    found = posterior.cross_predict(model, tokens, context, here, folds, 1, seed)
                    mean, std = found.mean, found.std
                    hidden = counts == 0
                else:
                    mean, std = posterior.predict(model, tokens, hidden, context)
                layers: dict[str, np.ndarray] = {"sedd_std": np.where(hidden, std, 0).astype(np.float32)}
                drawn = posterior.Moments()
                for k in range(num_samples):
                    if zeros:
                        values = posterior.cross_draw(model, reverse, tokens, context, here, folds, k, seed)
                    else:
                        at = posterior.sample_seed(seed, k)
                        values = posterior.draw_hidden(model, reverse, tokens, hidden, context, here, at)
                    layers[f"sedd_sample_{k}"] = np.where(hidden, values, counts)
                    drawn.add(layers[f"sedd_sample_{k}"])
                if num_samples:
                    layers |= {"sedd_mean": drawn.mean.astype(np.float32), "sedd_std": drawn.std.astype(np.float32)}
                values = np.where(hidden, mean, counts).astype(np.float32)
                pieces.add(lo, X=values, counts=counts, sedd_hidden=hidden.astype(np.uint8), **layers)
            details = {"hidden": what, "hide": hide, "num_samples": num_samples, "seed": seed}
            return assemble(output, source.obs, source.var, pieces, _described(model, "impute", details))


def denoise(
    model: Pretrained | str | Path,
    data: Data,
    *,
    cells: str = "all",
    layer: str | None = None,
    rounds: int = 4,
    folds: int = 4,
    own_counts: bool = True,
    log1p: bool = False,
    num_samples: int = 0,
    num_steps: int = 64,
    sampler: str = "analytic",
    batch_size: int = 64,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> ad.AnnData:
    """Replace every count by the rate behind it, as the whole cell tells it.

    Each gene of a cell is hidden once a round, together with a random 1/`folds` of the others, and predicted from the rest;
    predictions are averaged over `rounds` random partitions. The count itself then updates what the others say of it.

    Parameters
    ----------
    model, data, cells, layer, num_steps, sampler, batch_size, seed, output, resume, progress
        As in `impute`.
    rounds, folds
        More rounds average more random visible subsets; more folds show more of the cell each time.
    own_counts
        Whether an entry's own count has a say in it (`sedd.inference.posterior.Posterior.with_own_counts`), or the other genes
        alone. It has none where a bin is not a count (`--binning linear`, `log` or `quantile`).
    log1p
        Also give the posterior predictive mean of `log1p(CP10k)`: what to compare cells by on that scale, where
        the logarithm of a mean is too large. Like `X` it is by the count too, unless `own_counts` is off.
    num_samples
        Also draw every entry this many times, the parts of a partition jointly; mean and spread of the draws are reported.

    Returns
    -------
    denoised : AnnData, cells x panel
        `X` float32: expected counts. `layers["counts"]`: the input. `layers["sedd_std"]`: standard deviation of the rate, or
        by the other genes alone that of the count. `layers["sedd_log1p"]` if asked for. With samples (by the other genes), `layers["sedd_mean"]` and `["sedd_std"]` are those of the draws. With `output`, as in `impute`.
    """
    model = Pretrained.load(model)
    model.check_knows_masks("Denoising")
    posterior.check_folds(folds, rounds)
    own_counts = own_counts and model.binning.kind in COUNT_KINDS
    reverse = _sampler(model, num_samples, sampler, num_steps, batch_size)
    with opened(data, layer or model.state["args"]["layer"]) as adata:
        source = open_cells(model, adata, cells, layer, _name(data))
        asked = {
            "cells": cells,
            "layer": layer,
            "rounds": rounds,
            "folds": folds,
            "own_counts": own_counts,
            "log1p": log1p,
        }
        drawn_by = {"num_samples": num_samples, "num_steps": num_steps, "sampler": sampler, "seed": seed}
        made_from = identity(model, data, output, resume, task="denoise", batch_size=batch_size, **asked, **drawn_by)
        size = {"n_obs": len(source), "n_vars": len(model.genes), "batch_size": batch_size}
        with open_pieces(output, made_from, resume=resume, **size) as pieces:
            for lo, hi, counts, tokens, context in batches(model, source, batch_size, "denoise", progress, pieces):
                here = source.indices[lo:hi]
                found = posterior.cross_predict(model, tokens, context, here, folds, rounds, seed)
                mean, std = found.with_own_counts(counts) if own_counts else (found.mean, found.std)
                layers = {"sedd_std": std.astype(np.float32)}
                if log1p:
                    log = found.log1p_with_own_counts(counts) if own_counts else found.log1p
                    layers["sedd_log1p"] = log.astype(np.float32)
                drawn = posterior.Moments()
                for k in range(num_samples):
                    drawn.add(posterior.cross_draw(model, reverse, tokens, context, here, folds, k, seed))
                if num_samples:
                    layers |= {"sedd_mean": drawn.mean.astype(np.float32), "sedd_std": drawn.std.astype(np.float32)}
                pieces.add(lo, X=mean.astype(np.float32), counts=counts, **layers)
            details = {
                "rounds": rounds,
                "folds": folds,
                "own_counts": own_counts,
                "num_samples": num_samples,
                "seed": seed,
            }
            return assemble(output, source.obs, source.var, pieces, _described(model, "denoise", details))


def generate(
    model: Pretrained | str | Path,
    n: int = 500,
    *,
    where: dict[str, str] | None = None,
    library_size: float | None = None,
    guidance: float = 1.0,
    num_steps: int = 128,
    sampler: str = "analytic",
    temperature: float = 1.0,
    order: str = "random",
    batch_size: int = 64,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = False,
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
    batch_size, seed, output, resume, progress
        As in `impute`.

    Returns
    -------
    generated : AnnData, n x panel
        `X` float32 CSR of counts; obs holds the labels asked for.

    Raises
    ------
    UserError
        If a label or column is not known to the model, or a number is out of range.
    """
    model = Pretrained.load(model)
    if n < 1:
        raise UserError(f"-n is {n}; expected at least one cell.")
    where = where or {}
    unknown = [column for column in where if column not in model.categories]
    if unknown:
        there = ", ".join(model.categories) or "none (train with --condition COLUMN)"
        raise UserError(f"the model is not conditioned on {unknown[0]!r}; its condition columns are: {there}.")
    by_library = model.model.config["condition_library"]
    if library_size is not None and not by_library:
        raise UserError("--library_size needs a model trained with --condition_library_size; this one was not.")
    if library_size is not None and not 0 < library_size < float("inf"):
        raise UserError(f"--library_size is {library_size:g}; expected a total count above 0, such as 2000.")
    if guidance != 1 and not where and not by_library:
        raise UserError(
            f"--guidance is {guidance} and there is nothing to be guided by; give --where COLUMN=LABEL or leave it at 1."
        )
    codes = [
        model.condition_codes(column, np.array([where[column]] if column in where else [None], object))[0]
        for column in model.categories
    ]
    n_vars, mask = len(model.genes), model.binning.n_bins
    reverse = make_sampler(
        sampler,
        model.model,
        model.graph,
        model.noise,
        num_steps=num_steps,
        temperature=temperature,
        guidance=guidance,
        order=order,
        batch_size=batch_size,
    )
    totals = np.full(n, np.nan if library_size is None else library_size)
    if by_library and library_size is None and not where:  # else the model draws totals that go with the labels
        # One total from each n-th of the training cells, in random order: few cells have the spread of many.
        rng = np.random.default_rng(seed)
        place = (rng.permutation(n) + rng.random(n)) / n
        totals = model.libraries[(place * len(model.libraries)).astype(np.int64)]
    obs = pd.DataFrame(where, index=[f"generated_{i}" for i in range(n)])
    var = pd.DataFrame(model.state["var"], index=pd.Index(model.genes))
    details = {"n": n, "num_steps": num_steps, "sampler": sampler, "temperature": temperature, "guidance": guidance}
    details["seed"] = seed
    asked = {**details, "where": where, "library_size": library_size, "order": order, "batch_size": batch_size}
    made_from = identity(model, None, output, resume, task="generate", **asked)
    size = {"n_obs": n, "n_vars": n_vars, "batch_size": batch_size}
    with open_pieces(output, made_from, resume=resume, **size) as pieces:
        for lo, hi in spans_of_batches(pieces.spans, batch_size, "generate", progress, pieces.done):
            context: dict[str, Any] = {"condition": None, "library": None}
            if codes:
                context["condition"] = torch.tensor([codes] * (hi - lo), device=model.device)
            if by_library:
                total = np.log(np.maximum(totals[lo:hi], 1))
                context["library"] = torch.as_tensor(total, dtype=torch.float32, device=model.device)
            start = torch.full((hi - lo, n_vars), mask, device=model.device)
            tokens = reverse.sample(start, seed=seed, cells=np.arange(lo, hi), **context)
            pieces.add(lo, X=sp.csr_matrix(model.binning.decode(tokens.cpu().numpy()).astype(np.float32)))
        return assemble(output, obs, var, pieces, _described(model, "generate", details))


def add_genes(
    model: Pretrained | str | Path,
    data: Data,
    genes: Sequence[str],
    gene_embeddings: str | Path,
    *,
    layer: str | None = None,
) -> Pretrained:
    """The model on a panel that also holds genes it was not trained on, which it knows by pretrained vectors.

    Parameters
    ----------
    model
        Trained with `--gene_embeddings`.
    data
        Cells in which the new genes are counted; their marginals, where the output of a new gene starts, are learned on it.
    genes
        Names of the new genes.
    gene_embeddings
        A file of vectors as in training, which knows the new genes.
    layer
        Take counts from this layer instead of X.

    Returns
    -------
    model : Pretrained
        For `impute`, `denoise` and `embed`. What it says of the old genes changes only by what it sees of the new ones.

    Raises
    ------
    UserError
        If the model learned its own gene vectors, a gene is not new, or it has no vector or no counts.
    """
    model = Pretrained.load(model)
    if model.model.config["gene_embedding_dim"] is None:
        raise UserError(
            "the model learned a vector per gene and cannot meet new ones; train it with --gene_embeddings FILE."
        )
    old = set(model.genes)
    twice = [gene for gene in genes if gene in old]
    if twice or not genes:
        raise UserError(f"the new genes {twice[:3]} are in the model already; expected names of other genes.")
    adata = data if isinstance(data, ad.AnnData) else read_anndata(data)
    source = Cells(adata, np.array(genes, object), layer=layer or model.state["args"]["layer"])
    if source.missing.any():
        raise UserError(
            f"the new gene {genes[int(source.missing.argmax())]!r} is not in the data; its counts are needed."
        )
    counts = [source.counts(lo, min(lo + 1024, len(source))) for lo in range(0, len(source), 1024)]
    tokens = np.concatenate([model.binning.tokens(block) for block in counts])
    mass = np.zeros((len(genes), model.binning.n_bins), np.int64)
    for gene, column in enumerate(tokens.T):
        mass[gene] = np.bincount(column, minlength=model.binning.n_bins)
    histogram = sp.csr_array(sp.vstack([model.histogram, sp.csr_array(mass)], format="csr"))
    vectors = read_gene_vectors(gene_embeddings, list(genes))
    known = model.model.state_dict()["backbone.genes.pretrained"].cpu().numpy()
    if vectors.shape[1] != known.shape[1]:
        raise UserError(
            f"{gene_embeddings}: its vectors have {vectors.shape[1]} numbers; the model was trained with {known.shape[1]}."
        )
    network = model.model.for_genes(
        smoothed_log_shares(histogram.toarray().astype(np.float64), model.binning.falloff),
        np.concatenate([known, vectors]),
        known=[*range(len(model.genes)), *[-1] * len(genes)],
    )
    return replace(
        model, model=network, genes=np.concatenate([model.genes, np.array(genes, object)]), histogram=histogram
    )


def embed(
    model: Pretrained | str | Path,
    data: Data,
    *,
    cells: str = "all",
    layer: str | None = None,
    batch_size: int = 64,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> ad.AnnData:
    """Put the state of the network for each cell beside it.

    Parameters
    ----------
    model, data, cells, layer, batch_size, resume, progress
        As in `impute`.
    output
        An .h5ad or .zarr: with `cells="all"` and data of the same kind a copy of the file, of which no more than a window
        of cells is in memory; else the cells are held in memory.

    Returns
    -------
    embedded : AnnData
        The input with `obsm["X_sedd"]`, (n_obs, hidden_dim) float32. With `output`, its obs, var and uns alone.
    """
    model = Pretrained.load(model)
    with opened(data, layer or model.state["args"]["layer"]) as adata:
        source = open_cells(model, adata, cells, layer, _name(data))
        if source.missing.any():
            model.check_knows_masks("Embedding cells that lack genes of the model")
        made_from = identity(model, data, output, resume, task="embed", cells=cells, layer=layer, batch_size=batch_size)
        size = {"n_obs": len(source), "n_vars": len(model.genes), "batch_size": batch_size}
        with open_pieces(output, made_from, resume=resume, **size) as pieces:
            for lo, _, _, tokens, context in batches(model, source, batch_size, "embed", progress, pieces, whole=True):
                hidden = torch.from_numpy(np.broadcast_to(source.missing, tokens.shape).copy()).to(tokens.device)
                with torch.no_grad():
                    shown = tokens.masked_fill(hidden, model.binning.n_bins)
                    states = model.model.embed(shown, model.sigma(hidden), **context).float().cpu().numpy()
                pieces.add(lo, X_sedd=states)
            chosen = None if cells == "all" else source.indices
            return attach(output, data, chosen, pieces, _described(model, "embed", {}))


def open_cells(model: Pretrained, data: Data, part: str, layer: str | None, name: str | None = None) -> Cells:
    """The cells of `part` of `data`, aligned to the model's genes.

    Parameters
    ----------
    name
        What messages call the data; its path if not given.
    """
    adata = data if isinstance(data, ad.AnnData) else read_anndata(data)
    name = name or _name(data)
    chosen = cells_of_split(adata, part, model.state, name)
    layer = layer or model.state["args"]["layer"]
    if "sedd" in adata.uns and layer is not None and layer not in adata.layers:
        layer = None  # a store made from that layer holds it as X
    return Cells(adata, model.genes, layer=layer, cells=chosen, real=not model.state["data"]["is_counts"], name=name)


def _gene_mask(model: Pretrained, names: Sequence[str]) -> np.ndarray:
    unknown = [name for name in names if name not in set(model.genes)]
    if unknown:
        raise UserError(
            f"--predict: the model does not know {unknown[:3]}; its {len(model.genes)} genes are in `sedd info`."
        )
    return np.isin(model.genes.astype(str), list(names))


def _name(data: Data) -> str:
    """What messages call the data."""
    return "the AnnData" if isinstance(data, ad.AnnData) else str(data)


def _sampler(model: Pretrained, num_samples: int, name: str, num_steps: int, batch_size: int) -> Any:
    """The reverse process of `num_samples` draws."""
    if num_samples < 0:
        raise UserError(f"--num_samples is {num_samples}; expected 0 or more.")
    return make_sampler(name, model.model, model.graph, model.noise, num_steps=num_steps, batch_size=batch_size)


def _described(model: Pretrained, task: str, details: dict[str, Any]) -> dict[str, Any]:
    """What a result says of how it was made, for its uns."""
    done = {"task": task, "version": __version__, "checkpoint": str(model.path), "epoch": int(model.state["epoch"])}
    return {"sedd": {**done, "binning": model.binning.kind, **details}}
