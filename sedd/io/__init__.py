"""From `.h5ad` files to token batches: convert, store, order, load."""

from __future__ import annotations

import importlib
from typing import Any

# The function, under the name of its module: `sedd.io.convert(...)`.
from sedd.io.convert import convert

__all__ = ["CellLoader", "CellStore", "convert", "scvi_datamodule"]

_HOME = {"CellLoader": "sedd.io.loader", "CellStore": "sedd.io.store", "scvi_datamodule": "sedd.io.scvi"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sedd.io' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
