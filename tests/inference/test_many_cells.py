"""Evaluation of many cells is of a stated sample, and takes the memory of that."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sedd.errors import UserError
from sedd.evaluation.evaluate import evaluate
from sedd.inference import output_file
from sedd.inference.annotation import annotate
from sedd.inference.pretrained import Pretrained
from sedd.inference.scoring import score
from sedd.io.format import elements
from sedd.tasks import embed, impute
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


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("task", [embed, annotate, score])
def test_what_is_put_beside_cells_of_a_file_is_read_and_written_in_blocks(
    model: Pretrained, tiny_h5ad: Path, tmp_path: Path, suffix: str, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adata = make_counts()
    path = tmp_path / f"in{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what anndata says of coming versions
        adata.write_zarr(path) if suffix == ".zarr" else adata.write_h5ad(path)
    settings: dict[str, Any] = {"batch_size": 24, "progress": False}
    settings |= {"reference": str(tiny_h5ad), "n_masks": 1} if task is score else {}
    lengths: list[int] = []  # of labels that are looked up, and of rows that are written

    def looked_up(series: pd.Series, *args: Any, of: Any = pd.Series.to_numpy, **more: Any) -> Any:
        lengths.extend([len(series)] * (object in args))
        return of(series, *args, **more)

    def written(array: Any, rows: np.ndarray, write: Any = output_file._GrowingArray._write) -> None:
        lengths.append(len(rows))
        write(array, rows)

    with monkeypatch.context() as patch:
        patch.setattr(output_file, "_DENSE", 16 * 50)
        patch.setattr(output_file._GrowingArray, "_write", written)
        patch.setattr(pd.Series, "to_numpy", looked_up)
        patch.setattr("sedd.inference.sources.FileSource.obsm", None)  # nobody asks for it
        made = task(model, path, output=tmp_path / f"out{suffix}", **settings)
    assert max(lengths, default=0) == {embed: 50, annotate: 240, score: 0}[task]  # rows of a chunk: 50 of 16 numbers, all of 3
    assert not made.obsm
    read = ad.read_zarr(tmp_path / f"out{suffix}") if suffix == ".zarr" else ad.read_h5ad(tmp_path / f"out{suffix}")
    whole = task(model, path, **settings)
    pd.testing.assert_frame_equal(read.obs, whole.obs)
    pd.testing.assert_frame_equal(made.obs, whole.obs)
    assert read.obsm.keys() == whole.obsm.keys()
    for name, array in whole.obsm.items():
        assert read.obsm[name].dtype == array.dtype and np.array_equal(read.obsm[name], array)


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
