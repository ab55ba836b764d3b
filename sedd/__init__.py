"""Score-entropy discrete diffusion for single-cell RNA-seq: impute, denoise and generate cells.

The names below are imported when they are first used, so that `import sedd` and `sedd --help` answer at once.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AbsorbingGraph": "sedd.graph",
    "AnalyticSampler": "sedd.sampling",
    "Binning": "sedd.binning",
    "CellLoader": "sedd.io.loader",
    "CellStore": "sedd.io.store",
    "EulerSampler": "sedd.sampling",
    "GeometricNoise": "sedd.noise",
    "LogLinearNoise": "sedd.noise",
    "Pretrained": "sedd.inference.pretrained",
    "SEDDTrainer": "sedd.trainer",
    "SEDDTransformer": "sedd.model",
    "SEDDTransformerLarge": "sedd.model",
    "SEDDTransformerMedium": "sedd.model",
    "SEDDTransformerSmall": "sedd.model",
    "TrainConfig": "sedd.config",
    "SeddWarning": "sedd.errors",
    "UniformGraph": "sedd.graph",
    "UserError": "sedd.errors",
    "annotate": "sedd.inference.annotation",
    "score": "sedd.inference.scoring",
    "convert": "sedd.io.convert",
    "denoise": "sedd.tasks",
    "embed": "sedd.tasks",
    "evaluate": "sedd.evaluation",
    "generate": "sedd.tasks",
    "impute": "sedd.tasks",
    "train": "sedd.learning",
}

_ROOMS = ("io", "metrics", "pl")
"""Packages of functions that `import sedd` is enough for, as in `sedd.pl.report`."""

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"sedd.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'sedd' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
