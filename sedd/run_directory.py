"""The directory of a run: who may write into it, its settings, its curves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sedd.checkpoint import numbered_checkpoints
from sedd.errors import UserError

_FILES = ("best.pt", "final.pt", "args.json", "history.json", "metrics.jsonl")


class RunDirectory:
    """Files of a training run under `path`. Nothing is made before `create`.

    Parameters
    ----------
    path
        The experiment directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def files(self) -> list[Path]:
        """The files of a run that are there."""
        named = [self.path / name for name in _FILES if (self.path / name).exists()]
        return named + numbered_checkpoints(self.path)

    def check_free(self) -> None:
        """Refuse a directory that holds a run.

        Raises
        ------
        UserError
            If it does, or if `path` is not a directory.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; expected a directory for --checkpoint_dir.")
        if self.files():
            raise UserError(
                f"{self.path}: holds a run already ({', '.join(p.name for p in self.files()[:4])}). Pass --resume auto to "
                "continue it, --overwrite to start anew, or another --checkpoint_dir."
            )

    def create(self, settings: dict[str, Any], *, fresh: bool) -> None:
        """Make the directory and write args.json; with `fresh`, delete the files of an earlier run (and only those)."""
        self.path.mkdir(parents=True, exist_ok=True)
        if fresh:
            for path in self.files():
                path.unlink()
        write_json(self.path / "args.json", settings)

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Replace history.json, one entry an epoch."""
        write_json(self.path / "history.json", history)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines of metrics.jsonl past `step`, which a continued run will write again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # the last line of a run that was killed can be cut off
                continue
        _write_whole(path, "".join(kept))


def write_json(path: Path, value: Any) -> None:
    """Write JSON under its name only when complete. Not-a-number is an error: it is not JSON."""
    _write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
