"""Settings that no command can do what they say: each is refused in a line that says what would be one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import pytest
from conftest import TINY_FLAGS, make_counts

import sedd
from sedd.cli import main
from sedd.commands import labels_by_column
from sedd.config import ConversionSettings, RunConfig
from sedd.errors import UserError
from sedd.inference.pretrained import Pretrained
from sedd.io.loading.options import Order

LARGEST = 2**63 - 1
TASKS: dict[str, Callable[..., object]] = {
    "impute": sedd.impute,
    "denoise": lambda model, adata, **options: sedd.denoise(model, adata, rounds=1, folds=2, **options),
    "score": lambda model, adata, **options: sedd.score(model, adata, reference=adata, n_masks=1, **options),
    "generate": lambda model, _, **options: sedd.generate(model, n=2, num_steps=2, **options),
}
pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, 1.5, None])
@pytest.mark.parametrize("task", [*TASKS, "evaluate"])
def test_a_task_refuses_what_is_no_seed(task: str, seed: object, model: Pretrained) -> None:
    with pytest.raises(UserError, match=r"--seed is .*; expected a whole number from 0 to 2\*\*63 - 1"):
        {**TASKS, "evaluate": sedd.evaluate}[task](model, make_counts(24), seed=seed, progress=False)


@pytest.mark.parametrize("settings", [RunConfig, ConversionSettings, Order])
def test_settings_refuse_what_is_no_seed(settings: Callable[..., object]) -> None:
    for seed in (-1, 2**63, 2**70):
        with pytest.raises(UserError, match="--seed is"):
            settings(seed=seed)
    assert settings(seed=LARGEST).seed == LARGEST  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", TASKS)
def test_the_largest_seed_is_one(task: str, model: Pretrained, tmp_path: Path) -> None:
    TASKS[task](model, make_counts(24), seed=LARGEST, output=tmp_path / "out.h5ad", progress=False)
    assert ad.read_h5ad(tmp_path / "out.h5ad").uns["sedd"]["seed"] == LARGEST


def test_a_shuffle_and_a_run_take_the_largest_seed(tmp_path: Path) -> None:
    make_counts(60).write_h5ad(tmp_path / "a.h5ad")
    assert main(["convert", str(tmp_path / "a.h5ad"), str(tmp_path / "a.zarr"), "--shuffle", "--seed", str(LARGEST)]) == 0
    words = ["train", "--data_path", str(tmp_path / "a.zarr"), "--checkpoint_dir", str(tmp_path / "run"), *TINY_FLAGS, "--num_epochs", "1"]
    assert main([*words, "--seed", str(LARGEST)]) == 0


def test_two_labels_of_one_column_are_refused() -> None:
    assert labels_by_column("where", ["type=a=b", "batch=1", "batch=1"]) == {"type": "a=b", "batch": "1"}
    with pytest.raises(UserError, match=r"--where gives type two labels, 'a' and 'b'; expected one"):
        labels_by_column("where", ["type=a", "type=b"])


def test_a_temperature_at_which_a_law_of_counts_has_no_end_is_refused(model: Pretrained) -> None:
    with pytest.raises(UserError, match=r"temperature is 50\.0; expected more than 0 and at most 10"):
        sedd.generate(model, n=2, temperature=50.0, progress=False)
