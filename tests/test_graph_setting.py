"""`--graph` and `--noise` from training to what is made with the model, against a joint that can be enumerated."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import TINY_FLAGS, dense
from scipy.stats import chisquare
from toy import Joint, exact

from sedd import checkpoint
from sedd.cli import main
from sedd.errors import UserError
from sedd.graph import UniformGraph
from sedd.inference.pretrained import Pretrained
from sedd.likelihood import nelbo
from sedd.noise import GeometricNoise
from sedd.tasks import denoise, embed, generate, impute

JOINT = Joint.random(3, 4, seed=3, sharpness=2.5)
INDEPENDENT = -float((JOINT.p * JOINT.independent().log()).sum())


def cells_of(joint: Joint, n: int, seed: int = 0) -> ad.AnnData:
    adata = ad.AnnData(joint.sample(n, seed).numpy().astype(np.float32))
    adata.obs_names = [f"cell{i}" for i in range(n)]
    adata.var_names = [f"gene{i}" for i in range(joint.n_vars)]
    return adata


def bound_of(model: Pretrained) -> float:
    """Its bound with many masks a cell: of three genes the few of the validation vary too much."""
    cells = torch.from_numpy(dense(cells_of(JOINT, 1000, seed=9).X)).long()
    return nelbo(model.model, model.graph, model.noise, [cells], n_masks=64).mean


@pytest.fixture(scope="module")
def joint_h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("joint") / "joint.h5ad"
    cells_of(JOINT, 3000).write_h5ad(path)
    return path


@pytest.fixture(scope="module", params=["loglinear", pytest.param("geometric", marks=pytest.mark.slow)])
def uniform_run(request: pytest.FixtureRequest, joint_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / request.param
    flags = ["--graph", "uniform", "--noise", request.param, "--num_bins", "4", "--dropout", "0", "--batch_size", "64"]
    size = ["--hidden_dim", "32", "--num_epochs", "15", "--learning_rate", "5e-4", "--ema_decay", "0.99"]
    where = ["--data_path", str(joint_h5ad), "--checkpoint_dir", str(directory)]
    assert main(["train", *where, *TINY_FLAGS, *flags, *size]) == 0
    return directory


def test_a_model_of_the_uniform_graph_learns_the_joint_and_draws_it(uniform_run: Path) -> None:
    model = Pretrained.load(uniform_run)
    assert isinstance(model.graph, UniformGraph)
    assert isinstance(model.noise, GeometricNoise) == (uniform_run.name == "geometric")
    last = json.loads((uniform_run / "history.json").read_text())[-1]
    assert "val_nll" not in last  # nothing was hidden
    learned = INDEPENDENT - JOINT.entropy()
    assert learned > 0.3
    assert JOINT.entropy() - 4 * last["val_nelbo_se"] < last["val_nelbo"]
    assert bound_of(model) < INDEPENDENT - 0.5 * learned
    made = torch.from_numpy(dense(generate(model, 4000, num_steps=64, batch_size=4000, progress=False).X))
    distance = JOINT.total_variation(made.long())
    assert distance < 0.5 * 0.5 * float((JOINT.p - JOINT.independent()).abs().sum())


def test_the_bound_of_the_evaluation_is_near_the_entropy_and_says_what_was_left_out(
    uniform_run: Path, joint_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "report")
    few = ["--num_steps", "16", "--n_masks", "64", "--steps", "--no_umap"]
    assert main(["evaluate", str(uniform_run), str(joint_h5ad), "-o", out, *few]) == 0
    assert "Imputation was not measured: the uniform graph" in capsys.readouterr().out
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert set(found) == {"likelihood", "generation"}
    row = found["likelihood"]["nats_per_cell"]
    assert row["ci"][1] > JOINT.entropy() - 0.1
    assert row["sedd"] < row["baselines"]["gene marginals"]
    assert "Imputation was not measured" in (tmp_path / "report" / "report.html").read_text()


def test_what_needs_hidden_genes_is_one_clear_error(uniform_run: Path, joint_h5ad: Path, tmp_path: Path) -> None:
    model, adata = Pretrained.load(uniform_run), cells_of(JOINT, 20)
    for task in (
        lambda: impute(model, adata, predict=["gene0"], progress=False),
        lambda: impute(model, adata, hide=0.4, num_samples=2, progress=False),
        lambda: denoise(model, adata, progress=False),
    ):
        with pytest.raises(UserError, match="was trained with --graph uniform, which hides none"):
            task()
    with pytest.warns(UserWarning, match="2 of the model's 3 genes"), pytest.raises(UserError, match="lack genes"):
        embed(model, adata[:, :2].copy(), progress=False)
    assert embed(model, adata, progress=False).obsm["X_sedd"].shape == (20, 32)
    with pytest.raises(UserError, match="needs the absorbing graph"):
        generate(model, 2, order="confidence", progress=False)


def test_a_model_of_before_the_setting_is_of_the_absorbing_graph(tiny_run: Path, tmp_path: Path) -> None:
    state = checkpoint.load(tiny_run / "final.pt")
    del state["args"]["graph"]
    checkpoint.save(tmp_path / "old.pt", state)
    model = Pretrained.load(tmp_path / "old.pt")
    assert model.knows_masks
    assert "absorbing graph, loglinear noise" in model.describe()


@pytest.mark.slow
def test_geometric_noise_trains_with_the_absorbing_graph_and_draws(joint_h5ad: Path, tmp_path: Path) -> None:
    flags = ["--noise", "geometric", "--binning", "identity", "--num_bins", "4", "--dropout", "0", "--batch_size", "64", "--hidden_dim", "32"]
    flags += ["--num_epochs", "16", "--learning_rate", "5e-4", "--ema_decay", "0.99"]
    where = ["--data_path", str(joint_h5ad), "--checkpoint_dir", str(tmp_path / "run")]
    assert main(["train", *where, *TINY_FLAGS, *flags]) == 0
    last = json.loads((tmp_path / "run" / "history.json").read_text())[-1]
    learned = INDEPENDENT - JOINT.entropy()
    assert JOINT.entropy() - 4 * last["val_nelbo_se"] < last["val_nelbo"]
    assert bound_of(Pretrained.load(tmp_path / "run" / "final.pt")) < INDEPENDENT - 0.7 * learned
    out = impute(tmp_path / "run", cells_of(JOINT, 2000), predict=["gene0"], num_samples=1, progress=False)
    visible = cells_of(JOINT, 2000).X
    drawn = dense(out.layers["sedd_sample_0"])[:, 0].astype(int)
    where_ = (visible[:, 1] == 1) & (visible[:, 2] == 2)
    given = JOINT.p[:, 1, 2] / JOINT.p[:, 1, 2].sum()
    if where_.sum() > 50:
        found = np.bincount(drawn[where_], minlength=4)
        assert chisquare(found, given.numpy() * where_.sum()).pvalue > 1e-6


def test_what_exact_conditionals_impute_is_the_enumerated_posterior() -> None:
    adata = cells_of(JOINT, 8000, seed=5)
    settings = {"num_samples": 1, "num_steps": 1000, "batch_size": 2000, "progress": False}
    out = impute(exact(JOINT), adata, predict=["gene0", "gene2"], **settings)
    found, std, drawn = dense(out.X), dense(out.layers["sedd_std"]), dense(out.layers["sedd_sample_0"])
    assert np.array_equal(found[:, 1], adata.X[:, 1])
    assert np.array_equal(drawn[:, 1], adata.X[:, 1])
    bins = np.arange(4)
    for seen in bins:
        rows = adata.X[:, 1] == seen
        given = Joint(JOINT.p[:, seen])
        for gene, p in ((0, given.p.sum(1).numpy()), (2, given.p.sum(0).numpy())):
            np.testing.assert_allclose(found[rows, gene], p @ bins, atol=1e-5)
        # The spread that is reported is that of the draws; with one draw there is none.
        assert (std[rows] == 0).all()
        pairs = torch.from_numpy(drawn[rows][:, [0, 2]]).long()
        counts, expected = given.histogram(pairs).numpy(), given.p.flatten().numpy() * rows.sum()
        assert chisquare(counts, expected).pvalue > 1e-4
        if rows.sum() > 1500:  # and not of the product of the two posteriors
            assert chisquare(counts, given.independent().flatten().numpy() * rows.sum()).pvalue < 1e-12


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--graph", "hyperbolic"], "hyperbolic"),
        (["--noise", "cosine"], "cosine"),
        (["--graph", "uniform", "--objective", "masked"], "--graph uniform hides none"),
    ],
)
def test_what_there_is_not_is_one_line_of_status_2(
    flags: list[str], says: str, tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data_path", str(tiny_h5ad), "--checkpoint_dir", str(tmp_path / "run")]
    assert main(["train", *where, *TINY_FLAGS, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert says in error[0]
    assert "---" not in error[0]
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_under_its_own_graph_only(
    tiny_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(run), *TINY_FLAGS, "--num_epochs"]
    assert main([*arguments, "1", "--graph", "uniform"]) == 0
    assert main([*arguments, "2", "--resume", "auto"]) == 2
    assert "pass --graph uniform" in capsys.readouterr().err
    assert main([*arguments, "2", "--resume", "auto", "--graph", "uniform"]) == 0
    assert main([*arguments, "2", "--graph", "uniform", "--overwrite", "--checkpoint_dir", str(tmp_path / "two")]) == 0
    one, two = (checkpoint.load(path / "final.pt") for path in (run, tmp_path / "two"))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
