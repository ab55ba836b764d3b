"""The card of an exported model: what it is, what it was trained on, how well it does, how to use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sedd.pretrained import Pretrained

_MEASURED = {
    "val_nelbo": "likelihood bound, nats per cell (lower is better)",
    "val_nelbo_per_gene": "likelihood bound, nats per gene",
    "val_nll": "hidden counts: negative log score, nats per entry",
    "val_mae": "hidden counts: mean absolute error",
}


def model_card(model: Pretrained, config: dict[str, Any]) -> str:
    """The card as Markdown.

    Parameters
    ----------
    model
        The model, whose run's metrics.json is used if it was made after the checkpoint.
    config
        What goes into config.json.
    """
    parts = [_head(), _about(model, config), _data(model, config), _metrics(model), _use(model), _settings(config)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head() -> str:
    return "\n".join(["---", "library_name: sedd", "tags: [single-cell, RNA-seq, discrete-diffusion]", "---"])


def _about(model: Pretrained, config: dict[str, Any]) -> str:
    size = model.model.config
    n_parameters = sum(p.numel() for p in model.model.parameters())
    abilities = "imputes and denoises counts and generates cells" if model.knows_masks else "generates cells"
    return (
        f"# A diffusion model of cells from {config['data']['path']}\n\n"
        f"A score-entropy discrete diffusion model of single-cell counts: it {abilities}. Network: {size['attention']} "
        f"attention, {size['hidden_dim']} wide, {size['num_layers']} layers, {size['num_heads']} heads, {size['head']} head; "
        f"{n_parameters:,} parameters. Trained with {config['args']['graph']} graph, {config['args']['noise']} noise and the "
        f"objective {config['args']['objective']} for {config['epoch']} epochs, {config['step']} steps."
    )


def _data(model: Pretrained, config: dict[str, Any]) -> str:
    data, split, genes = config["data"], config["split"], list(model.genes)
    shown = ", ".join(f"`{name}`" for name in genes[:8]) + (", ..." if len(genes) > 8 else "")
    lines = [
        "## Data and panel\n",
        f"- `{data['path']}`: {data['n_obs']} cells, {data['n_vars']} genes; {split['n_train']} cells trained on, "
        f"{split['n_val']} held out (seed {split['seed']}). Fingerprint `{data['fingerprint']}`.",
        f"- Panel of {len(genes)} genes: {shown} All of them are in `panel.json`; inputs are matched to them by name.",
        f"- {model.binning.n_bins} bins ({model.binning.kind}) of {'counts' if data['is_counts'] else 'real values'}.",
    ]
    lines += [f"- Conditioned on `{column}`: {', '.join(labels)}." for column, labels in model.categories.items()]
    if config["args"]["condition_library_size"]:
        lines.append("- Conditioned on a cell's total count over the panel.")
    return "\n".join([*lines, "- It knows cells like these; of other tissues, species or assays it knows nothing."])


def _metrics(model: Pretrained) -> str:
    history = model.state["history"]
    lines = []
    if history:
        last = history[-1]
        lines += [f"## Metrics\n\nOn the held-out cells, after epoch {last['epoch']}:\n", "| metric | value |", "|---|---|"]
        for name, label in _MEASURED.items():
            if name in last:
                error = f" (standard error {last['val_nelbo_se']:.3g})" if name == "val_nelbo" else ""
                lines.append(f"| {label} | {last[name]:.5g}{error} |")
    evaluated = model.path.parent / "metrics.json"
    if model.path.is_file() and evaluated.is_file() and evaluated.stat().st_mtime >= model.path.stat().st_mtime:
        lines += ["", "By `sedd evaluate`, beside baselines:\n", "```", _table(evaluated), "```"]
    return "\n".join(lines)


def _table(path: Path) -> str:
    from sedd.metrics import metrics_table

    return metrics_table(json.loads(path.read_text()))


def _use(model: Pretrained) -> str:
    where = "".join(f' --where {column}="{labels[0]}"' for column, labels in list(model.categories.items())[:1] if labels)
    commands = [f"sedd generate DIRECTORY{where} -n 500 -o cells.h5ad"]
    calls = ["cells = sedd.generate(model, 500)"]
    if model.knows_masks:
        commands = ["sedd impute DIRECTORY mine.h5ad -o imputed.h5ad", "sedd denoise DIRECTORY mine.h5ad -o denoised.h5ad", *commands]
        calls = ['denoised = sedd.denoise(model, "mine.h5ad")', *calls]
    lines = ["import sedd", "", 'model = sedd.Pretrained.from_pretrained("DIRECTORY")', *calls]
    return "\n".join(["## Use\n", "```bash", *commands, "```", "", "```python", *lines, "```", "", "Loading it executes nothing of it."])


def _settings(config: dict[str, Any]) -> str:
    names = ("batch_size", "learning_rate", "warmup_steps", "weight_decay", "dropout", "ema_decay", "mixed_precision", "seed")
    rows = [f"| `--{name}` | {config['args'][name]} |" for name in names]
    head = "## Settings\n\nAll of them are in `config.json`, with the history of the run.\n\n| setting | value |\n|---|---|"
    return "\n".join([head, *rows, f"| sedd | {config['sedd_version']} |"])
