"""What a run is about: its cells, its genes and how their counts become tokens, all learned on training cells alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from sedd.binning import Binning, model_start
from sedd.checkpoint import pack_histogram, split_of, unpack_histogram
from sedd.config import DataConfig, ModelConfig, TrainConfig
from sedd.errors import (
    MissingFileError,
    NegativeValuesError,
    NotCountsError,
    UserError,
    check_permitted,
    warn_user,
)
from sedd.io.conversion.genes import read_gene_list
from sedd.io.convert import ensure_store
from sedd.io.files import obs_digest
from sedd.io.format.histogram import histogram, less_zeros, rows_with, select_genes
from sedd.io.format.json_table import packed_table
from sedd.io.loader import CellLoader
from sedd.io.loading.batch import Batch
from sedd.io.loading.selection import encode_label, label_text
from sedd.io.plan import CellList, Split
from sedd.io.store import CellStore
from sedd.kernels.count_law_draws import LARGEST
from sedd.model import SEDDTransformer
from sedd.nn.gene_vectors import read_gene_vectors
from sedd.options import recorded_path
from sedd.training import lacking_genes
from sedd.training.first_look import check_inputs, split_of_cells
from sedd.training.label_columns import labels_of, shares_of

T = TypeVar("T")

_N_QUANTILES = 1001
_SAMPLED = 50_000  # training cells that are looked at where the store says nothing of them


@dataclass(frozen=True)
class Panel:
    """The data side of a run.

    Attributes
    ----------
    store
        The counts.
    train_cells, val_cells
        The split, described rather than listed.
    genes : list of str
        The panel.
    binning
        Its bins, fitted on the training cells.
    histogram : (n_vars, n_bins) int64
        How many training cells have each token of each gene.
    categories
        Labels of each condition column, in the order of their codes.
    libraries : (q,) float32
        Quantiles of the training cells' totals over the panel; empty unless the model is conditioned on them.
    gene_vectors : (n_vars, d) float32 or None
        Pretrained gene vectors.
    label_shares
        Of the labels of each condition column among the training cells that have one, smoothed by a pseudo-count each; none of a
        resumed run, whose model knows them.
    lacking
        Which genes of the panel nobody counted in which cells, if that is so of some.
    """

    store: CellStore
    train_cells: Split
    val_cells: Split
    genes: list[str]
    binning: Binning
    histogram: sp.csr_array
    categories: dict[str, list[str]]
    libraries: np.ndarray
    gene_vectors: np.ndarray | None = None
    label_shares: dict[str, np.ndarray] = field(default_factory=dict)
    lacking: lacking_genes.LackingGenes | None = None

    def build_model(self, config: ModelConfig) -> SEDDTransformer:
        """Return a new model for this panel, its output started at the training marginals."""
        assert config.hidden_dim is not None
        assert config.num_layers is not None
        assert config.num_heads is not None
        return SEDDTransformer(
            len(self.genes),
            self.binning.n_bins,
            hidden_dim=config.hidden_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            dropout=config.dropout,
            attention=config.attention,
            num_latents=config.num_latents,
            **model_start(self.binning, self.histogram),
            condition_sizes=tuple(len(labels) for labels in self.categories.values()),
            condition_library=config.condition_library_size,
            answer_labels=config.answers_labels,
            label_shares=list(self.label_shares.values()) or None,
            gene_embeddings=None if self.gene_vectors is None else torch.from_numpy(self.gene_vectors),
        )

    def conditions(self, batch: Batch, config: ModelConfig) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the conditions of the cells of a batch: label codes (B, columns) with 0 for missing, log totals (B,)."""
        condition = library = None
        if self.categories:
            condition = torch.stack([batch.labels[name] for name in self.categories], 1) + 1
        if config.condition_library_size:
            library = batch.library.clamp_min(1).log()
            if self.lacking is not None:  # a total over the panel is not known where a gene of it is not
                library = library.masked_fill(self.lacking.of(batch).any(1), math.nan)
        return condition, library

    @property
    def labels(self) -> list[str]:
        """Columns of obs that batches are to have: conditions, and what says which genes a cell lacks."""
        return list(dict.fromkeys([*self.categories, *([] if self.lacking is None else [self.lacking.column])]))

    @functools.cached_property
    def cells_digest(self) -> str:
        """Identity of the cells by their names: of many cells it takes seconds, and every checkpoint has it."""
        return obs_digest(self.store.obs_names())

    def state(self) -> dict[str, Any]:
        """Return the part of a checkpoint that belongs to the data."""
        split = self.train_cells
        return {
            "genes": list(self.genes),
            "binning": self.binning.to_dict(),
            "histogram": pack_histogram(self.histogram),
            "categories": {name: list(labels) for name, labels in self.categories.items()},
            "libraries": torch.from_numpy(self.libraries),
            # What the data says about the genes, for the cells that the model makes.
            "var": packed_table(self.store.var.iloc[pd.Index(self.store.var_names).get_indexer(self.genes)]),
            "split": {
                "n_obs": split.n_obs,
                "val_fraction": split.val_fraction,
                "seed": split.seed,
                "most": split.most,
                "block": split.block,
                "limit": {"train": self.train_cells.limit, "val": self.val_cells.limit},
                "n_train": self.train_cells.n_cells,
                "n_val": self.val_cells.n_cells,
            },
            "data": {
                "path": recorded_path(self.store.path),
                "fingerprint": self.store.fingerprint,
                "n_obs": self.store.n_obs,
                "n_vars": self.store.n_vars,
                "is_counts": bool(self.store.is_counts),
                "obs_digest": self.cells_digest,
            },
        }


