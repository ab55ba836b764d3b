"""The notebooks: short or long, they run from top to bottom and show what they say."""

from __future__ import annotations

import json
from typing import Any

import matplotlib
import numpy as np
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "nbs" / "rnaseq.ipynb"


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 7
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    text = "".join(line for cell in notebook["cells"] for line in cell["source"])
    for task in ("SEDDTrainer", "evaluate(", "impute(", "denoise(", "generate(", "embed("):
        assert task in text


def test_the_notebook_of_ten_lines_has_ten_lines_that_train_annotate_and_plot() -> None:
    cells = json.loads((ROOT / "docs" / "tutorials" / "ten-lines.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    lines = "".join("".join([*cell["source"], "\n"]) for cell in code).splitlines()
    assert len([line for line in lines if line]) == 10
    for call in ("shipped(", "sedd.train(", "sedd.annotate(", "sedd.pl."):
        assert call in "".join(lines)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    compile("\n".join(lines), "ten-lines.ipynb", "exec")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("default")  # those of the libraries of figures and maps are theirs
def test_the_notebook_runs_and_shows_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOK.parent)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    there: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}[{number}]", "exec"), there)
            plt.close("all")
    likelihood = there["found"].metrics["likelihood"]["nats_per_cell"]
    assert likelihood["sedd"] < min(likelihood["baselines"].values())
    assert there["history"][-1]["val_nelbo"] < there["history"][0]["val_nelbo"]
    assert np.corrcoef(np.log1p(there["true"]), np.log1p(there["predicted"]))[0, 1] > 0.6
    assert there["agreement"]["denoised"] > there["agreement"]["raw"] + 0.2
    assert there["generated"].shape == (200, 2000)
    assert there["embedded"].obsm["X_sedd"].shape == (270, 128)
    assert there["embedded"].obsm["X_umap"].shape == (270, 2)
    assert [row["steps"] for row in there["found"].steps] == [0, 1, 4, 16, 32]
    assert "<figure id=\"cells_umap\">" in (there["work"] / "report" / "report.html").read_text()
