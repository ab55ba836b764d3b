"""The figures of the report in a notebook: those of the page, with the values that were measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from conftest import dense

import sedd
from sedd.evaluation import Evaluation

FEW: dict[str, Any] = {"n_masks": 2, "num_steps": 2, "steps": (1,), "progress": False}


@pytest.fixture(scope="module")
def found(tiny_run: Path, tiny_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    output = tmp_path_factory.mktemp("report")
    return sedd.evaluate(tiny_run, tiny_h5ad, output=output, umap=False, overwrite=True, **FEW)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def dots(axes: Any) -> np.ndarray:
    return np.asarray(axes.collections[0].get_offsets())


def test_the_figures_are_those_of_the_page_in_one_figure_that_a_notebook_shows(found: Evaluation) -> None:
    import matplotlib.pyplot as plt

    drawn = sedd.pl.report(found, umap=False)
    assert found.report is not None
    assert set(drawn) == {path.stem for path in (found.report.parent / "figures").iterdir()}
    assert {"training_loss", "calibration", "cells_real_labels", "steps_auc"} <= set(drawn)
    [number] = plt.get_fignums()  # which is what the notebook's backend shows
    figure = plt.figure(number)
    assert all(axes.figure is figure for axes in drawn.values())
    places = [axes.get_subplotspec() for axes in drawn.values()]
    assert [(place.rowspan.start, place.colspan.start) for place in places] == [divmod(k, 3) for k in range(len(drawn))]
    figure.canvas.draw()


def test_what_is_drawn_is_what_was_measured(found: Evaluation, tiny_h5ad: Path, model: sedd.Pretrained) -> None:
    drawn = sedd.pl.report(found, only=["validation_nelbo", "gene_mean", "cells_real_labels"], columns=2, umap=False)
    assert list(drawn) == ["validation_nelbo", "gene_mean", "cells_real_labels"]
    curve = drawn["validation_nelbo"].get_lines()[0]
    assert list(curve.get_ydata()) == [row["val_nelbo"] for row in model.state["history"]]
    whole = ad.read_h5ad(tiny_h5ad)
    held_out = sedd.denoise(model, whole, cells="val", rounds=1, folds=2, progress=False)  # oracle: its layer holds their counts
    real = dense(held_out.layers["counts"]).mean(0)
    floor = 0.5 / held_out.n_obs
    np.testing.assert_allclose(dots(drawn["gene_mean"])[:, 0], np.maximum(real, floor), rtol=1e-6)
    names = {text.get_text() for text in drawn["cells_real_labels"].get_legend().get_texts()}
    assert names == set(held_out.obs["cell_type"].astype(str).replace("nan", "no label"))


def test_a_model_and_cells_are_evaluated_and_drawn_at_once(found: Evaluation, model: sedd.Pretrained, tiny_h5ad: Path) -> None:
    [axes] = sedd.pl.report(model, ad.read_h5ad(tiny_h5ad), only="gene_variance", umap=False, **{**FEW, "steps": ()}).values()
    [again] = sedd.pl.report(found, only="gene_variance").values()
    assert axes is not again
    np.testing.assert_array_equal(dots(axes), dots(again))


def test_what_cannot_be_drawn_is_said_in_a_line(found: Evaluation, model: sedd.Pretrained, tiny_h5ad: Path) -> None:
    import matplotlib.pyplot as plt

    for arguments, settings, says in (
        ((found,), {"only": "gene_median"}, "no figure 'gene_median'; it has: training_loss, "),
        ((found,), {"only": ["cells", "cells_generated_labels"]}, "no figure 'cells_generated_labels'"),
        ((found, tiny_h5ad), {}, "data was given beside an Evaluation"),
        ((found,), {"n_masks": 3}, "n_masks was given beside an Evaluation"),
        ((model,), {}, r"expected sedd\.pl\.report\(model, adata\)"),
        ((found,), {"columns": 0}, "columns is 0; expected at least 1"),
    ):
        with pytest.raises(sedd.UserError, match=says) as error:
            sedd.pl.report(*arguments, **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="'n_mask'"):
        sedd.pl.report(model, tiny_h5ad, n_mask=3)
    assert not plt.get_fignums()