def prepare_panel(config: TrainConfig, resumed: dict[str, Any] | None) -> Panel:
    """Open (or convert) the data and learn everything that training needs from the training cells.

    Parameters
    ----------
    config
        Of the run.
    resumed
        The checkpoint to continue from: its genes, binning and labels are then kept.

    Raises
    ------
    UserError
        On bad input; nothing is left behind but a converted store.
    """
    data = config.data
    check_inputs(config)
    store = _open_store(data, progress=config.run.progress)
    if resumed is not None:
        store = _as_trained_on(store, resumed, data.named)
    if resumed is not None:
        return _resumed_panel(config, resumed, store)
    if store.is_counts and data.binning in ("auto", "counts") and store.max_value > LARGEST:
        gene = str(store.var_names[int(np.argmax(store.gene_stats()["max"]))])
        raise UserError(f"{data.named}: gene {gene!r} has a count of {int(store.max_value)}; expected counts up to {LARGEST}. Correct or remove it.")
    train, val = split_of_cells(config, store.n_obs, shuffled=bool(store.uns_sedd["settings"]["shuffle"]) and not store.grown)
    hist = _count(store, train, val, progress=config.run.progress)
    genes = _choose_genes(data, store, hist, train.n_cells)
    index = pd.Index(store.var_names).get_indexer(genes)
    lacking = _lacking(config, store, genes)
    if hist is not None and data.binning != "quantile":
        panel_hist = hist[index]
        # The uniform graph walks among a fixed number of states.
        kind = "identity" if data.binning == "auto" and config.model.graph == "uniform" else data.binning
        binning = Binning.fit(kind, data.num_bins, hist=panel_hist)
        if binning.kind == "counts" and config.model.graph == "uniform":
            raise UserError("--graph uniform walks among a fixed number of values, and there is no largest count; expected --binning identity.")
        tokens = binning.token_histogram(panel_hist)
    else:
        sample = _sample_values(store, train, genes)
        binning = Binning.fit(data.binning, data.num_bins, values=sample)
        tokens = _count_tokens(config, store, _some(train), genes, binning, lacking)
    never = int((rows_with(tokens, int(binning.tokens(np.zeros((1, 1)))[0, 0])) == np.asarray(tokens.sum(axis=1)).ravel()).sum())
    if never:
        warn_user(f"{never} of the {len(genes)} genes of the panel were never seen in the training cells; they are kept.")
    vectors = None if config.model.gene_embeddings is None else read_gene_vectors(config.model.gene_embeddings, genes)
    categories = {column: labels_of(store, column) for column in config.model.condition}
    return Panel(
        store=store,
        train_cells=train,
        val_cells=val,
        genes=genes,
        binning=binning,
        histogram=tokens,
        categories=categories,
        libraries=_libraries(config, store, train, genes, binning, lacking),
        gene_vectors=vectors,
        label_shares={column: shares_of(store, train, column) for column in categories},
        lacking=lacking,
    )


def _lacking(config: TrainConfig, store: CellStore, genes: list[str]) -> lacking_genes.LackingGenes | None:
    """Return which genes of the panel nobody counted in which cells, if that is so of some, and say so."""
    found = lacking_genes.find(store, genes)
    if found is None:
        return None
    if config.model.graph == "uniform":
        raise UserError(
            f"--graph uniform hides no genes, and not all files of {config.data.named} have all of the panel; expected the absorbing graph, or "
            "files that were joined with --join inner."
        )
    found.say(config.data.named, len(genes))
    return found


