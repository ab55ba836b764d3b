"""Genes that a model was not trained on and knows by their pretrained vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from sedd.binning import model_start
from sedd.config import ReadingSettings
from sedd.errors import UserError
from sedd.inference.cells import Cells, place_of_counts
from sedd.inference.pretrained import Pretrained
from sedd.inference.reading import reading_of
from sedd.inference.sources import opened
from sedd.nn.gene_vectors import read_gene_vectors
from sedd.options import keywords_of


def with_new_genes(arguments: dict[str, Any]) -> Pretrained:
    """Return the model of a task, on those genes as well that its argument `new_genes` names.

    Raises
    ------
    UserError
        If there are such genes and no `gene_embeddings`, and as `add_genes`.
    """
    if not arguments["new_genes"]:
        return Pretrained.load(arguments["model"])
    if arguments["gene_embeddings"] is None:
        raise UserError("--new_genes needs --gene_embeddings FILE with their vectors.")
    reading = {field.name: arguments[field.name] for field in dataclasses.fields(ReadingSettings)}
    where = {name: arguments[name] for name in ("layer", "raw")}
    return add_genes(arguments["model"], arguments["data"], arguments["new_genes"], arguments["gene_embeddings"], **where, **reading)


@keywords_of(ReadingSettings)
def add_genes(
    model: Pretrained | str | Path,
    data: ad.AnnData | str | Path,
    genes: Sequence[str],
    gene_embeddings: str | Path,
    *,
    layer: str | None = None,
    raw: bool = False,
    **reading: Any,
) -> Pretrained:
    """Return the model on a panel that also holds genes it was not trained on, which it knows by pretrained vectors.

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
    layer, raw, **reading
        As in `sedd.tasks.impute`.

    Returns
    -------
    model : Pretrained
        For `impute`, `denoise` and `embed`. Predictions of the old genes change only through the counts of the new ones.

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
    with opened(data, reading=reading_of(model, reading)) as source:
        layer, raw = place_of_counts(model, source, layer, raw)
        rounding = bool(reading.get("round")) or model.config.data.round
        cells = Cells(source, np.array(genes, object), layer=layer, raw=raw, rounding=rounding)
        if (lacking := cells.missing_in_some).any():
            where = "the data" if cells.missing.any() else "all of the files that the data were made of"
            raise UserError(f"the new gene {genes[int(lacking.argmax())]!r} is not in {where}; its counts are needed.")
        counts = [cells.counts(lo, min(lo + 1024, len(cells))) for lo in range(0, len(cells), 1024)]
    tokens = np.concatenate([model.binning.tokens(block) for block in counts]).astype(np.int64)
    n = max(model.histogram.shape[1], int(tokens.max(initial=0)) + 1)
    gene = np.broadcast_to(np.arange(len(genes)), tokens.shape)
    of_new = sp.coo_array((np.ones(tokens.size, np.int64), (gene.ravel(), tokens.ravel())), shape=(len(genes), n)).tocsr()
    of_old = sp.csr_array((model.histogram.data, model.histogram.indices, model.histogram.indptr), shape=(len(model.genes), n))
    histogram = sp.csr_array(sp.vstack([of_old, of_new], format="csr"))
    vectors = read_gene_vectors(gene_embeddings, list(genes))
    known = model.model.state_dict()["backbone.genes.pretrained"].cpu().numpy()
    if vectors.shape[1] != known.shape[1]:
        raise UserError(
            f"{gene_embeddings}: its vectors have {vectors.shape[1]} numbers; the model was trained with {known.shape[1]}."
        )
    network = model.model.for_genes(
        next(iter(model_start(model.binning, histogram).values())),
        np.concatenate([known, vectors]),
        known=[*range(len(model.genes)), *[-1] * len(genes)],
    )
    return dataclasses.replace(
        model, model=network, genes=np.concatenate([model.genes, np.array(genes, object)]), histogram=histogram
    )
