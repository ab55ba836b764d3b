"""Label cells: p(label | the genes that are there) of each condition column of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch

from sedd.config import ReadingSettings
from sedd.errors import UserError
from sedd.inference.applying import Data, all_arguments, for_each_batch
from sedd.inference.output_file import Beside
from sedd.inference.output_place import check_output
from sedd.inference.posterior import TaskBatch
from sedd.inference.pretrained import Pretrained
from sedd.options import keywords_of


@keywords_of(ReadingSettings)
def annotate(
    model: Pretrained | str | Path,
    data: Data,
    *,
    given: Sequence[str] = (),
    cells: str = "all",
    layer: str | None = None,
    raw: bool = False,
    batch_size: int = 256,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **reading: Any,
) -> ad.AnnData:
    """Give every cell the probabilities of the labels that a model was trained with.

    The model is shown all genes of a cell, and none of its labels; genes of the panel that the data lack are hidden. Only labels of
    the training can be found: a cell of another type is given the most similar one, often with a high probability, so look at
    `sedd.score` as well.

    Parameters
    ----------
    model
        A checkpoint, the directory of a run or a loaded model, trained with `--condition`.
    data
        Cells by genes, raw counts; genes are matched by name. Labels in it are not looked at, but those of `given`.
    given
        Condition columns whose labels in `data` the model is shown, such as a batch that was there in training. The others are
        predicted.
    cells, layer, raw, batch_size, resume, overwrite, progress, **reading
        As in `sedd.impute`.
    output
        As in `sedd.embed`.
    **reading
        How the data are read; as those of the training were, where one is not given:

    Returns
    -------
    annotated : AnnData
        The input with, for a condition column `cell_type`, `obs["sedd_cell_type"]`, the most probable label;
        `obs["sedd_cell_type_probability"]`, its probability; `obsm["sedd_cell_type_probability"]`, (n_obs, labels) float32, those
        of all labels, which are named in `uns["sedd"]["labels"]["cell_type"]`. With `output`, its obs, var and uns alone.

    Raises
    ------
    UserError
        If the model was trained without labels, or nothing is left to predict, and on bad input.

    Examples
    --------
    >>> model = sedd.train(reference, condition="cell_type")  # doctest: +SKIP
    >>> adata = sedd.annotate(model, adata)  # doctest: +SKIP
    >>> adata.obs[["sedd_cell_type", "sedd_cell_type_probability"]]  # doctest: +SKIP
    """
    arguments = all_arguments(locals())
    given = arguments["given"]
    check_output(output, overwrite=overwrite, resume=resume, data=data)
    model = Pretrained.load(model)
    asked = _asked(model, given)
    labels = {column: np.asarray(model.categories[column], dtype=object) for column in asked}

    def annotate_batch(here: TaskBatch) -> dict[str, np.ndarray]:
        shown, hidden = here.hide(np.zeros(here.counts.shape, bool), model.binning.n_bins)
        with torch.no_grad():
            laws = model.model.label_laws(shown, model.sigma(hidden), **here.context)
        return {f"label{k}": law.exp().cpu().numpy() for k, law in enumerate(laws)}

    def beside(made: dict[str, np.ndarray], cells: np.ndarray) -> Beside:
        probabilities = {column: made[f"label{k}"] for k, column in enumerate(model.categories) if column in asked}
        obs: dict[str, Any] = {}
        for column, p in probabilities.items():
            obs[f"sedd_{column}"] = pd.Categorical(labels[column][p.argmax(1)], categories=model.categories[column])
            obs[f"sedd_{column}_probability"] = p.max(1)
        return Beside({f"sedd_{column}_probability": p for column, p in probabilities.items()}, obs)

    details = {"labels": labels, "given": np.asarray(list(given), dtype=object)}
    return for_each_batch("annotate", model, arguments, annotate_batch, details, beside=beside)


def _asked(model: Pretrained, given: Sequence[str]) -> list[str]:
    """Return the columns that are predicted."""
    if not model.categories:
        raise UserError(f"{model.path}: was trained without labels; expected a model trained with --condition COLUMN.")
    model.check_knows_masks("Annotation")
    for column in given:
        if column not in model.categories:
            raise UserError(f"--given {column}: the model knows no such labels; its condition columns are: {', '.join(model.categories)}.")
    asked = [column for column in model.categories if column not in given]
    if not asked:
        raise UserError(f"--given names all condition columns of the model ({', '.join(given)}); leave out the one to predict.")
    return asked
