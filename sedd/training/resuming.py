"""What a run resumes from, and whether it may: every setting is compared with those of the checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sedd import checkpoint
from sedd.config import SECTIONS, TrainConfig
from sedd.errors import SettingError, UserError, check_permitted, warn_user
from sedd.model import SEDDTransformer
from sedd.processes import is_main
from sedd.training.directory import RunDirectory

SAME, REPORTED, CONTENT, FREE = "same", "reported", "content", "free"
ON_RESUME: dict[str, str] = {
    "data_path": CONTENT, "cache_dir": FREE, "layer": SAME, "raw": SAME, "modality": SAME, "gene_names": SAME, "strip_version": SAME,
    "round": SAME, "keys": SAME, "drop": SAME, "join": SAME, "genes": CONTENT, "binning": SAME, "num_bins": SAME,
    "val_fraction": SAME, "val_cells": SAME, "limit_cells": SAME, "memory_budget": FREE, "loader_threads": FREE, "masks_on": FREE,
    "model": CONTENT, "hidden_dim": SAME, "num_layers": SAME, "num_heads": SAME, "dropout": SAME, "attention": SAME,
    "num_latents": SAME, "graph": SAME, "noise": SAME, "objective": SAME, "mask_ratio": SAME, "condition": SAME,
    "condition_library_size": SAME, "condition_dropout": SAME, "gene_embeddings": CONTENT,
    "num_epochs": FREE, "min_steps": FREE, "batch_size": REPORTED, "learning_rate": REPORTED, "warmup_steps": SAME, "weight_decay": SAME, "grad_clip": REPORTED,
    "ema_decay": SAME, "gradient_accumulation_steps": REPORTED, "mixed_precision": REPORTED, "compile": REPORTED,
    "checkpoint_dir": FREE, "resume": FREE, "overwrite": FREE, "seed": SAME, "num_threads": FREE, "checkpoint_every": FREE,
    "keep_checkpoints": FREE, "early_stopping": FREE, "log_with": FREE, "progress": FREE, "dry_run": FREE,
}  # fmt: skip
"""What a resumed run does about each setting, if it is not that of the checkpoint.

SAME: it is an error, for the result would be of neither. REPORTED: the way out of a loss that grows or of too little memory; the run says that
it changes how the rest is fitted. CONTENT: what counts is what it names, a store, a list of genes, vectors or sizes, and that is
compared. FREE: it says how long, where and on what the run trains, and the steps are the same.
"""


PRESET = ("batch_size", "learning_rate")
"""Settings that depend on the device where they are not given; a run that is resumed keeps its own."""


def settled(config: TrainConfig, state: dict[str, Any] | None, *, on_gpu: bool, n_cells: int) -> TrainConfig:
    """Return the settings with batch size and learning rate: those given, else those of the run that is resumed, else of the device.

    Parameters
    ----------
    state
        The checkpoint to resume from, if any.
    on_gpu, n_cells
        As in `TrainConfig.settled`.
    """
    if state is not None:
        own = {name: state["args"][name] for name in PRESET if getattr(config.optim, name) is None}
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **own))
    chosen = config.settled(on_gpu=on_gpu, n_cells=n_cells)
    picked = [_flag(name, getattr(chosen.optim, name)) for name in PRESET if getattr(config.optim, name) is None]
    if picked and config.run.progress and is_main():
        where = "a GPU" if on_gpu else "a CPU"
        tqdm.write(f"{' '.join(picked)}: what --model {config.model.model} trains with on {where} and {n_cells:,} cells", file=sys.stderr)
    return chosen


def state_to_resume(config: TrainConfig, directory: RunDirectory) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint that `--resume` names and its state, or None for a new run. Nothing is changed by that.

    Raises
    ------
    UserError
        If the directory holds another run or something else, or if the checkpoint cannot be read or was made with other settings.
    """
    run = config.run
    directory.check_usable()
    if run.resume is None:
        directory.check_free(overwrite=run.overwrite)
        return None
    if run.resume == "auto":
        found = checkpoint.load_newest(directory.path)
        if found is None:
            if directory.ended_before_it_saved():  # by a kill: a job that is queued again starts like this
                return None
            if not run.overwrite and (there := [p.name for p in directory.files()]):
                raise UserError(
                    f"{directory.path}: --resume auto found no checkpoint that can be read, but other files of a run ({', '.join(there[:4])}). "
                    "Nothing was changed. Put a whole checkpoint there, name one with --resume FILE, or pass --overwrite to "
                    "start anew."
                )
            directory.check_free(overwrite=run.overwrite)
            return None
    else:
        path = Path(run.resume)
        check_permitted(path)
        found = checkpoint.load_newest(path) if path.is_dir() else None
        if found is None:
            path = checkpoint.find(path) if path.is_dir() else path
            found = path, checkpoint.load(path)
    path, state = found
    if path.resolve().parent != directory.path.resolve():
        directory.check_free(overwrite=run.overwrite)
    check_same_settings(state, config)
    return path, state


def check_same_settings(state: dict[str, Any], config: TrainConfig) -> None:
    """Compare all settings with those of a checkpoint.

    Raises
    ------
    UserError
        If one differs that may not; all of these are named, with both values.
    """
    fields = {field.name: field for section in SECTIONS.values() for field in section.__dataclass_fields__.values()}
    before, now = state["args"], config.to_flat()
    wrong: list[tuple[str, Any, Any]] = []
    for name, kind in ON_RESUME.items():
        was, given = before.get(name, fields[name].default), now[name]  # a setting that came later had its default
        if name in PRESET and getattr(config.optim, name) is None:
            continue  # it stays
        was, given = (list(value) if isinstance(value, list | tuple) else value for value in (was, given))
        if name == "gene_embeddings":
            same = (was is None) == (given is None)
        else:
            same = kind in (FREE, CONTENT) or was == given
        if not same and kind == REPORTED:
            warn_user(
                f"--resume: from here on {_flag(name, given)} where the checkpoint was made with {_flag(name, was)}."
            )
        elif not same:
            wrong.append((name, was, given))
    if wrong:
        made, said = (", ".join(_flag(name, values[k]) for name, *values in wrong) for k in range(2))
        raise SettingError(
            f"--resume: the checkpoint was made with {made}; the settings now say {said}. A run is resumed with the settings that "
            f"determine its result: pass {made}, or start anew in another --checkpoint_dir."
        )


def _flag(name: str, value: Any) -> str:
    """Return a setting as on the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    if value is None or value == []:
        return f"no --{name}"
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def check_same_vectors(state: dict[str, Any], model: SEDDTransformer, file: str | None) -> None:
    """Check that pretrained gene vectors are those that the model of a checkpoint was trained with.

    Raises
    ------
    UserError
        If `file` holds others.
    """
    for name, vectors in model.named_buffers():
        known = state["model"].get(name)
        if name.endswith(".pretrained") and (
            known is None or known.shape != vectors.shape or not torch.equal(known, vectors.cpu())
        ):
            raise SettingError(
                f"--resume: --gene_embeddings {file} holds other vectors than those the checkpoint was trained with; pass the file "
                "with those, or start anew in another --checkpoint_dir."
            )


def check_same_groups(state: dict[str, Any], optimizer: Any) -> None:
    """Check that weights were fitted in the groups of rates in which an optimizer fits them.

    Raises
    ------
    UserError
        If the checkpoint was written when other weights shared a rate.
    """
    before, now = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups))
    if before != now:
        raise SettingError(
            "--resume: the checkpoint was written by a version of sedd that fits some weights at other rates, such as those that answer labels. The "
            "model in it can be used; to train, use that version or start anew in another --checkpoint_dir."
        )
