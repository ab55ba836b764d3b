"""A model to hand on: a directory of safetensors weights, JSON settings, the panel and a card, and nothing to execute.

    model.safetensors   averaged weights, histogram of the training tokens, quantiles of the totals
    config.json         size and diffusion of the model, settings and history of the run, checksums
    panel.json          genes with their annotation, bins, labels of conditions
    README.md           the card: data, panel, metrics, how to use it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sedd.checkpoint import FORMAT
from sedd.errors import UserError
from sedd.model_card import model_card

if TYPE_CHECKING:
    from sedd.pretrained import Pretrained

_WEIGHTS, _CONFIG, _PANEL, _CARD = "model.safetensors", "config.json", "panel.json", "README.md"
_SETTINGS = ("epoch", "step", "history", "model_config", "split", "data")
_OF_PANEL = ("genes", "var", "binning", "categories")
_PATHS = ("data_path", "gene_embeddings", "checkpoint_dir")  # settings of which only the name is handed on


def is_export(path: str | Path) -> bool:
    """Whether `path` is a directory with the settings of an exported model in it."""
    try:
        return bool(json.loads((Path(path) / _CONFIG).read_text()).get("library_name") == "sedd")
    except (OSError, ValueError, AttributeError):
        return False


def write_export(model: Pretrained, directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model and its card into a directory, which appears when it is complete.

    Parameters
    ----------
    model
        To hand on. Folders of the settings' paths are left out.
    directory
        Where to.
    overwrite
        Replace an exported model that is there.

    Returns
    -------
    directory

    Raises
    ------
    UserError
        If `directory` exists, unless it is an exported model and `overwrite` is given, or if genes were added to the model.
    """
    if list(model.genes) != list(model.state["genes"]):
        raise UserError(f"{model.path}: genes were added to this model; export it as it was trained and add them after loading.")
    target = Path(directory)
    if target.exists() and not (overwrite and is_export(target)):
        way_out = "choose another directory" if overwrite else "pass --overwrite to replace it, if it is an exported model"
        raise UserError(f"{target}: exists already; {way_out}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        _write_files(model, part)
        os.chmod(part, 0o777 & ~_umask())
        old = part.with_name(part.name + ".old")
        if target.exists():
            os.replace(target, old)
        os.replace(part, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _write_files(model: Pretrained, folder: Path) -> None:
    from sedd import __version__
    from sedd.pretrained import pack_histogram

    state = model.state
    histogram = pack_histogram(model.histogram)
    tensors = {f"model.{name}": value for name, value in model.model.state_dict().items()}
    tensors |= {f"histogram.{name}": histogram[name] for name in ("indptr", "indices", "data")}
    tensors["libraries"] = state["libraries"]
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / _WEIGHTS)
    (folder / _PANEL).write_text(json.dumps({name: state[name] for name in _OF_PANEL}, indent=1) + "\n")
    args = {name: Path(v).name if name in _PATHS and v else v for name, v in state["args"].items()}
    config = {
        "library_name": "sedd",
        "sedd_version": __version__,
        "sedd_format": FORMAT,
        **{name: state[name] for name in _SETTINGS},
        "data": {**state["data"], "path": Path(state["data"]["path"]).name},
        "args": {**args, "cache_dir": None, "resume": None},
        "histogram_shape": histogram["shape"],
        "sha256": {name: _sha256((folder / name).read_bytes()) for name in (_WEIGHTS, _PANEL)},
    }
    config["digest"] = _digest(config)
    (folder / _CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / _CARD).write_text(model_card(model, config))


def read_export(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint has for users of the model, from a directory that `write_export` made.

    Raises
    ------
    UserError
        If a file is missing or not as it was written.
    """
    folder = Path(directory)
    config = _read(folder, _CONFIG)
    try:
        settings = json.loads(config)
        if settings["sedd_format"] != FORMAT:
            raise UserError(f"{folder}: is of format {settings['sedd_format']!r}; this version of sedd reads format {FORMAT}.")
        if settings.pop("digest") != _digest(settings):
            raise UserError(f"{folder / _CONFIG}: is damaged (not as it was written); export the model again.")
        for name, expected in settings["sha256"].items():
            if _sha256(_read(folder, name)) != expected:
                raise UserError(f"{folder / name}: is damaged (its checksum is not that of config.json); export the model again.")
        panel = json.loads(_read(folder, _PANEL))
        tensors = load_file(folder / _WEIGHTS)
    except (ValueError, KeyError, AttributeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: is damaged or not an exported model ({reason[:200]}); export it again.") from error
    histogram = {name: tensors[f"histogram.{name}"] for name in ("indptr", "indices", "data")}
    return {
        **{name: settings[name] for name in ("sedd_format", "args", *_SETTINGS)},
        **panel,
        "model": {name.removeprefix("model."): v for name, v in tensors.items() if name.startswith("model.")},
        "ema": None,
        "histogram": {"shape": settings["histogram_shape"], **histogram},
        "libraries": tensors["libraries"],
    }


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{folder}: lacks {name}; expected all files of an exported model. Copy or export it again.") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(config: dict[str, Any]) -> str:
    return _sha256(json.dumps(config, sort_keys=True).encode())


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
