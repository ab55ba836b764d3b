"""What is passed to the Python API by mistake is named in a line, and one name is a list of it."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from conftest import dense, make_counts

import sedd
from sedd.errors import UserError
from sedd.inference.pretrained import Pretrained

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return make_counts(12, 60, seed=3)


def test_one_name_is_a_list_of_it(model: Pretrained, cells: ad.AnnData) -> None:
    gene = str(model.genes[3])
    one, listed = (sedd.impute(model, cells, predict=names, **QUIET) for names in (gene, [gene]))
    np.testing.assert_array_equal(dense(one.X), dense(listed.X))
    assert dense(one.layers["sedd_hidden"]).sum(0)[3] == 12
    one, listed = (sedd.embed(model, cells, without=names, **QUIET) for names in ("cell_type", ["cell_type"]))
    np.testing.assert_array_equal(one.obsm["X_sedd"], listed.obsm["X_sedd"])
    one, listed = (sedd.score(model, cells, given=names, **QUIET) for names in ("cell_type", ["cell_type"]))
    np.testing.assert_array_equal(one.obs["sedd_nats"], listed.obs["sedd_nats"])


def test_labels_as_if_are_columns_and_labels(model: Pretrained, cells: ad.AnnData) -> None:
    with pytest.raises(UserError, match=r"as_if is 'cell_type=T cell'; expected columns and their labels"):
        sedd.denoise(model, cells, as_if="cell_type=T cell", **QUIET)  # type: ignore[arg-type]


def test_an_unknown_gene_is_beside_those_that_are_like_it(model: Pretrained, cells: ad.AnnData) -> None:
    with pytest.raises(UserError, match=r"does not know \['GENE7'\]; did you mean gene7"):
        sedd.impute(model, cells, predict=["GENE7"], **QUIET)
    with pytest.raises(UserError, match=r"does not know \['ENSG1'\]; it has 60 genes, such as gene0, gene1, gene2"):
        sedd.impute(model, cells, predict=["ENSG1"], **QUIET)


@pytest.mark.parametrize("task", [sedd.denoise, sedd.impute, sedd.embed, sedd.score, sedd.annotate])
def test_what_is_no_model_and_no_data_is_named(task, model: Pretrained, cells: ad.AnnData) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="the model is a AnnData; expected a checkpoint"):
        task(cells, model, **QUIET)
    for data in (cells.to_df(), dense(cells.X), cells.X, None):
        with pytest.raises(UserError, match=f"the data are a {type(data).__name__}; expected an AnnData"):
            task(model, data, **QUIET)


def test_training_on_what_is_no_data_is_named(cells: ad.AnnData) -> None:
    for data in (cells.to_df(), dense(cells.X), cells.X, None):
        with pytest.raises(UserError, match=f"the data are a {type(data).__name__}; expected an AnnData"):
            sedd.train(data)  # type: ignore[arg-type]
