"""A model to hand on: a directory of safetensors weights, JSON settings, the panel and a card, and nothing to execute.

::

    model.safetensors   averaged weights, histogram of the training tokens, quantiles of the totals
    config.json         size and diffusion of the model, settings and history of the run, checksums
    panel.json          genes with their annotation, bins, labels of conditions
    README.md           the card: data, panel, metrics, how to use it
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sedd import __version__
from sedd.binning import Binning
from sedd.checkpoint import FORMAT
from sedd.config import bound_is_given
from sedd.errors import DamagedFileError, ExistsError, MissingFileError, UserError, WrongFileError, check_permitted
from sedd.io.outputs import clear, move_into_place, only_writer

_WEIGHTS, _CONFIG, _PANEL, _CARD = "model.safetensors", "config.json", "panel.json", "README.md"
_SETTINGS = ("epoch", "step", "history", "model_config", "split", "data")
_OF_PANEL = ("genes", "var", "binning", "categories")
_PATHS = ("data_path", "genes", "gene_embeddings", "checkpoint_dir")  # settings of which only the name is handed on


def is_export(path: str | Path) -> bool:
    """Whether `path` is a directory with the settings of an exported model in it."""
    try:
        return bool(json.loads((Path(path) / _CONFIG).read_text()).get("library_name") == "sedd")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def is_part_of_export(path: str | Path) -> bool:
    """Whether `path` is a directory with at least one file of an exported model in it, so that it is no directory of a run."""
    check_permitted(path)
    return any((Path(path) / name).is_file() for name in (_CONFIG, _WEIGHTS, _PANEL))


def write_export(
    state: dict[str, Any],
    weights: dict[str, Tensor],
    directory: str | Path,
    *,
    source: Path,
    n_parameters: int,
    overwrite: bool = False,
) -> Path:
    """Write a model and its card into a directory, which appears when it is complete.

    Parameters
    ----------
    state
        Of the model's checkpoint. Folders of the settings' paths are left out.
    weights
        To hand on: the averaged ones where there are any.
    directory
        Where to.
    source
        The checkpoint. If a metrics.json beside it is newer, the card shows it.
    n_parameters
        Of the model.
    overwrite
        Replace an exported model that is there.

    Returns
    -------
    directory

    Raises
    ------
    UserError
        If `directory` exists, unless it is an exported model and `overwrite` is given.
    """
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(target, wait=False) as folder:
        if target.is_symlink():
            raise UserError(f"{target}: is a link to {os.readlink(target)}, so it is not replaced. Name that, or choose another directory.")
        if target.exists() and not (overwrite and is_export(target)):
            way_out = "choose another directory" if overwrite else "pass --overwrite to replace it, if it is an exported model"
            raise ExistsError(f"{target}: exists already; {way_out}.")
        clear(folder)  # of a process that was killed
        part = Path(folder, target.name)
        part.mkdir()
        try:
            _write_files(state, weights, source, n_parameters, part)
            move_into_place(part, target)
        finally:
            clear(folder)
    return target


def _write_files(state: dict[str, Any], weights: dict[str, Tensor], source: Path, n_parameters: int, folder: Path) -> None:
    histogram = state["histogram"]
    tensors = {f"model.{name}": value for name, value in weights.items()}
    tensors |= {f"histogram.{name}": histogram[name] for name in ("indptr", "indices", "data")}
    tensors["libraries"] = state["libraries"]
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / _WEIGHTS)
    (folder / _PANEL).write_text(json.dumps({name: state[name] for name in _OF_PANEL}, indent=1) + "\n")
    args = {name: _names(v) if name in _PATHS and v else v for name, v in state["args"].items()}
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
    (folder / _CARD).write_text(model_card(config, json.loads((folder / _PANEL).read_text()), source, n_parameters))


def _names(paths: str | Sequence[str]) -> str | list[str]:
    return Path(paths).name if isinstance(paths, str) else [Path(path).name for path in paths]


def read_export(directory: str | Path) -> dict[str, Any]:
    """Return what a checkpoint has for users of the model, from a directory that `write_export` made.

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
            raise WrongFileError(f"{folder}: is of format {settings['sedd_format']!r}; this version of sedd reads format {FORMAT}.")
        if settings.pop("digest") != _digest(settings):
            raise DamagedFileError(f"{folder / _CONFIG}: is damaged (not as it was written); export the model again.")
        if settings["sha256"].keys() != {_WEIGHTS, _PANEL}:  # no file is read that is not one of a model, wherever it is
            raise WrongFileError(f"{folder / _CONFIG}: names other files than those of an exported model; expected {_WEIGHTS} and {_PANEL}. Export it again.")
        for name, expected in settings["sha256"].items():
            if _sha256(_read(folder, name)) != expected:
                raise DamagedFileError(f"{folder / name}: is damaged (its checksum is not that of config.json); export the model again.")
        panel = json.loads(_read(folder, _PANEL))
        tensors = load_file(folder / _WEIGHTS)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedFileError(f"{folder}: is damaged or not an exported model ({reason[:200]}); export it again.") from error
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
    path = folder / name
    check_permitted(path)
    if not os.path.lexists(path):
        raise MissingFileError(f"{folder}: lacks {name}; expected all files of an exported model. Copy or export it again.")
    if not path.is_file():  # a device or a pipe may have no end
        raise WrongFileError(f"{path}: is not a file; expected all files of an exported model. Copy or export it again.")
    return path.read_bytes()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(config: dict[str, Any]) -> str:
    return _sha256(json.dumps(config, sort_keys=True).encode())


