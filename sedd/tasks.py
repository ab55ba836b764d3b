"""What a user does with a model: impute, denoise, generate and embed cells. AnnData in, AnnData out.

Every prediction is the model's posterior p(hidden genes | visible genes) of a cell; the tasks differ in what they hide.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from tqdm import tqdm

from sedd import __version__
from sedd.cells import Cells, cells_of_split, read_anndata
from sedd.errors import UserError
from sedd.gene_vectors import read_gene_vectors
from sedd.kernels.discretize import Binning, smoothed_log_shares
from sedd.kernels.mask import exact_mask
from sedd.pretrained import Pretrained
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
        Cells by genes, raw counts; genes are matched by name.
    predict
        Genes to predict in every cell.
    hide : float in [0, 1)
        Share of each cell's genes to hide, for measuring how well they are recovered.
    cells : {"all", "train", "val"}
        Which cells of the data that the model was trained on.
    layer
        Take counts from this layer instead of X.
    num_samples
        Also draw this many joint samples of the hidden genes; their mean and spread are then reported instead of the
        closed-form ones of each gene by itself.
    num_steps, sampler
        Of the reverse process that draws them.
    folds, batch_size, seed
        See above; cells at a time; of the random choices.
    progress
        Show a bar.

    Returns
    -------
    imputed : AnnData, cells x panel
        `X` float32: observed counts as they were, posterior means where hidden. `layers["counts"]`: the input.
        `layers["sedd_hidden"]`: 1 where predicted. `layers["sedd_std"]`: posterior standard deviation there. With samples,
        `layers["sedd_sample_k"]`. `uns["sedd"]`: what was done. obs and var are those of the input.

    Raises
    ------
    UserError
        On bad input.
    """
    model = Pretrained.load(model)
    model.check_knows_masks("Imputation")
    if not 0 <= hide < 1:
        raise UserError(f"--hide is {hide}; expected a share from 0 up to 1, such as 0.15.")
    source = open_cells(model, data, cells, layer)
    named = _gene_mask(model, predict) | source.missing
    zeros = not named.any() and hide == 0
    count = round(hide * len(named))
    out = _Collector(source, ["X", "sedd_hidden", "sedd_std", *[f"sedd_sample_{k}" for k in range(num_samples)]])
    for lo, hi, counts, tokens, context in batches(model, source, batch_size, "impute", progress):
        hidden = np.broadcast_to(named, counts.shape).copy()
        if count:
            hidden |= exact_mask(seed, 0, source.indices[lo:hi], len(named), count)
        if zeros:
            mean, std = _cross_predict(model, tokens, context, source.indices[lo:hi], folds, 1, seed)
            hidden = counts == 0
        else:
            mean, std = _predict(model, tokens, hidden, context)
        samples = []
        for k in range(num_samples):
            masked = tokens.masked_fill(torch.from_numpy(hidden).to(tokens.device), model.binning.n_bins)
            drawn = make_sampler(sampler, model.model, model.graph, model.noise, num_steps=num_steps).sample(
                masked, seed=_draw_seed(seed, k), cells=source.indices[lo:hi], **context
            )
            samples.append(np.where(hidden, model.binning.decode(drawn.cpu().numpy()), counts))
        if samples:
            mean, std = np.mean(samples, axis=0), np.std(samples, axis=0)
        values = np.where(hidden, mean, counts).astype(np.float32)
        out.add(values, hidden.astype(np.uint8), np.where(hidden, std, 0).astype(np.float32), *samples)
    result = out.anndata(counts_layer=True)
    what = "zeros" if zeros else "missing and chosen genes" if not count else f"{hide:.0%} of the genes"
    return _described(result, model, "impute", {"hidden": what, "hide": hide, "num_samples": num_samples, "seed": seed})


