"""Evaluation of many cells is of a stated sample, and takes the memory of that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sedd.errors import UserError
from sedd.evaluation.evaluate import evaluate
from sedd.io.format import elements
from sedd.tasks import impute
from tests.conftest import make_counts

FEW: dict[str, Any] = {"n_masks": 2, "num_steps": 2, "steps": (), "umap": False, "progress": False}


def test_a_sample_is_said_and_is_what_those_cells_alone_give(tiny_run: Path, tiny_h5ad: Path) -> None:
    adata = make_counts()
    found = evaluate(tiny_run, adata, cells="all", max_cells=40, hide=0.3, **FEW)
    assert f"Measured on 40 of the {adata.n_obs:,} held-out cells, drawn at random (--max_cells)." in found.notes
    assert any("of the" in note and "training cells" in note for note in found.notes)
    assert found.arrays["nats"].shape == (40,)
    imputed = impute(tiny_run, adata, cells="all", hide=0.3, progress=False)
    again = evaluate(tiny_run, adata, cells="all", max_cells=40, imputed=imputed, hide=0.3, **FEW)
    np.testing.assert_array_equal(again.arrays["hidden_true"], found.arrays["hidden_true"])
    np.testing.assert_array_equal(again.arrays["hidden_mean"], found.arrays["hidden_mean"])
    whole = evaluate(tiny_run, adata, cells="all", hide=0.3, **FEW)
    assert not any("Measured on" in note for note in whole.notes)
    chosen = np.sort(np.random.default_rng(0).choice(adata.n_obs, 40, replace=False))
    assert len(whole.arrays["nats"]) == adata.n_obs
    assert set(np.round(found.arrays["hidden_true"])) <= set(np.round(whole.arrays["hidden_true"]))
    per_cell = np.asarray(imputed.layers["sedd_hidden"].sum(1)).ravel()[chosen]
    assert found.arrays["hidden_true"].size == per_cell.sum()


def test_a_sample_of_too_few_cells_is_refused(tiny_run: Path, tiny_h5ad: Path) -> None:
    with pytest.raises(UserError, match="--max_cells is 3; expected at least 4"):
        evaluate(tiny_run, tiny_h5ad, max_cells=3, **FEW)


@pytest.mark.parametrize("n_obs", [1, 3])
def test_of_few_cells_is_measured_what_can_be(tiny_run: Path, n_obs: int, tmp_path: Path) -> None:
    found = evaluate(tiny_run, make_counts(n_obs, seed=5), output=tmp_path / "report", **{**FEW, "steps": (1,)})
    assert found.metrics.keys() == {"likelihood", "imputation"} and found.steps == []
    assert found.arrays["nats"].shape == (n_obs,)
    (note,) = [note for note in found.notes if note.startswith("Generation was not measured")]
    assert f"{n_obs} cell{'s are' if n_obs > 1 else ' is'} held out" in note and "--val_fraction" in note
    assert note in (tmp_path / "report" / "report.html").read_text()


EVALUATION = """
import sys
from sedd.evaluation.evaluate import evaluate
evaluate(sys.argv[1], sys.argv[2], cells="all", max_cells=200, n_masks=2, num_steps=2, steps=(), umap=False, progress=False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_of_an_evaluation_does_not_grow_with_the_counts(tiny_run: Path, tmp_path: Path) -> None:
    few = make_counts()
    dense, peaks, sizes = few.X.toarray() + 1, [], (10_000, 80_000)
    for n in sizes:
        matrix = sp.csr_matrix(dense[np.arange(n) % few.n_obs])
        obs = pd.DataFrame({"cell_type": pd.Categorical(few.obs["cell_type"].to_numpy()[np.arange(n) % few.n_obs])}, index=[str(k) for k in range(n)])
        with h5py.File(tmp_path / f"{n}.h5ad", "w") as file:
            elements.write_elements(file, {"X": matrix, "obs": obs, "var": few.var, "obsm": {}, "uns": {}}, rows=None)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", EVALUATION, str(tiny_run), str(tmp_path / f"{n}.h5ad")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(1024 * int(done.stdout.splitlines()[-1]))
    grown = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    held = matrix.nnz / sizes[1] * 8
    assert grown < held, (peaks, held)  # the table of cells and where each begins, of which the counts alone are more