def _open_store(data: DataConfig, *, progress: bool) -> CellStore:
    settings: dict[str, Any] = {"cache_dir": data.cache_dir, "progress": progress, **data.of_inputs()}
    return counts_or_real(data, lambda values: ensure_store(data.paths, values=values, **settings))


def counts_or_real(data: DataConfig, make: Callable[[Literal["counts", "real"]], T]) -> T:
    """Return the store that `make` makes of the data: of counts if they are counts, of real values if the binning takes those."""
    try:
        return make("counts")
    except NotCountsError as error:
        if data.binning not in ("linear", "log", "quantile") or isinstance(error, NegativeValuesError):
            raise
        return make("real")


def _as_trained_on(store: CellStore, state: dict[str, Any], named: str) -> CellStore:
    """Return the store as the run knew it, if cells were appended since: its validation cells must never become training cells."""
    known = store.as_of(state["data"]["fingerprint"])
    if known is None:
        return store
    warn_user(
        f"{named}: has grown from {known.n_obs} to {store.n_obs} cells since this run began. The run continues on the {known.n_obs} that it "
        "knew, with the same validation cells; to train on all, start another in another --checkpoint_dir."
    )
    for column, labels in state["categories"].items():  # which may have others by now, in another order
        index = {label_text(label): code for code, label in enumerate(labels)}
        codes, found = encode_label(known, column)
        table = np.array([*(index.get(label_text(label), -1) for label in found), -1])  # the appended cells' own labels are in none of these
        known.obs[column] = pd.Categorical.from_codes(table[codes], labels)
    return known


def _count(store: CellStore, train: Split, val: Split, *, progress: bool) -> sp.csr_array | None:
    """Return how many training cells have each count of each gene: what the conversion counted, less the validation cells.

    Cells of a file that lacks a gene have no count of it, not even 0.
    """
    if not store.is_counts:
        return None
    if train.limit is None:
        hist = histogram(store, without=val.cells())
    else:
        hist = histogram(store, train.cells(), progress=progress and train.n_cells > 100_000)
    lacking = lacking_genes.find(store, store.var_names)
    return hist if lacking is None else less_zeros(hist, lacking.cells_without(train))


def _resumed_panel(config: TrainConfig, state: dict[str, Any], store: CellStore) -> Panel:
    lacking = sorted(set(state["genes"]) - set(store.var_names))
    if lacking:
        raise UserError(
            f"--resume: the checkpoint was trained on {len(state['genes'])} genes, of which {len(lacking)} are not in "
            f"{config.data.named} (first: {lacking[0]!r}); continue on the data it was trained on."
        )
    if store.fingerprint != state["data"]["fingerprint"]:
        raise UserError(
            f"--resume: {config.data.named} is not the data of the checkpoint ({store.n_obs} cells here, "
            f"{state['data']['n_obs']} there, or other contents); continue on that, or start anew in another "
            "--checkpoint_dir."
        )
    data, train, val = config.data, split_of(state, "train"), split_of(state, "val")
    wanted = state["genes"]
    if config.to_flat()["genes"] != state["args"]["genes"]:
        wanted = _choose_genes(data, store, _count(store, train, val, progress=config.run.progress), train.n_cells)
    if wanted != state["genes"]:
        raise UserError(
            f"--resume: the checkpoint was trained on {len(state['genes'])} other genes than the {len(wanted)} of --genes "
            f"{data.genes}; pass --genes {state['args']['genes']} as then, or start anew in another --checkpoint_dir."
        )
    for column, labels in state["categories"].items():
        if labels_of(store, column) != labels:
            raise UserError(
                f"--resume: obs[{column!r}] of {data.named} has other labels than those that the checkpoint was trained with, or in another "
                "order; continue on the data it was trained on."
            )
    vectors = None
    if config.model.gene_embeddings is not None:
        vectors = read_gene_vectors(config.model.gene_embeddings, wanted)
    return Panel(
        store=store,
        train_cells=train,
        val_cells=val,
        genes=wanted,
        binning=Binning.from_dict(state["binning"]),
        histogram=unpack_histogram(state["histogram"]),
        categories=state["categories"],
        libraries=state["libraries"].numpy(),
        gene_vectors=vectors,
        lacking=_lacking(config, store, wanted),
    )


