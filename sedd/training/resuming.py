"""What a run resumes from, and whether it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sedd import checkpoint
from sedd.config import RunConfig
from sedd.errors import UserError
from sedd.training.directory import RunDirectory


def state_to_resume(run: RunConfig, directory: RunDirectory) -> dict[str, Any] | None:
    """Return the state that `--resume` names, or None for a new run.

    Raises
    ------
    UserError
        If the directory holds another run, or the checkpoint cannot be read.
    """
    if run.resume is None:
        if not run.overwrite:
            directory.check_free()
        return None
    if run.resume == "auto":
        path = checkpoint.find_newest(directory.path)
        if path is None:
            if not run.overwrite and (found := [p.name for p in directory.files()]):
                raise UserError(
                    f"{directory.path}: --resume auto found no checkpoint that can be read, but other files of a run ({', '.join(found[:4])}). "
                    "Nothing was changed. Put a whole checkpoint there, name one with --resume FILE, or pass --overwrite to "
                    "start anew."
                )
            return None  # a job that is queued again and again starts like this once
    else:
        path = Path(run.resume)
        path = checkpoint.find_newest(path) or checkpoint.find(path) if path.is_dir() else path
    state = checkpoint.load(path)
    if path.resolve().parent != directory.path.resolve() and not run.overwrite:
        directory.check_free()
    return state


def check_same_model(state: dict[str, Any], built: dict[str, Any], graph: str) -> None:
    """Check that the settings build the model of a checkpoint.

    Parameters
    ----------
    state
        The checkpoint.
    built, graph
        What the settings say.

    Raises
    ------
    UserError
        If they do not; the first difference is named.
    """
    trained = {**state["model_config"], "graph": state["args"].get("graph", "absorbing")}
    different = {k: (v, now) for k, v in trained.items() if (now := {**built, "graph": graph}.get(k)) != v}
    if different:
        name, (old, new) = next(iter(different.items()))
        raise UserError(
            f"--resume: the checkpoint's model has {name} {old}, the settings say {new}; pass --{name} {old} or start anew "
            "in another --checkpoint_dir."
        )