def denoise(
    model: Pretrained | str | Path,
    data: Data,
    *,
    cells: str = "all",
    layer: str | None = None,
    rounds: int = 4,
    folds: int = 4,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> ad.AnnData:
    """Replace every count by what the other genes of the cell say it should be.

    Each gene of a cell is hidden once a round, together with a random 1/`folds` of the others, and predicted by its
    posterior mean; predictions are averaged over `rounds` random partitions.

    Parameters
    ----------
    model, data, cells, layer, batch_size, seed, progress
        As in `impute`.
    rounds, folds
        More rounds average more random visible subsets; more folds show more of the cell each time.

    Returns
    -------
    denoised : AnnData, cells x panel
        `X` float32: expected counts. `layers["counts"]`: the input. `layers["sedd_std"]`: posterior standard deviation.
    """
    model = Pretrained.load(model)
    model.check_knows_masks("Denoising")
    source = open_cells(model, data, cells, layer)
    out = _Collector(source, ["X", "sedd_std"])
    for lo, hi, _, tokens, context in batches(model, source, batch_size, "denoise", progress):
        out.add(*_cross_predict(model, tokens, context, source.indices[lo:hi], folds, rounds, seed))
    return _described(out.anndata(counts_layer=True), model, "denoise", {"rounds": rounds, "folds": folds, "seed": seed})


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
        Total count over the panel to ask for, in a model conditioned on it; drawn from the training cells if None.
    guidance
        Strength of classifier-free guidance; 1 is the conditional model itself.
    num_steps, sampler, temperature, order
        Of the reverse process: more steps let genes agree better; a temperature below 1 sharpens; the order "confidence" is
        biased (`sedd.sampling.Sampler`).
    batch_size, seed, progress
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
    )
    totals = np.full(n, np.nan if library_size is None else library_size)
    if by_library and library_size is None:
        totals = np.random.default_rng(seed).choice(model.libraries, n)
    blocks = []
    with _bar(n, "generate", progress) as bar:
        for lo in range(0, n, batch_size):
            size = min(batch_size, n - lo)
            context: dict[str, Any] = {"condition": None, "library": None}
            if codes:
                context["condition"] = torch.tensor([codes] * size, device=model.device)
            if by_library:
                total = np.log(np.maximum(totals[lo : lo + size], 1))
                context["library"] = torch.as_tensor(total, dtype=torch.float32, device=model.device)
            start = torch.full((size, n_vars), mask, device=model.device)
            tokens = reverse.sample(start, seed=seed, cells=np.arange(lo, lo + size), **context)
            blocks.append(sp.csr_matrix(model.binning.decode(tokens.cpu().numpy())))
            bar.update(size)
    obs = pd.DataFrame(where, index=[f"generated_{i}" for i in range(n)])
    var = pd.DataFrame(model.state["var"], index=pd.Index(model.genes))
    result = ad.AnnData(sp.vstack(blocks, format="csr").astype(np.float32), obs=obs, var=var)
    details = {"n": n, "num_steps": num_steps, "sampler": sampler, "temperature": temperature, "guidance": guidance}
    return _described(result, model, "generate", {**details, "seed": seed})


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
        raise UserError("the model learned a vector per gene and cannot meet new ones; train it with --gene_embeddings FILE.")
    old = set(model.genes)
    twice = [gene for gene in genes if gene in old]
    if twice or not genes:
        raise UserError(f"the new genes {twice[:3]} are in the model already; expected names of other genes.")
    adata = data if isinstance(data, ad.AnnData) else read_anndata(data)
    source = Cells(adata, np.array(genes, object), layer=layer or model.state["args"]["layer"])
    if source.missing.any():
        raise UserError(f"the new gene {genes[int(source.missing.argmax())]!r} is not in the data; its counts are needed.")
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
        smoothed_log_shares(histogram.toarray().astype(np.float64)),
        np.concatenate([known, vectors]),
        known=[*range(len(model.genes)), *[-1] * len(genes)],
    )
    return replace(model, model=network, genes=np.concatenate([model.genes, np.array(genes, object)]), histogram=histogram)


