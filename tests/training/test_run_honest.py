"""What a run must not do: look at validation cells, save weights that are no numbers, always tell the network its conditions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, make_counts
from scipy.stats import binomtest

from sedd import checkpoint
from sedd.cli import main
from sedd.io.plan import Split


def train(data: Path, directory: Path, *flags: str) -> int:
    return main(["train", "--data_path", str(data), "--checkpoint_dir", str(directory), *TINY_FLAGS, *flags])


@pytest.mark.parametrize(
    ("binning", "values"),
    [
        *[(kind, "counts") for kind in ("auto", "linear", "log", "quantile")],
        *[(kind, "real") for kind in ("linear", "log")],
    ],
)
def test_validation_values_do_not_reach_bins_genes_marginals_or_weights(tmp_path: Path, binning: str, values: str) -> None:
    adata = make_counts()
    if values == "real":
        adata.X.data = np.log1p(adata.X.data)
    genes = "30" if values == "counts" and binning != "quantile" else "all"
    flags = ["--genes", genes, "--num_epochs", "1", "--binning", binning, "--condition_library_size"]
    val = Split(adata.n_obs, 0.1, 0, "val").cells()
    dense, states = adata.X.toarray(), []
    for name in ("a", "b"):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        assert train(tmp_path / f"{name}.h5ad", tmp_path / name, *flags) == 0
        states.append(checkpoint.load(tmp_path / name / "final.pt"))
        # Shuffled over cells and genes, and larger than anything to train on.
        dense[val] = 3 * np.random.default_rng(0).permutation(dense[val].ravel()).reshape(dense[val].shape)
        adata.X = dense.copy()
    state, other = states
    assert other["history"][0]["val_nelbo"] != state["history"][0]["val_nelbo"]
    assert other["genes"] == state["genes"]
    assert other["binning"] == state["binning"]
    assert torch.equal(other["libraries"], state["libraries"])
    for name in ("indptr", "indices", "data"):
        assert torch.equal(other["histogram"][name], state["histogram"][name])
    for name, value in state["model"].items():
        assert torch.equal(other["model"][name], value)


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_stays(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sedd.training import learner

    run = tmp_path / "run"
    assert train(tiny_h5ad, run, "--num_epochs", "1") == 0
    before = (run / "final.pt").read_bytes()
    real, calls = learner.diffusion_loss, []

    def poisoned(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        loss, per_cell = real(*args, **kwargs)  # type: ignore[arg-type]
        calls.append(1)
        return (loss, per_cell * float("nan")) if len(calls) == 3 else (loss, per_cell)

    monkeypatch.setattr(learner, "diffusion_loss", poisoned)
    assert train(tiny_h5ad, run, "--num_epochs", "2", "--resume", "auto") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    # The step counts on from the 14 of the first epoch, and the batch is named by its cells.
    assert re.search(r"the loss is nan at step 16 of epoch 2 \(cells \[\d+, \d+, \d+, \d+\] \.\.\.\)", said)
    assert (run / "final.pt").read_bytes() == before
    assert not (run / "best.pt").exists() or checkpoint.load(run / "best.pt")["epoch"] == 1


def test_weights_that_the_last_step_of_an_epoch_ruins_are_not_saved(
    tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    one_step = ["--batch_size", "500"]
    assert train(tiny_h5ad, run, *one_step, "--num_epochs", "9") == 0
    before = {path: path.read_bytes() for path in run.glob("*.pt")}
    ruinous = ["--learning_rate", "1e25", "--num_epochs", "10", "--resume", "auto"]
    assert train(tiny_h5ad, run, *one_step, *ruinous) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("sedd train: error: the bound on the validation cells is nan after epoch 10 (step 10)")
    assert {path: path.read_bytes() for path in run.glob("*.pt")} == before
    assert len(json.loads((run / "history.json").read_text())) == 9
    # And the way out that the line names is one: the rate is the new one, not that of the checkpoint.
    lower = ["--learning_rate", "1e-3", "--num_epochs", "10", "--resume", "auto"]
    assert train(tiny_h5ad, run, *one_step, *lower) == 0
    assert [entry["learning_rate"] for entry in json.loads((run / "history.json").read_text())[-2:]] == [2e-3, 1e-3]


def test_conditions_are_hidden_from_the_network_together_and_apart_at_their_rates(
    tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sedd.training import learner

    real, told = learner.diffusion_loss, []

    def listening(*args: object, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        told.append((kwargs["condition"], kwargs["library"]))
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(learner, "diffusion_loss", listening)
    flags = ["--condition", "donor", "--condition_library_size", "--condition_dropout", "0.3", "--num_epochs", "4"]
    assert train(tiny_h5ad, tmp_path / "run", *flags) == 0
    condition, library = (torch.cat(values) for values in zip(*told, strict=True))
    label, total = condition[:, 0] == 0, library.isnan()  # every cell has a donor
    assert len(label) == 4 * 216
    # Both with 0.3, and of the rest each with 0.3 by itself; half of the labels left are asked for.
    both = 0.3 + 0.7 * 0.09
    for hidden, rate in ((label, 0.51 + 0.49 / 2), (total, 0.51), (label & total, both + (0.51 - both) / 2)):
        assert binomtest(int(hidden.sum()), len(hidden), rate).pvalue > 1e-3
