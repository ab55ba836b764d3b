"""Training: a run that is stopped and continued is the run that was not, and bad input leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import ROOT, TINY_FLAGS, make_counts

from sedd import checkpoint
from sedd.cli import main
from sedd.errors import SeddWarning


def train(data: Path, directory: Path, *flags: str) -> int:
    return main(["train", "--data_path", str(data), "--checkpoint_dir", str(directory), *TINY_FLAGS, *flags])


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = checkpoint.load(a), checkpoint.load(b)
    assert (first["epoch"], first["step"]) == (second["epoch"], second["step"])
    for part in ("model", "optimizer", "ema"):
        flat_a, flat_b = _tensors(first[part]), _tensors(second[part])
        assert flat_a.keys() == flat_b.keys()
        for name, value in flat_a.items():
            assert torch.equal(value, flat_b[name]), f"{part} {name}"
    for entry, other in zip(first["history"], second["history"], strict=True):
        for name in ("epoch", "step", "train_loss", "val_nelbo", "val_mae", "learning_rate"):
            assert entry[name] == other[name]


def _tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: t for key, item in items for k, t in _tensors(item, f"{name}.{key}").items()}


def test_a_run_writes_what_is_promised(tiny_run: Path) -> None:
    names = {p.name for p in tiny_run.iterdir()}
    assert {"best.pt", "final.pt", "args.json", "history.json", "metrics.jsonl"} <= names
    history = json.loads((tiny_run / "history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert history[1]["val_nelbo"] < history[0]["val_nelbo"]
    state = checkpoint.load(tiny_run / "final.pt")
    for key in ("model", "ema", "optimizer", "scheduler", "random", "epoch", "step", "loader", "best_loss", "history", "genes"):
        assert key in state
    assert state["binning"]["kind"] == "counts"
    assert state["categories"] == {"cell_type": ["T cell", "monocyte", "B cell"]}
    assert json.loads((tiny_run / "args.json").read_text())["hidden_dim"] == 16


def test_two_epochs_and_three_more_are_five_bit_for_bit(tiny_h5ad: Path, tmp_path: Path) -> None:
    assert train(tiny_h5ad, tmp_path / "five", "--num_epochs", "5") == 0
    assert train(tiny_h5ad, tmp_path / "two", "--num_epochs", "2") == 0
    assert train(tiny_h5ad, tmp_path / "two", "--num_epochs", "5", "--resume", str(tmp_path / "two" / "final.pt")) == 0
    assert_same_weights(tmp_path / "five" / "final.pt", tmp_path / "two" / "final.pt")


def test_step_checkpoints_continue_bit_for_bit_and_only_the_last_are_kept(tiny_h5ad: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert train(tiny_h5ad, whole, "--checkpoint_every", "5", "--keep_checkpoints", "2") == 0
    assert [p.name for p in checkpoint.numbered_checkpoints(whole)] == ["step_20.pt", "step_25.pt"]
    for step in (20, 25):
        again = tmp_path / f"from{step}"
        assert train(tiny_h5ad, again, "--resume", str(whole / f"step_{step}.pt")) == 0
        assert_same_weights(whole / "final.pt", again / "final.pt")


def test_a_slow_disk_keeps_as_many_checkpoints_as_asked(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps go on meanwhile, so that the next save comes while the last is being written."""
    real = checkpoint.save

    def slow(path: Path, state: dict[str, object]) -> None:
        time.sleep(0.1)
        real(path, state)

    monkeypatch.setattr(checkpoint, "save", slow)
    flags = ["--checkpoint_every", "1", "--keep_checkpoints", "2", "--num_epochs", "1"]
    assert train(tiny_h5ad, tmp_path / "run", *flags) == 0
    assert [p.name for p in checkpoint.numbered_checkpoints(tmp_path / "run")] == ["step_13.pt", "step_14.pt"]


def test_a_directory_that_holds_a_run_is_not_overwritten_unasked(
    tiny_h5ad: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in tiny_run.glob("*.*")}
    assert train(tiny_h5ad, tiny_run) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tiny_run.glob("*.*")} == before


