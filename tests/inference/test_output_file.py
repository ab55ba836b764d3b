"""Results that go to files: by blocks, from files, through the command line."""

from __future__ import annotations

import re
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from conftest import dense, make_counts

from sedd.cli import main
from sedd.errors import UserError
from sedd.inference import cells, output_file, output_parts, own_share, sources
from sedd.inference.pretrained import Pretrained
from sedd.tasks import denoise, generate, impute


def frame_of(path: Path) -> ad.AnnData:
    return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("task", ["impute", "denoise", "generate"])
def test_a_file_that_grows_by_blocks_holds_what_memory_would(
    task: str, suffix: str, model: Pretrained, tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: dict[str, Callable[..., ad.AnnData]] = {
        "impute": lambda **where: impute(model, tiny_h5ad, hide=0.2, num_samples=2, num_steps=4, cells="train", **where),
        "denoise": lambda **where: denoise(model, tiny_h5ad, rounds=1, **where),
        "generate": lambda **where: generate(model, 150, where={"cell_type": "B cell"}, num_steps=4, **where),
    }
    whole = run[task](progress=False, batch_size=20)
    monkeypatch.setattr(output_file, "_BLOCK", 3000)
    monkeypatch.setattr(output_file, "_DENSE", 3000)
    monkeypatch.setattr(output_parts, "_CELLS", 40)
    monkeypatch.setattr(cells, "WINDOW", 64)
    monkeypatch.setattr("sedd.inference.sources.FileSource.whole", None)  # nothing is read as a whole
    path = tmp_path / f"out{suffix}"
    for overwrite in (False, True):
        said = run[task](progress=False, batch_size=20, output=path, overwrite=overwrite)
    assert list(tmp_path.iterdir()) == [path]
    read = frame_of(path)
    assert np.array_equal(dense(read.X), dense(whole.X))
    assert set(read.layers) == set(whole.layers)
    for name in whole.layers:
        assert np.array_equal(dense(read.layers[name]), dense(whole.layers[name])), name
    assert read.obs.equals(whole.obs)
    assert read.var.equals(whole.var)
    assert read.uns["sedd"]["task"] == said.uns["sedd"]["task"] == task
    assert said.obs.equals(whole.obs)


def test_a_task_that_fails_on_the_way_leaves_nothing(model: Pretrained, tmp_path: Path) -> None:
    adata = make_counts(150)
    values = dense(adata.X)
    values[140, 3] = 0.5
    adata.X = values
    for name in ("out.h5ad", "out.zarr"):
        with pytest.raises(UserError, match="not a whole number"):
            denoise(model, adata, rounds=1, output=tmp_path / name, batch_size=10, progress=False)
    with pytest.raises(UserError, match=r"expected a name that ends so"):
        denoise(model, adata, output=tmp_path / "out.csv", progress=False)
    with pytest.raises(UserError, match="--num_samples is -1"):
        denoise(model, adata, num_samples=-1, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_cells_are_read_from_a_file_as_from_memory(layout: str, model: Pretrained, tmp_path: Path) -> None:
    adata = make_counts(90)
    expected = dense(adata.X)
    adata.X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[layout](expected)
    adata.layers["counts"] = adata.X
    adata.write_h5ad(tmp_path / "in.h5ad")
    zarr = tmp_path / "in.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of anndata, about the version of the format
        adata.write_zarr(zarr)
    for path in (tmp_path / "in.h5ad", zarr):
        for layer in (None, "counts"):
            with sources.opened(path) as opened:
                chosen = np.array([3, 4, 80])
                part = cells.Cells(opened, model.genes, layer=layer, cells=chosen)
                assert np.array_equal(part.counts(0, 3), expected[chosen])
                assert np.array_equal(cells.Cells(opened, model.genes).counts(10, 90), expected[10:])


def test_a_file_that_is_longer_takes_little_more_memory(
    model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_file, "_BLOCK", 1 << 14)
    monkeypatch.setattr(output_file, "_DENSE", 1 << 14)
    monkeypatch.setattr(output_parts, "_CELLS", 64)
    monkeypatch.setattr(cells, "WINDOW", 128)
    monkeypatch.setattr(own_share, "MAX_CELLS", 200)  # of which both files have more
    few, many = 300, 2000
    peak = {}
    for n in (few, many):
        adata = make_counts(n)
        adata.obs = adata.obs[[]]  # the tables of the cells are kept in memory
        adata.write_h5ad(tmp_path / f"{n}.h5ad")
        for output in (None, tmp_path / f"{n}.zarr"):
            tracemalloc.start()
            denoise(model, tmp_path / f"{n}.h5ad", rounds=1, folds=2, batch_size=64, output=output, progress=False)
            peak[n, output is None] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    in_memory, in_file = (peak[many, kept] - peak[few, kept] for kept in (True, False))
    assert in_memory > 3 * 4 * 60 * (many - few)  # three layers of float32
    assert in_file < 0.4 * in_memory, (in_memory, in_file)


def test_the_commands_make_the_files_and_refuse_to_replace_them(
    tiny_run: Path, tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = str(tiny_run), str(tiny_h5ad)
    out = {name: str(tmp_path / f"{name}.h5ad") for name in ("imputed", "denoised", "generated", "embedded")}
    assert main(["impute", run, data, "-o", out["imputed"], "--hide", "0.15", "--cells", "val"]) == 0
    assert main(["denoise", run, data, "-o", out["denoised"], "--rounds", "1", "--folds", "2"]) == 0
    where = ["--where", "cell_type=B cell", "--guidance", "1.5", "--library_size", "60"]
    assert main(["generate", run, "-n", "40", "-o", out["generated"], "--num_steps", "4", *where]) == 0
    assert main(["embed", run, data, "-o", out["embedded"]]) == 0
    assert ad.read_h5ad(out["imputed"]).n_obs == 24
    assert ad.read_h5ad(out["generated"]).n_obs == 40
    written = ["--imputed", out["imputed"], "--generated", out["generated"]]
    assert main(["evaluate", run, data, "-o", str(tmp_path / "report"), *written, "--n_masks", "4", "--steps", "1", "--no_umap"]) == 0
    said = capsys.readouterr().out
    assert "Held-out NELBO" in said
    assert "[real cells]" in said
    assert "Gaussian W2, the row to read first: sedd is " in said
    assert re.search(r"Gaussian W2 is [\d.]+ in 1 step, [\d.]+ for real cells: ", said)
    assert said.strip().endswith("report.html")
    before = Path(out["generated"]).read_bytes()
    assert main(["generate", run, "-n", "4", "-o", out["generated"]]) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path(out["generated"]).read_bytes() == before
    assert main(["info", run]) == 0
    assert "latent attention" in capsys.readouterr().out
    assert main(["runs", str(tiny_run.parent)]) == 0
    assert "2/2" in capsys.readouterr().out
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["impute", "nowhere", "x.h5ad", "-o", "o.h5ad"], "no such file or directory"),
        (["generate", "RUN", "-o", "o.h5ad", "--where", "B cell"], "expected COLUMN=LABEL"),
        (["impute", "RUN", "nowhere.h5ad", "-o", "o.h5ad"], "nowhere.h5ad: there is no such file"),
        (["impute", "RUN", "DATA", "-o", "o.h5ad", "--predict", "XYZ"], "does not know"),
        (["impute", "RUN", "DATA", "-o", "o.h5ad", "--hide", "1.5"], "--hide is 1.5"),
        (["generate", "RUN", "-o", "o.h5ad", "--library_size", "nan"], "--library_size is nan; expected a total count"),
        (["generate", "RUN", "-o", "o.h5ad", "--library_size", "-5"], "--library_size is -5; expected a total count"),
        (["evaluate", "RUN", "DATA", "-o", "d", "--num_steps", "0"], "num_steps is 0; expected at least 1"),
        (["evaluate", "RUN", "DATA", "-o", "d", "--n_masks", "0"], "n_masks is 0; expected at least 1"),
        (["evaluate", "RUN", "DATA", "-o", "d", "--hide", "2"], "--hide is 2.0; expected a share"),
        (["evaluate", "RUN", "DATA", "-o", "d", "--imputed", "DATA"], "sedd impute --hide"),
        (["info", "nowhere"], "no such file or directory"),
        (["runs", "nowhere"], "no such directory"),
        (["evaluate", "RUN", "DATA", "-o", "d", "--steps", "4", "0"], "--steps is 4 0"),
        (["frobnicate"], "unknown command"),
    ],
)
def test_bad_commands_are_one_line_status_2_and_leave_nothing(
    arguments: list[str],
    says: str,
    tiny_run: Path,
    tiny_h5ad: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"RUN": str(tiny_run), "DATA": str(tiny_h5ad)}
    assert main([named.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert says in error[-1]
    assert not list(tmp_path.iterdir())