def embed(
    model: Pretrained | str | Path,
    data: Data,
    *,
    cells: str = "all",
    layer: str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> ad.AnnData:
    """The input with the state of the network for each cell in `obsm["X_sedd"]`, (n_obs, hidden_dim) float32."""
    model = Pretrained.load(model)
    adata = data if isinstance(data, ad.AnnData) else read_anndata(data)
    source = open_cells(model, adata, cells, layer)
    if source.missing.any():
        model.check_knows_masks("Embedding cells that lack genes of the model")
    states = []
    for _, _, _, tokens, context in batches(model, source, batch_size, "embed", progress):
        hidden = torch.from_numpy(np.broadcast_to(source.missing, tokens.shape).copy()).to(tokens.device)
        with torch.no_grad():
            shown = tokens.masked_fill(hidden, model.binning.n_bins)
            states.append(model.model.embed(shown, model.sigma(hidden), **context).float().cpu().numpy())
    result = adata[source.indices].copy()
    result.obsm["X_sedd"] = np.concatenate(states)
    return _described(result, model, "embed", {})


def open_cells(model: Pretrained, data: Data, part: str, layer: str | None, name: str | None = None) -> Cells:
    """The cells of `part` of `data`, aligned to the model's genes.

    Parameters
    ----------
    name
        What messages call the data; its path if not given.
    """
    adata = data if isinstance(data, ad.AnnData) else read_anndata(data)
    name = name or ("the AnnData" if isinstance(data, ad.AnnData) else str(data))
    chosen = cells_of_split(adata, part, model.state, name)
    layer = layer or model.state["args"]["layer"]
    if "sedd" in adata.uns and layer is not None and layer not in adata.layers:
        layer = None  # a store made from that layer holds it as X
    return Cells(adata, model.genes, layer=layer, cells=chosen, real=not model.state["data"]["is_counts"], name=name)


def _gene_mask(model: Pretrained, names: Sequence[str]) -> np.ndarray:
    unknown = [name for name in names if name not in set(model.genes)]
    if unknown:
        raise UserError(f"--predict: the model does not know {unknown[:3]}; its {len(model.genes)} genes are in `sedd info`.")
    return np.isin(model.genes.astype(str), list(names))


def batches(
    model: Pretrained, source: Cells, batch_size: int, task: str, progress: bool
) -> Iterator[tuple[int, int, np.ndarray, torch.Tensor, dict[str, Any]]]:
    """Successive cells: (lo, hi, counts, tokens, {"condition", "library"})."""
    if batch_size < 1:
        raise UserError(f"--batch_size is {batch_size}; expected at least 1.")
    with _bar(len(source), task, progress) as bar:
        for lo in range(0, len(source), batch_size):
            hi = min(lo + batch_size, len(source))
            counts = source.counts(lo, hi)
            tokens = torch.from_numpy(model.binning.tokens(counts).astype(np.int64)).to(model.device)
            context: dict[str, Any] = {"condition": None, "library": None}
            if model.categories:
                columns = [
                    model.condition_codes(name, source.obs[name].to_numpy(object)[lo:hi])
                    if name in source.obs
                    else np.zeros(hi - lo, np.int64)
                    for name in model.categories
                ]
                context["condition"] = torch.from_numpy(np.stack(columns, 1)).to(model.device)
            if model.model.config["condition_library"]:
                total = np.log(np.maximum(counts.sum(1), 1)).astype(np.float32)
                # With genes missing the total over the panel is not known.
                total[:] = np.nan if source.missing.any() else total
                context["library"] = torch.from_numpy(total).to(model.device)
            yield lo, hi, counts, tokens, context
            bar.update(hi - lo)


@torch.no_grad()
def _predict(
    model: Pretrained, tokens: torch.Tensor, hidden: np.ndarray, context: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and standard deviation of the hidden entries given the others, in one forward pass."""
    mask = torch.from_numpy(hidden).to(tokens.device)
    shown = tokens.masked_fill(mask, model.binning.n_bins)
    mean, var = model.model.expectation(shown, model.sigma(mask), model.decode_values, **context)
    return mean.cpu().numpy(), var.clamp_min(0).sqrt().cpu().numpy()


def _cross_predict(
    model: Pretrained,
    tokens: torch.Tensor,
    context: dict[str, Any],
    cells: np.ndarray,
    folds: int,
    rounds: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and spread of every entry, each predicted while hidden with a random 1/folds of its cell."""
    if folds < 2 or rounds < 1:
        raise UserError(f"folds is {folds} and rounds {rounds}; expected at least 2 folds and 1 round.")
    mean, second = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for round_ in range(rounds):
        fold = _folds(seed, round_, cells, tokens.shape[1], folds)
        for k in range(folds):
            hidden = fold == k
            m, s = _predict(model, tokens, hidden, context)
            mean[hidden] += m[hidden]
            second[hidden] += s[hidden] ** 2 + m[hidden].astype(np.float64) ** 2
    mean, second = mean / rounds, second / rounds
    return mean.astype(np.float32), np.sqrt(np.maximum(second - mean**2, 0)).astype(np.float32)


def _folds(seed: int, round_: int, cells: np.ndarray, n_vars: int, folds: int) -> np.ndarray:
    """A random partition of each cell's genes into `folds` parts of equal size, (B, n_vars)."""
    fold = np.zeros((len(cells), n_vars), np.int64)
    for k in range(1, folds):  # nested: the k * n / folds smallest hashes of a cell are the parts 0 .. k-1
        fold += ~exact_mask(seed, round_, cells, n_vars, k * n_vars // folds)
    return fold


def _draw_seed(seed: int, k: int) -> int:
    return seed + 1_000_003 * (k + 1)


class _Collector:
    """Puts the blocks of a result together: dense where most entries are not zero, else CSR."""

    def __init__(self, source: Cells, names: list[str]) -> None:
        self._source = source
        self._blocks: dict[str, list[sp.csr_matrix]] = {name: [] for name in names}

    def add(self, *values: np.ndarray) -> None:
        for blocks, block in zip(self._blocks.values(), values, strict=True):
            blocks.append(sp.csr_matrix(block))

    def anndata(self, *, counts_layer: bool) -> ad.AnnData:
        layers: dict[str, Any] = {}
        for name, blocks in self._blocks.items():
            matrix = sp.vstack(blocks, format="csr")
            layers[name] = matrix.toarray() if matrix.nnz > 0.5 * np.prod(matrix.shape) else matrix
        if counts_layer:
            step = 1024
            parts = [
                sp.csr_matrix(self._source.counts(lo, min(lo + step, len(self._source))))
                for lo in range(0, len(self._source), step)
            ]
            layers["counts"] = sp.vstack(parts, format="csr")
        return ad.AnnData(layers.pop("X"), obs=self._source.obs, var=self._source.var, layers=layers)


def _described(result: ad.AnnData, model: Pretrained, task: str, details: dict[str, Any]) -> ad.AnnData:
    binning: Binning = model.binning
    result.uns["sedd"] = {
        "task": task,
        "version": __version__,
        "checkpoint": str(model.path),
        "epoch": int(model.state["epoch"]),
        "binning": binning.kind,
        **details,
    }
    return result


def _bar(total: int, task: str, progress: bool) -> tqdm:
    quiet = 0.5 if sys.stderr.isatty() else 20.0
    return tqdm(total=total, desc=task, unit="cell", disable=not progress, mininterval=quiet, dynamic_ncols=True)