_MEASURED = {
    "val_nelbo": "likelihood bound, nats per cell (lower is better)",
    "val_nelbo_per_gene": "likelihood bound, nats per gene",
    "val_nll": "hidden counts: negative log score, nats per entry",
    "val_mae": "hidden counts: mean absolute error",
}


def model_card(config: dict[str, Any], panel: dict[str, Any], source: Path, n_parameters: int) -> str:
    """Return the card as Markdown: what the model is, what it was trained on, how well it does, how to use it.

    Parameters
    ----------
    config, panel
        What goes into config.json and panel.json.
    source
        The checkpoint. The metrics.json beside it is used if it was made later.
    n_parameters
        Of the model.
    """
    knows_masks = config["args"].get("graph", "absorbing") == "absorbing"
    parts = [
        _head(),
        _about(config, n_parameters, knows_masks),
        _data(config, panel),
        _metrics(config, source),
        _use(panel, knows_masks),
        _settings(config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: object) -> str:
    """Return a name from the data as one line of Markdown that says it and does nothing."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    """Return a name from the data as a code span, whose fence is longer than any that is in it."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _head() -> str:
    return "\n".join(["---", "library_name: sedd", "tags: [single-cell, RNA-seq, discrete-diffusion]", "---"])


def _about(config: dict[str, Any], n_parameters: int, knows_masks: bool) -> str:
    size = config["model_config"]
    abilities = "imputes and denoises counts and generates cells" if knows_masks else "generates cells"
    return (
        f"# A diffusion model of cells from {_plain(config['data']['path'])}\n\n"
        f"A score-entropy discrete diffusion model of single-cell counts: it {abilities}. Network: {size['attention']} "
        f"attention, {size['hidden_dim']} wide, {size['num_layers']} layers, {size['num_heads']} heads; "
        f"{n_parameters:,} parameters. Trained with {config['args']['graph']} graph, {config['args']['noise']} noise and the "
        f"objective {config['args']['objective']} for {config['epoch']} epochs, {config['step']} steps."
    )


def _data(config: dict[str, Any], panel: dict[str, Any]) -> str:
    data, split, genes = config["data"], config["split"], panel["genes"]
    shown = ", ".join(_code(name) for name in genes[:8]) + (", ..." if len(genes) > 8 else "")
    lines = [
        "## Data and panel\n",
        f"- {_code(data['path'])}: {data['n_obs']} cells, {data['n_vars']} genes; {split['n_train']} cells trained on, "
        f"{split['n_val']} held out (seed {split['seed']}). Fingerprint `{data['fingerprint']}`.",
        f"- Panel of {len(genes)} genes: {shown} All of them are in `panel.json`; inputs are matched to them by name.",
        f"- Values: {Binning.from_dict(panel['binning']).describe()}, of {'counts' if data['is_counts'] else 'real values'}.",
    ]
    lines += [f"- Conditioned on {_code(column)}: {', '.join(map(_plain, labels))}." for column, labels in panel["categories"].items()]
    if config["args"]["condition_library_size"]:
        lines.append("- Conditioned on a cell's total count over the panel.")
    return "\n".join([*lines, "- It knows cells like these; of other tissues, species or assays it knows nothing."])


def _metrics(config: dict[str, Any], source: Path) -> str:
    history = config["history"]
    lines = []
    if history:
        last = history[-1]
        given = _plain(bound_is_given(config["args"]))
        lines += [f"## Metrics\n\nOn the held-out cells, after epoch {last['epoch']}; the bound is given {given}:\n", "| metric | value |", "|---|---|"]
        for name, label in _MEASURED.items():
            if name in last:
                error = f" (standard error {last['val_nelbo_se']:.3g})" if name == "val_nelbo" else ""
                lines.append(f"| {label} | {last[name]:.5g}{error} |")
    evaluated = source.parent / "metrics.json"
    if source.is_file() and evaluated.is_file() and evaluated.stat().st_mtime >= source.stat().st_mtime:
        lines += ["", "By `sedd evaluate`, beside baselines:\n", "```", _table(evaluated), "```"]
    return "\n".join(lines)


def _table(path: Path) -> str:
    from sedd.metrics import metrics_table

    return metrics_table(json.loads(path.read_text()))


def _use(panel: dict[str, Any], knows_masks: bool) -> str:
    simple = re.compile(r"[\w .,+/()-]+")  # others would need quotes of a kind that depends on the shell
    first = [(column, labels[0]) for column, labels in list(panel["categories"].items())[:1] if labels]
    where = "".join(f' --where {column}="{label}"' for column, label in first if simple.fullmatch(f"{column}{label}"))
    commands = [f"sedd generate DIRECTORY{where} -n 500 -o cells.h5ad"]
    calls = ["cells = sedd.generate(model, 500)"]
    if knows_masks:
        commands = ["sedd impute DIRECTORY mine.h5ad -o imputed.h5ad", "sedd denoise DIRECTORY mine.h5ad -o denoised.h5ad", *commands]
        calls = ['denoised = sedd.denoise(model, "mine.h5ad")', *calls]
    lines = ["import sedd", "", 'model = sedd.Pretrained.load("DIRECTORY")', *calls]
    return "\n".join(["## Use\n", "```bash", *commands, "```", "", "```python", *lines, "```", "", "Loading it executes nothing of it."])


def _settings(config: dict[str, Any]) -> str:
    names = ("batch_size", "learning_rate", "warmup_steps", "weight_decay", "dropout", "ema_decay", "mixed_precision", "seed")
    rows = [f"| `--{name}` | {config['args'][name]} |" for name in names]
    head = "## Settings\n\nAll of them are in `config.json`, with the history of the run.\n\n| setting | value |\n|---|---|"
    return "\n".join([head, *rows, f"| sedd | {config['sedd_version']} |"])
