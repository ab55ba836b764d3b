"""Experiments side by side: what each was told, how far it is and what it came to."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sedd.errors import UserError

_TOLD = ("model", "attention", "genes", "batch_size", "learning_rate", "seed")
_HEADER = ["run", "state", "epochs", "step", "best nats/cell", "at", "cells/s", "model", "attention", "genes", "batch", "lr", "seed"]
_QUIET_S = 120  # a run at work writes a line about every second, but none while it validates


def runs_table(directory: str | Path) -> str:
    """One line for each experiment under `directory`, at any depth.

    Returns
    -------
    text
        A table. The state of a run is `done`, `at work` (it wrote in the last two minutes) or `stopped`; the bound is the best
        one over its epochs, and `at` is the epoch that had it.

    Raises
    ------
    UserError
        If there is no such directory, or no experiment in it.
    """
    root = Path(directory)
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; expected one that holds experiment directories.")
    rows = [_row(path.parent, root) for path in sorted(root.rglob("args.json"))]
    if not rows:
        raise UserError(f"{root}: holds no experiment (no args.json in any directory); train a model first.")
    widths = [max(len(row[i]) for row in [_HEADER, *rows]) for i in range(len(_HEADER))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in [_HEADER, *rows])
    return "\n".join(line.rstrip() for line in lines)


def _row(run: Path, root: Path) -> list[str]:
    told: dict[str, Any] = _read(run / "args.json", {})
    history: list[dict[str, Any]] = _read(run / "history.json", [])
    best = min(history, key=lambda entry: entry["val_nelbo"], default=None)
    last = _last_line(run / "metrics.jsonl")
    speed = last.get("cells_per_s", history[-1]["cells_per_s"] if history else None)
    return [
        "." if run == root else str(run.relative_to(root)),
        _state(run),
        f"{len(history)}/{told.get('num_epochs', '?')}",
        str(last.get("step", "-")),
        *(["-", "-"] if best is None else [f"{best['val_nelbo']:.1f}", str(best["epoch"])]),
        "-" if speed is None else f"{speed:.0f}",
        *[str(told.get(name, "?")) for name in _TOLD],
    ]


def _state(run: Path) -> str:
    written = {name: (run / name).stat().st_mtime for name in ("final.pt", "metrics.jsonl") if (run / name).exists()}
    curves = written.get("metrics.jsonl", (run / "args.json").stat().st_mtime)
    if written.get("final.pt", 0.0) >= curves:  # it is the last thing that a run writes
        return "done"
    return "at work" if time.time() - curves < _QUIET_S else "stopped"


def _read(path: Path, default: Any) -> Any:
    """The JSON of a file, or `default` where it is not there or damaged: one bad run does not hide the others."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def _last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a file of JSON lines, which a run may be writing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    for line in reversed(lines[-2:]):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return {}