def test_overwrite_starts_anew_and_spares_other_files(tiny_h5ad: Path, tmp_path: Path) -> None:
    assert train(tiny_h5ad, tmp_path, "--num_epochs", "1") == 0
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tiny_h5ad, tmp_path, "--num_epochs", "1", "--overwrite", "--seed", "5") == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert checkpoint.load(tmp_path / "final.pt")["args"]["seed"] == 5
    assert len((tmp_path / "history.json").read_text()) < 1000


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hidden_dim", "18", "--num_heads", "4"], "not divisible"),
        (["--mask_ratio", "1.5"], "--mask_ratio is 1.5"),
        (["--genes", "nowhere.txt"], "no such file"),
        (["--condition", "tissue"], "no such obs column; there are: cell_type, donor, depth"),
        (["--condition", "depth"], "continuous"),
        (["--layer", "spliced"], "spliced"),
        (["--resume", "nowhere.pt"], "no such checkpoint"),
        (["--config", "nowhere.yaml"], "cannot be read"),
        (["--gene_embeddings", "nowhere.npz"], "cannot be read as gene vectors"),
        (["--mixed_precision", "fp16"], "needs a GPU"),
        (["--log_with", "wandb"], "wandb is not installed"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(
    tiny_h5ad: Path, tmp_path: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_h5ad, tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert says in error[-1]
    assert error[-1].startswith("sedd train: error: ")
    assert not (tmp_path / "run").exists()


def _broken(kind: str, path: Path) -> None:
    adata = make_counts(40, 30)
    if kind == "negative":
        adata.X.data[5] = -1
    elif kind == "nan":
        adata.X.data[5] = np.nan
    elif kind == "infinite":
        adata.X.data[5] = np.inf
    elif kind == "log":
        adata.X.data = np.log1p(adata.X.data)
        adata.layers["counts"] = make_counts(40, 30).X
    elif kind == "no cells":
        adata = adata[:0].copy()
    elif kind == "no genes":
        adata = adata[:, :0].copy()
    adata.write_h5ad(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:4000])
    elif kind == "text":
        path.write_text("gene,cell\n")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("negative", "negative"),
        ("nan", "NaN"),
        ("infinite", "infinite"),
        ("log", "log-normalised"),
        ("no cells", "no cells"),
        ("no genes", "no genes"),
        ("truncated", "cut short"),
        ("text", "HDF5"),
        ("missing", "no such file"),
    ],
)
def test_bad_data_is_one_line_and_leaves_nothing(
    tmp_path: Path, kind: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.h5ad"
    if kind != "missing":
        _broken(kind, data)
    before = sorted(tmp_path.iterdir())
    assert train(data, tmp_path / "run") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "bad.h5ad" in error
    assert says in error
    if kind == "log":
        assert "--layer counts" in error
    assert sorted(tmp_path.iterdir()) == before


def test_counts_in_a_layer_are_pointed_to_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """X scaled, .raw log-normalised and the counts in a layer, as processed files often are."""
    adata = make_counts()
    counts = adata.X.toarray()
    adata.layers["counts"] = sp.csr_matrix(counts.astype(np.int32))
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    adata.X = logged
    adata.raw = adata
    adata.X = (logged - logged.mean(0)) / (logged.std(0) + 1e-6)
    data = tmp_path / "trap.h5ad"
    adata.write_h5ad(data)
    assert train(data, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "scaled" in said
    assert "--layer counts" in said
    assert not (tmp_path / "run").exists()
    assert train(data, tmp_path / "run", "--layer", "counts") == 0
    from sedd.tasks import impute

    out = impute(tmp_path / "run", data, hide=0.1, progress=False)  # the layer of the training run
    assert np.array_equal(out.layers["counts"].toarray(), counts)


def test_real_values_are_binned_when_the_binning_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_counts()
    adata.X.data = np.log1p(adata.X.data) * np.float32(1.3)
    adata.write_h5ad(tmp_path / "log.h5ad")
    for binning in ("auto", "identity", "counts"):
        assert train(tmp_path / "log.h5ad", tmp_path / binning, "--binning", binning) == 2
        assert "non-integer" in capsys.readouterr().err
    assert train(tmp_path / "log.h5ad", tmp_path / "log", "--binning", "log", "--num_bins", "16") == 0
    from sedd.tasks import denoise

    out = denoise(tmp_path / "log", adata, rounds=1, progress=False)
    assert np.abs(dense_mean(out.X) - dense_mean(adata.X)) < 0.3


def dense_mean(matrix: object) -> float:
    return float(matrix.toarray().mean() if sp.issparse(matrix) else np.mean(matrix))  # type: ignore[attr-defined]


def test_linear_bins_reach_the_largest_training_count(tiny_h5ad: Path, tmp_path: Path) -> None:
    assert train(tiny_h5ad, tmp_path / "run", "--binning", "linear", "--num_bins", "12", "--num_epochs", "1") == 0
    from sedd.io.plan import Split

    counts = ad.read_h5ad(tiny_h5ad).X.toarray()[Split(240, 0.1, 0, "train").cells()]
    edges = checkpoint.load(tmp_path / "run" / "final.pt")["binning"]["edges"]
    assert np.array_equal(edges, np.linspace(0, float(counts.max()), 12))


@pytest.mark.slow
def test_the_shell_script_takes_its_settings_from_the_environment(tiny_h5ad: Path, tmp_path: Path) -> None:
    settings = dict(zip(TINY_FLAGS[::2], TINY_FLAGS[1::2], strict=True))
    environment = {name.lstrip("-").upper(): value for name, value in settings.items()}
    environment |= {"DATA_PATH": str(tiny_h5ad), "CHECKPOINT_DIR": str(tmp_path / "run"), "NUM_EPOCHS": "1"}
    done = subprocess.run(
        ["bash", ROOT / "bash" / "train.sh", "--seed", "7"], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (args["seed"], args["num_epochs"], args["hidden_dim"]) == (7, 1, 16)


def test_a_file_of_settings_is_used_and_the_command_line_wins(tiny_h5ad: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("num_epochs: 3\nbatch_size: 8\nseed: 2\n")
    config = ["--config", str(tmp_path / "run.yaml"), "--checkpoint_dir", str(tmp_path / "run"), "--num-epochs", "1"]
    model = ["--model", "small", "--hidden-dim", "16", "--num-layers", "1", "--num-heads", "2", "--genes", "all"]
    assert main(["train", "--data_path", str(tiny_h5ad), *config, *model]) == 0
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (args["num_epochs"], args["batch_size"], args["seed"], args["num_latents"]) == (1, 8, 2, 1)


def test_what_is_odd_but_usable_is_warned_about_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adata = make_counts(80, 30)
    dense = adata.X.toarray()
    dense[3] = 0
    dense[:, 4] = 0
    names = list(adata.var_names)
    names[1] = names[0]
    odd = ad.AnnData(dense, obs=adata.obs)
    odd.var_names = names
    data = tmp_path / "odd.h5ad"
    odd.write_h5ad(data)
    assert train(data, tmp_path / "run", "--num_epochs", "1") == 0
    said = capsys.readouterr().err
    for word in ("repeat", "no counts", "never seen"):
        assert sum(word in line for line in said.splitlines() if line.startswith("warning:")) >= 1, word
    assert len(checkpoint.load(tmp_path / "run" / "final.pt")["genes"]) == 30


def test_resuming_on_other_genes_or_another_model_is_refused(
    tiny_h5ad: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genes = tmp_path / "genes.txt"
    genes.write_text("gene1\ngene2\ngene3\n")
    resume = ["--resume", str(tiny_run), "--condition", "cell_type", "--condition_library_size"]
    assert train(tiny_h5ad, tmp_path / "a", *resume, "--genes", str(genes)) == 2
    assert "other genes" in capsys.readouterr().err
    assert train(tiny_h5ad, tmp_path / "b", *resume, "--hidden_dim", "32") == 2
    assert "hidden_dim 16" in capsys.readouterr().err
    other = tmp_path / "other.h5ad"
    make_counts(seed=3).write_h5ad(other)
    assert train(other, tmp_path / "c", *resume) == 2
    assert "is not the data of the checkpoint" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if p.is_dir() and p.suffix != ".zarr"]


def test_auto_resume_passes_over_a_damaged_checkpoint(tiny_h5ad: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(tiny_h5ad, run, "--num_epochs", "2", "--checkpoint_every", "5") == 0
    (run / "final.pt").write_bytes((run / "final.pt").read_bytes()[:1000])
    with pytest.warns(SeddWarning, match="passed over"):
        found = checkpoint.find_newest(run)
    assert found is not None
    assert found.name != "final.pt"
    assert train(tiny_h5ad, run, "--num_epochs", "3", "--resume", "auto") == 0
    assert checkpoint.load(run / "final.pt")["epoch"] == 3


def test_labels_and_totals_are_hidden_together_and_apart(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sedd.training import learner

    seen: list[tuple[bool, bool]] = []
    real = learner.diffusion_loss

    def watched(*args: object, condition: torch.Tensor, library: torch.Tensor, **kwargs: object) -> object:
        seen.extend(zip((condition[:, 0] > 0).tolist(), (~library.isnan()).tolist(), strict=True))
        return real(*args, condition=condition, library=library, **kwargs)

    monkeypatch.setattr(learner, "diffusion_loss", watched)
    flags = ["--condition", "donor", "--condition_library_size", "--condition_dropout", "0.3", "--num_epochs", "4"]
    assert train(tiny_h5ad, tmp_path / "run", *flags) == 0
    share = {pair: seen.count(pair) / len(seen) for pair in ((True, True), (True, False), (False, True), (False, False))}
    apart = 0.7 * 0.7 * 0.3
    expected = {(True, True): 0.7**3, (True, False): apart, (False, True): apart, (False, False): 0.3 + 0.7 * 0.3**2}
    for total in (True, False):  # of those that are shown half are hidden to be asked for
        expected[False, total] += expected[True, total] / 2
        expected[True, total] /= 2
    for pair, p in expected.items():
        assert abs(share[pair] - p) < 5 * (p * (1 - p) / len(seen)) ** 0.5


def test_tensorboard_gets_the_curves(tiny_h5ad: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tiny_h5ad, tmp_path / "run", "--log_with", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run" / "logs"))
    events.Reload()
    assert {"loss", "val_nelbo", "learning_rate"} <= set(events.Tags()["scalars"])
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [e.value for e in events.Scalars("val_nelbo")] == pytest.approx([h["val_nelbo"] for h in history])


def test_gene_vectors_are_matched_by_name_and_used(tiny_h5ad: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"gene{i}" for i in range(60)][::-1]
    np.savez(tmp_path / "vectors.npz", genes=np.array(names), vectors=rng.normal(size=(60, 7)).astype(np.float32))
    assert train(tiny_h5ad, tmp_path / "run", "--gene_embeddings", str(tmp_path / "vectors.npz")) == 0
    from sedd.inference.pretrained import Pretrained

    model = Pretrained.load(tmp_path / "run")
    assert sum(p.numel() for p in model.model.parameters()) > 0
    assert train(tiny_h5ad, tmp_path / "run", "--num_epochs", "3", "--resume", "auto", "--gene_embeddings", str(tmp_path / "vectors.npz")) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, while it imports its compiler
def test_a_compiled_model_trains_to_the_same_loss(tiny_h5ad: Path, tmp_path: Path) -> None:
    assert train(tiny_h5ad, tmp_path / "plain", "--num_epochs", "1", "--dropout", "0") == 0
    assert train(tiny_h5ad, tmp_path / "compiled", "--num_epochs", "1", "--dropout", "0", "--compile") == 0
    plain, compiled = (checkpoint.load(tmp_path / n / "final.pt")["history"][0] for n in ("plain", "compiled"))
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


def test_gradient_accumulation_is_the_larger_batch(tiny_h5ad: Path, tmp_path: Path) -> None:
    flags = ["--num_epochs", "1", "--dropout", "0"]
    assert train(tiny_h5ad, tmp_path / "one", *flags, "--batch_size", "32") == 0
    assert train(tiny_h5ad, tmp_path / "two", *flags, "--batch_size", "16", "--gradient_accumulation_steps", "2") == 0
    one, two = (checkpoint.load(tmp_path / name / "final.pt") for name in ("one", "two"))
    assert one["step"] == two["step"]
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--objective", "masked", "--mask_ratio", "0.3"],
        ["--attention", "full"],
        ["--binning", "linear", "--num_bins", "12"],
        ["--binning", "log", "--num_bins", "8"],
        ["--binning", "quantile", "--num_bins", "6"],
        ["--noise", "geometric"],
        ["--genes", "20"],
        ["--num_bins", "300"],
        ["--limit_cells", "60", "--val_fraction", "0.2"],
        ["--ema_decay", "0", "--grad_clip", "0", "--weight_decay", "0"],
        ["--mixed_precision", "bf16"],
    ],
)
def test_every_way_to_train_trains_and_generates(tiny_h5ad: Path, tmp_path: Path, flags: list[str]) -> None:
    from sedd.tasks import denoise, generate

    assert train(tiny_h5ad, tmp_path / "run", *flags) == 0
    history = checkpoint.load(tmp_path / "run" / "final.pt")["history"]
    assert all(np.isfinite(entry["val_nelbo"]) for entry in history)
    made = generate(tmp_path / "run", 5, num_steps=4, progress=False)
    assert np.isfinite(made.X.data).all()
    clean = denoise(tmp_path / "run", tiny_h5ad, rounds=1, progress=False)
    assert np.isfinite(clean.X).all() if isinstance(clean.X, np.ndarray) else np.isfinite(clean.X.data).all()


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(
    tiny_h5ad: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_h5ad, tmp_path / "run", "--dry_run", "--condition", "cell_type", "--condition_library_size") == 0
    said = capsys.readouterr().out
    assert "cells 216 to train, 24 to validate; genes 60; values counts" in said
    n_parameters = sum(p.numel() for p in checkpoint.load(tiny_run / "final.pt")["ema"]["average"].values())
    assert f"parameters {n_parameters:,}; weights, gradients and optimizer" in said
    assert re.search(r"the process [1-9]\d+ MiB with batches of 16", said)
    assert re.search(r"matrix products of \S*[1-9]\S* GFLOP a cell, \d\S* GFLOP a second", said)
    assert re.search(r"steps 14 an epoch, 28 in all; \d+\.\d{3} s a step, about \d+\.\d minutes of training", said)
    assert not (tmp_path / "run").exists()


def test_a_store_is_made_once_and_made_again_when_the_file_changes(tmp_path: Path) -> None:
    data, cache = tmp_path / "a.h5ad", tmp_path / "cache"
    make_counts().write_h5ad(data)
    flags = ["--num_epochs", "1", "--cache_dir", str(cache), "--overwrite"]
    assert train(data, tmp_path / "run", *flags) == 0
    store = cache / "a.sedd.zarr"
    first = (store / "zarr.json").stat().st_mtime_ns
    assert train(data, tmp_path / "run", *flags) == 0
    assert (store / "zarr.json").stat().st_mtime_ns == first
    make_counts(seed=9).write_h5ad(data)
    assert train(data, tmp_path / "run", *flags) == 0
    assert (store / "zarr.json").stat().st_mtime_ns != first


def test_train_py_the_script_and_the_command_are_one_function() -> None:
    outputs = []
    for command in (["train.py"], ["scripts/train_rnaseq.py"], ["-m", "sedd", "train"]):
        done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    for flag in ("--data_path", "--mask_ratio", "--resume", "--condition"):
        assert flag in outputs[0]


def test_resume_auto_never_starts_anew_over_a_run_it_cannot_read(
    tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    assert train(tiny_h5ad, directory, "--num_epochs", "1") == 0
    for path in directory.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert train(tiny_h5ad, directory, "--num_epochs", "1", "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert "passed over" in said
    assert "found no checkpoint that can be read" in said and "--overwrite" in said
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before


@pytest.mark.slow
def test_one_huge_count_takes_no_memory_of_its_size(tmp_path: Path) -> None:
    adata = make_counts()
    values = adata.X.toarray().astype(np.int64)
    values[0, 0], values[5, 3] = 2_000_000_000, 7_000_000
    adata.X = sp.csr_matrix(values)
    adata.write_h5ad(tmp_path / "huge.h5ad")
    run, made = tmp_path / "run", tmp_path / "made.h5ad"
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2); from sedd.cli import main; sys.exit(main(sys.argv[1:]))"
    for words in (
        ["train", "--data_path", tmp_path / "huge.h5ad", "--checkpoint_dir", run, *TINY_FLAGS, "--num_epochs", "1"],
        ["denoise", run, tmp_path / "huge.h5ad", "-o", made],
        ["evaluate", run, tmp_path / "huge.h5ad", "-o", run],
    ):
        done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-500:]
    assert ad.read_h5ad(made).layers["counts"][0, 0] == 2_000_000_000
