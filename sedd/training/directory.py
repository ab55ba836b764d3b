"""The directory of a run: who may write into it, its settings and curves, and a table of many."""

from __future__ import annotations

import json
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sedd.checkpoint import numbered_checkpoints
from sedd.config import bound_is_given
from sedd.errors import ExistsError, MissingFileError, UserError, check_permitted
from sedd.io.files import new_file, write_json
from sedd.io.outputs import only_writer_in

_FILES = ("best.pt", "final.pt", "args.json", "history.json", "metrics.jsonl", "wandb_id")
_BEFORE_THE_FIRST = {"args.json", "metrics.jsonl", "wandb_id"}  # what a run writes before its first checkpoint
_HEADER = ["run", "state", "epochs", "step", "best nats/cell", "given", "at", "cells/s", "model", "attention", "genes", "batch", "lr", "seed"]
_SETTINGS = ("model", "attention", "n_vars", "batch_size", "learning_rate", "seed")  # that a table of runs shows
_QUIET_S = 120  # a run at work writes a line about every second, but none while it validates


class RunDirectory:
    """Files of a run, beside its checkpoints. Nothing is made before `create`.

    Parameters
    ----------
    path
        The directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def files(self) -> list[Path]:
        """Return the files of a run that are there."""
        named = [self.path / name for name in _FILES if (self.path / name).exists()]
        return named + numbered_checkpoints(self.path)

    def check_usable(self) -> None:
        """Refuse what cannot be the directory of a run.

        Raises
        ------
        UserError
            If it is a file, a store, or cannot be read or written.
        """
        check_permitted(self.path)
        if (self.path / "zarr.json").exists():
            raise UserError(f"{self.path}: is a Zarr store; expected a directory of its own for --checkpoint_dir.")
        near = next(path for path in (self.path, *self.path.absolute().parents) if os.path.lexists(path))
        if not near.is_dir():
            raise UserError(f"{near}: is not a directory; expected one for --checkpoint_dir.")
        if not os.access(near, os.W_OK):
            raise UserError(f"{near}: cannot be written; expected a directory that can for --checkpoint_dir.")

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a directory in which a new run would take the place of files.

        Parameters
        ----------
        overwrite
            A run that is there may be deleted; files that only have the names of one may not.

        Raises
        ------
        UserError
            If there are such files.
        """
        found = ", ".join(p.name for p in self.files()[:4])
        if not found:
            return
        if not self._is_of_a_run():
            raise UserError(
                f"{self.path}: holds {found}, but no args.json of a run, so these are not known to be a run's and are not "
                "replaced. Move them, or choose another --checkpoint_dir."
            )
        if not overwrite:
            raise ExistsError(
                f"{self.path}: holds a run already ({found}). Pass --resume auto to "
                "continue it, --overwrite to start anew, or another --checkpoint_dir."
            )

    def ended_before_it_saved(self) -> bool:
        """Return whether there is a run that has no checkpoint and no whole epoch: nothing of it is lost if it starts anew."""
        names = {path.name for path in self.files()}
        return "args.json" in names <= _BEFORE_THE_FIRST and self._is_of_a_run()

    def _is_of_a_run(self) -> bool:
        settings = _read(self.path / "args.json", None)
        return isinstance(settings, dict) and {"data_path", "checkpoint_dir"} <= settings.keys()

    def only_writer(self) -> AbstractContextManager[None]:
        """Hold the right to write into the directory, which is made when missing.

        Raises
        ------
        UserError
            If another process trains in it.
        """
        return only_writer_in(self.path)

    def create(self, settings: dict[str, Any], *, fresh: bool) -> None:
        """Write args.json; with `fresh`, delete the files of an earlier run (and only those)."""
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

    def stored(self, name: str, value: str) -> str:
        """Return the text of a small file of the run, which has `value` from the first call on."""
        path = self.path / name
        if not path.exists():
            with new_file(path) as file:
                file.write(value.encode())
        return path.read_text()

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
        with new_file(path) as file:
            file.write("".join(kept).encode())


def runs_table(directory: str | Path) -> str:
    """One line for each run under `directory`, at any depth.

    Returns
    -------
    text
        A table. The state of a run is `done`, `at work` (it wrote in the last two minutes) or `stopped`; the bound is the best
        one over its epochs, `given` is what it was given of a cell (bounds that were given different things do not compare), and `at`
        is the epoch that had it.

    Raises
    ------
    UserError
        If there is no such directory, or no run in it.
    """
    root = Path(directory)
    check_permitted(root)
    if not root.is_dir():
        raise MissingFileError(f"{root}: no such directory; expected one that holds runs.")
    rows = [_row(path.parent, root) for path in sorted(root.rglob("args.json"))]
    if not rows:
        raise MissingFileError(f"{root}: holds no run (no args.json in any directory); train a model first.")
    widths = [max(len(row[i]) for row in [_HEADER, *rows]) for i in range(len(_HEADER))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in [_HEADER, *rows])
    return "\n".join(line.rstrip() for line in lines)


def _row(run: Path, root: Path) -> list[str]:
    settings: dict[str, Any] = _read(run / "args.json", {})
    history: list[dict[str, Any]] = _read(run / "history.json", [])
    best = min(history, key=lambda entry: entry["val_nelbo"], default=None)
    last = _last_line(run / "metrics.jsonl")
    # Known when an epoch is over: --min_steps may ask for more epochs than --num_epochs, and --genes may be a file.
    known = history[-1] if history else {}
    epochs = known.get("of_epochs", "?" if settings.get("min_steps") else settings.get("num_epochs", "?"))
    settings = {**settings, "n_vars": known.get("n_vars", settings.get("genes", "?"))}
    speed = last.get("cells_per_s", history[-1]["cells_per_s"] if history else None)
    return [
        "." if run == root else str(run.relative_to(root)),
        _state(run),
        f"{len(history)}/{epochs}",
        str(last.get("step", "-")),
        *(["-", bound_is_given(settings), "-"] if best is None else [f"{best['val_nelbo']:.1f}", bound_is_given(settings), str(best["epoch"])]),
        "-" if speed is None else f"{speed:.0f}",
        *[str(settings.get(name, "?")) for name in _SETTINGS],
    ]


def _state(run: Path) -> str:
    written = {name: (run / name).stat().st_mtime for name in ("final.pt", "metrics.jsonl") if (run / name).exists()}
    curves = written.get("metrics.jsonl", (run / "args.json").stat().st_mtime)
    if written.get("final.pt", 0.0) >= curves:  # it is the last thing that a run writes
        return "done"
    return "at work" if time.time() - curves < _QUIET_S else "stopped"


def _read(path: Path, default: Any) -> Any:
    """Return the JSON of a file, or `default` where it is not there or damaged: one bad run does not hide the others."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def _last_line(path: Path) -> dict[str, Any]:
    """Return the last whole line of a file of JSON lines, which a run may be writing."""
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