def _choose_genes(data: DataConfig, store: CellStore, hist: sp.csr_array | None, n_train: int) -> list[str]:
    """Return the panel that `--genes` names."""
    text = data.genes or "all"
    if text == "all":
        return list(map(str, store.var_names))
    if text.isdigit():
        n = int(text)
        if n < 1:
            raise UserError(f"--genes is {text}; expected a number of genes above 0, a file, or all.")
        if n >= store.n_vars:
            return list(map(str, store.var_names))
        if hist is None:
            raise UserError(
                "--genes N picks variable genes by their counts, and the values are not counts; pass --genes all or a "
                "file with one gene a line."
            )
        chosen = select_genes(hist, n)
        if not len(chosen):
            raise UserError(f"{data.named}: no gene is seen in 3 of the {n_train} training cells; expected counts.")
        return [str(store.var_names[i]) for i in chosen]
    check_permitted(text)
    if not Path(text).is_file():
        raise MissingFileError(f"--genes {text}: no such file; expected a number, `all`, or a file with one gene name a line.")
    names = read_gene_list(text) or []
    known = set(map(str, store.var_names))
    found = [name for name in names if name in known]
    if not found:
        raise UserError(
            f"--genes {text}: none of its {len(names)} names is in {data.named} (its genes look like "
            f"{list(map(str, store.var_names[:2]))}); expected one gene name a line."
        )
    if len(found) < len(names):
        warn_user(f"--genes {text}: {len(names) - len(found)} of {len(names)} genes are not in the data and are left out.")
    return found


def _plain_loader(
    config: TrainConfig, store: CellStore, cells: Split | CellList, genes: list[str], binning: Any, lacking: lacking_genes.LackingGenes | None
) -> CellLoader:
    return CellLoader(
        store,
        batch_size=1024,
        split=cells,
        genes=genes,
        binning=binning,
        mask=None,
        labels=[] if lacking is None else [lacking.column],
        shuffle=False,
        threads=config.data.loader_threads,
        memory_budget=config.data.memory_budget,
    )


def _count_tokens(
    config: TrainConfig, store: CellStore, cells: Split | CellList, genes: list[str], binning: Binning, lacking: lacking_genes.LackingGenes | None
) -> sp.csr_array:
    """Return the histogram of tokens by a pass over the cells, for bins that no histogram of counts can give."""
    counted = np.zeros(len(genes) * binning.n_bins, np.int64)
    offsets = np.arange(len(genes)) * binning.n_bins
    with _plain_loader(config, store, cells, genes, binning, lacking) as loader:
        for batch in loader:
            places = batch.tokens.numpy().astype(np.int64) + offsets
            counted += np.bincount(places.ravel() if lacking is None else places[~lacking.of(batch).numpy()], minlength=counted.size)
    return sp.csr_array(counted.reshape(len(genes), binning.n_bins))


def _sample_values(store: CellStore, cells: Split, genes: list[str], n: int = 10_000) -> np.ndarray:
    """Values of at most `n` evenly spaced training cells over the panel, zeros included, (cells, genes)."""
    step = max(1, math.ceil(cells.n_cells / n))
    columns = pd.Index(store.var_names).get_indexer(genes)
    rows = []
    chosen = cells.cells(np.arange(0, cells.n_cells, step))
    for some in np.array_split(chosen, math.ceil(chosen.size / 200)):
        indptr, indices, data = store.read_cells(some)
        part = sp.csr_array((data, indices.astype(np.int32), indptr.astype(np.int32)), shape=(some.size, store.n_vars))
        rows.append(part[:, columns].toarray())
    return np.concatenate(rows)


def _some(train: Split) -> Split | CellList:
    """Return the training cells, or so many of them, drawn evenly, that a share among them is within .009 of that among all in 999 of 1000 draws.

    That is the inequality of Dvoretzky, Kiefer, Wolfowitz and Massart, `sqrt(log(2 / .001) / 2 n)`, and holds for every quantile at once.
    """
    if train.n_cells <= _SAMPLED:
        return train
    drawn = np.random.default_rng([_SAMPLED, train.seed]).choice(train.n_cells, _SAMPLED, replace=False, shuffle=False)
    return CellList(train.cells(np.sort(drawn)))


def _libraries(
    config: TrainConfig, store: CellStore, train: Split, genes: list[str], binning: Binning, lacking: lacking_genes.LackingGenes | None
) -> np.ndarray:
    if not config.model.condition_library_size:
        return np.zeros(0, np.float32)
    with _plain_loader(config, store, _some(train), genes, binning, lacking) as loader:
        known = [batch.library.numpy() if lacking is None else batch.library[~lacking.of(batch).any(1)].numpy() for batch in loader]
    totals = np.concatenate(known)
    if not totals.size:
        raise UserError(
            f"--condition_library_size: no file of {config.data.named} has all {len(genes)} genes of the panel, so the total of no cell is known. Leave it "
            "out, or train on the genes that all files have: convert them with --join inner."
        )
    return np.quantile(totals, np.linspace(0, 1, _N_QUANTILES)).astype(np.float32)
