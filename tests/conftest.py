"""Data and runs that several tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from accelerate.state import AcceleratorState

from sedd.inference.pretrained import Pretrained

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # tests of one folder use what is in another's, as `tests.`; last, so that an installed sedd is what is tested


def make_counts(n_obs: int = 240, n_vars: int = 60, seed: int = 0) -> ad.AnnData:
    """Cells of three types with genes of their own, as an AnnData of float32 counts with labels and a missing one."""
    return _draw(n_obs, n_vars, seed)[0]


def true_rates(n_obs: int = 240, n_vars: int = 60, seed: int = 0) -> np.ndarray:
    """The Poisson rates that the counts of `make_counts` were drawn at, (n_obs, n_vars)."""
    return _draw(n_obs, n_vars, seed)[1]


def _draw(n_obs: int, n_vars: int, seed: int) -> tuple[ad.AnnData, np.ndarray]:
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=n_obs)
    rate = rng.gamma(0.5, 1.0, size=(3, n_vars)) + 0.05
    depth = rng.lognormal(0, 0.3, size=n_obs)
    rates = rate[kind] * depth[:, None]
    counts = rng.poisson(rates).astype(np.float32)
    labels = pd.Categorical.from_codes(kind, ["T cell", "monocyte", "B cell"])  # in no alphabetical order
    labels[0] = None
    obs = pd.DataFrame(
        {"cell_type": labels, "donor": np.where(np.arange(n_obs) % 2, "d1", "d2"), "depth": depth},
        index=[f"cell{i}" for i in range(n_obs)],
    )
    var = pd.DataFrame({"symbol": [f"G{i}" for i in range(n_vars)]}, index=[f"gene{i}" for i in range(n_vars)])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var), rates


@pytest.fixture(scope="session")
def tiny_h5ad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `make_counts()`."""
    path = tmp_path_factory.mktemp("data") / "tiny.h5ad"
    make_counts().write_h5ad(path)
    return path


TINY_FLAGS = [
    *("--genes", "all", "--num_epochs", "2", "--batch_size", "16", "--learning_rate", "2e-3", "--hidden_dim", "16"),
    *("--num_layers", "1", "--num_heads", "2", "--num_latents", "1", "--num_bins", "64", "--warmup_steps", "5"),
    *("--ema_decay", "0.9", "--num_threads", "1", "--log_with", "none"),
]


@pytest.fixture(scope="session")
def tiny_run(tiny_h5ad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two epochs on `tiny_h5ad`, conditioned on cell type and library size."""
    from sedd.cli import main

    directory = tmp_path_factory.mktemp("runs") / "tiny"
    flags = ["--condition", "cell_type", "--condition_library_size"]
    assert main(["train", "--data_path", str(tiny_h5ad), "--checkpoint_dir", str(directory), *TINY_FLAGS, *flags]) == 0
    return directory


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Two OpenMP threads on two busy cores wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run, and a test process has many."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def model(tiny_run: Path) -> Pretrained:
    """The model of `tiny_run`."""
    return Pretrained.load(tiny_run)


def dense(matrix: object) -> np.ndarray:
    """A matrix of an AnnData as an array."""
    return np.asarray(matrix.toarray() if sp.issparse(matrix) else matrix)  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def _small_forests() -> Iterator[None]:
    """The forests that tell generated cells from real ones took nine tenths of every test that evaluates; what a test asks for itself stays."""
    from sedd.metrics import generation

    whole = generation.RandomForestClassifier
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "RandomForestClassifier", lambda trees, **settings: whole(trees if trees < 50 else 5, **settings))
        yield
