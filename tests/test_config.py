"""Settings: what the flags are, which values they take, and where they may come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sedd.config import (
    SECTIONS,
    TRAINING_DEFAULTS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from sedd.config_files import config_file_arguments, environment_arguments
from sedd.errors import UserError


def test_defaults_are_those_that_users_know() -> None:
    flat = TrainConfig(data=DataConfig(data_path="x.h5ad")).to_flat()
    known = {
        "checkpoint_dir": "experiments/rnaseq_diffusion",
        "num_epochs": 100,
        "batch_size": 32,
        "learning_rate": 1e-4,
        "hidden_dim": 128,
        "num_layers": 4,
        "num_heads": 4,
        "mask_ratio": 0.15,
        "num_bins": 100,
        "dropout": 0.1,
        "val_fraction": 0.1,
        "objective": "score_entropy",
        "resume": None,
    }
    assert {name: flat[name] for name in known} == known


@pytest.mark.parametrize(
    ("size", "shape"), [("small", (128, 4, 4)), ("medium", (256, 6, 8)), ("large", (512, 12, 16))]
)
def test_a_preset_sets_what_is_not_given(size: str, shape: tuple[int, int, int]) -> None:
    config = ModelConfig(model=size)  # type: ignore[arg-type]
    assert (config.hidden_dim, config.num_layers, config.num_heads) == shape
    assert ModelConfig(model=size, num_layers=2).num_layers == 2  # type: ignore[arg-type]
    data = DataConfig(data_path="x.h5ad")
    trained = TrainConfig(data=data, model=config)
    assert {name: trained.to_flat()[name] for name in ("batch_size", "learning_rate")} == TRAINING_DEFAULTS[size]
    assert TrainConfig.from_flat(trained.to_flat()) == trained.settled(on_gpu=False, n_cells=10**6)
    chosen = TrainConfig(data=data, model=config, optim=OptimConfig(batch_size=7))
    assert (chosen.batch_size, chosen.learning_rate) == (7, TRAINING_DEFAULTS[size]["learning_rate"])


@pytest.mark.parametrize(
    ("size", "n_cells", "expected"),
    [
        *[("small", 10**6, (1024, 5e-4)), ("small", 2_400, (32, 1e-4)), ("small", 20_000, (256, 2.8e-4)), ("medium", 10**6, (1024, 5e-4))],
        *[("large", 10**6, (512, 5e-4)), ("large", 8_192, (128, 2.8e-4)), ("large", 1, (64, 2e-4))],
    ],
)
def test_a_gpu_takes_larger_batches_of_many_cells(size: str, n_cells: int, expected: tuple[int, float]) -> None:
    config = TrainConfig(data=DataConfig(data_path="x.h5ad"), model=ModelConfig(model=size))  # type: ignore[arg-type]
    chosen = config.settled(on_gpu=True, n_cells=n_cells)
    assert (chosen.batch_size, chosen.learning_rate) == expected
    given = dataclasses.replace(config, optim=OptimConfig(batch_size=7, learning_rate=3.1416e-3))
    assert given.settled(on_gpu=True, n_cells=n_cells) == given.settled(on_gpu=False, n_cells=n_cells) == given
    assert chosen.settled(on_gpu=False, n_cells=5) == chosen


@pytest.mark.parametrize(
    ("section", "setting", "says"),
    [
        (ModelConfig, {"hidden_dim": 100, "num_heads": 3}, "not divisible by --num_heads 3"),
        (ModelConfig, {"mask_ratio": 1.0}, "--mask_ratio is 1.0; expected a share between 0 and 1"),
        (ModelConfig, {"mask_ratio": 0.0}, "--mask_ratio is 0.0"),
        (ModelConfig, {"dropout": 1.0}, "--dropout"),
        (ModelConfig, {"num_layers": 0}, "--num_layers is 0"),
        (OptimConfig, {"batch_size": 0}, "--batch_size is 0; expected at least 1"),
        (OptimConfig, {"learning_rate": 0.0}, "--learning_rate"),
        (OptimConfig, {"ema_decay": 1.0}, "--ema_decay"),
        (OptimConfig, {"num_epochs": 0}, "--num_epochs"),
        (DataConfig, {"data_path": "x", "num_bins": 1}, "--num_bins"),
        (DataConfig, {"data_path": "x", "val_fraction": 1.0}, "--val_fraction"),
        (DataConfig, {"data_path": "x", "limit_cells": 1}, "--limit_cells"),
        (RunConfig, {"checkpoint_every": "often"}, "--checkpoint_every is 'often'; expected steps"),
        (RunConfig, {"keep_checkpoints": 0}, "--keep_checkpoints"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(section: type, setting: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        section(**setting)


def test_checkpoint_every_takes_steps_or_minutes() -> None:
    assert RunConfig(checkpoint_every="500").checkpoint_interval() == (500, None)
    assert RunConfig(checkpoint_every="1.5min").checkpoint_interval() == (None, 90.0)


def test_flat_settings_are_a_round_trip() -> None:
    config = TrainConfig(
        data=DataConfig(data_path="x.h5ad", num_bins=7), model=ModelConfig(condition=("cell_type",), model="medium")
    )
    assert TrainConfig.from_flat(config.to_flat()) == config.settled(on_gpu=False, n_cells=1)
    with pytest.raises(UserError, match="unknown settings"):
        TrainConfig.from_flat({"data_path": "x", "speed": 11})


def test_every_setting_has_a_help_text_and_one_name() -> None:
    names = [f.name for section in SECTIONS.values() for f in dataclasses.fields(section)]
    assert len(names) == len(set(names))
    for section in SECTIONS.values():
        source = Path(__file__).parent.parent.joinpath("sedd/config.py").read_text()
        for f in dataclasses.fields(section):
            after = source.split(f"\n    {f.name}: ", 1)[1].splitlines()[1]
            assert after.strip().startswith('"""'), f"{f.name} has no help"


def test_a_file_of_settings_becomes_arguments(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("batch-size: 64\nlearning_rate: 2.0e-4\ncompile: true\noverwrite: false\ncondition: [a, b]\nlayer: null\n")
    assert config_file_arguments(str(path)) == [
        *("--batch_size", "64", "--learning_rate", "0.0002", "--compile", "--no_overwrite", "--condition", "a", "b")
    ]


@pytest.mark.parametrize(
    ("text", "says"), [("speed: 11", "unknown setting 'speed'"), ("- 1", "holds a list"), ("a: [", "cannot be read")]
)
def test_a_bad_file_of_settings_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        config_file_arguments(str(path))


def test_settings_come_from_the_environment_by_the_same_names() -> None:
    environment = {"DATA_PATH": "a b.h5ad", "NUM_EPOCHS": "3", "COMPILE": "1", "OVERWRITE": "0", "CONDITION": "x y", "LAYER": ""}
    assert environment_arguments(environment) == [
        *("--data_path", "a b.h5ad", "--condition", "x", "y", "--num_epochs", "3", "--compile", "--no_overwrite")
    ]
