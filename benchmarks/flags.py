"""The flags of a benchmark: every one says what it is and what it is by default. Imports nothing but argparse, for interpreters that have no sedd."""

from __future__ import annotations

import argparse
from typing import Any

MEANINGS = {
    "--add": "add to what was measured before",
    "--attention": "designs of the network",
    "--batch_size": "cells per step",
    "--batches": "cells of a batch, with commas between several",
    "--cells": "number of cells",
    "--compile": "compile the network with torch.compile",
    "--data": "an .h5ad of raw counts",
    "--device": "where the network runs",
    "--ema_decay": "decay per step of the averaged weights",
    "--epochs": "passes over the training cells",
    "--figure": "where the picture goes",
    "--folder": "where arrays are kept between the steps",
    "--genes": "number of genes",
    "--hidden_dim": "width of the network",
    "--learning_rate": "learning rate of AdamW",
    "--limit_cells": "use only this many cells",
    "--methods": "which methods are measured",
    "--mixed_precision": "arithmetic of the network",
    "--model": "size of the network",
    "--n_genes": "genes of the panel, the most variable",
    "--num_bins": "bins of a value",
    "--num_epochs": "passes over the training cells",
    "--num_heads": "attention heads",
    "--num_latents": "latents of the network",
    "--num_layers": "layers of the network",
    "--num_steps": "steps of the sampler",
    "--output": "where the JSON goes",
    "--peer_python": "interpreter of an environment that has the peers",
    "--repeats": "how often each case is run",
    "--rounds": "interleaved rounds",
    "--seconds": "seconds to time each case for",
    "--seed": "seed of all random choices",
    "--seeds": "seeds, one run each",
    "--sizes": "sizes of the network",
    "--steps": "optimizer steps of the training",
    "--threads": "CPU threads of the network",
    "--warmup_steps": "steps over which the learning rate rises",
    "--weight_decay": "weight decay of AdamW",
    "--work": "folder for what is made on the way",
    "answers": "where the answers go, an .npz",
    "h5ad": "an .h5ad of raw counts",
    "method": "which method answers",
    "task": "the .npz that the benchmark wrote",
}
"""What a flag of this name means in every benchmark that does not say otherwise."""


class Flags(argparse.ArgumentParser):
    """A parser whose description is the docstring of its file, shown as it is written."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        """Add a flag with its meaning and its default."""
        if names[-1] != "--help" and options.get("help") != argparse.SUPPRESS:
            shown = options.get("default")
            shown = " ".join(map(str, shown)) if isinstance(shown, (list, tuple)) else shown
            required = options.get("required") or not names[0].startswith("-")
            said = "" if required or options.get("action") in ("store_true", "version") else f" (default: {'none' if shown in (None, '') else shown})"
            options["help"] = (options.get("help") or MEANINGS[names[-1]]) + said.replace("%", "%%")
        return super().add_argument(*names, **options)
