"""What can be said of inputs before they are converted, which may take hours."""

from __future__ import annotations

from collections.abc import Iterable

from sedd.config import TrainConfig
from sedd.errors import UserError, counted
from sedd.io.convert import is_store
from sedd.io.input.opening import one_of, opened_as
from sedd.io.plan import BLOCK, Split
from sedd.io.remote import is_remote


def check_inputs(config: TrainConfig) -> None:
    """Refuse inputs that are too few cells, or one without a label that is asked for, and names that no checkpoint can keep.

    Raises
    ------
    UserError
        If they are, or one cannot be read.
    """
    _check_text(config)
    data = config.data
    if is_store(data.paths[0]) or any(map(is_remote, data.paths)):  # over a network a look costs more than it saves
        return
    n_obs, columns = 0, list[str]()
    for path in data.paths:
        with one_of(data.paths), opened_as(path, data.of_inputs()) as file:
            n_obs += file.n_obs
            if config.model.condition:
                columns += [name.removeprefix("obs/") for name in file.elements() if name.startswith("obs/") and name not in data.drop]
    if n_obs:  # conversion says what is wrong with none
        split_of_cells(config, n_obs)
    for column in config.model.condition if len(data.paths) == 1 else ():  # a join adds columns of its own
        check_column(column, columns)


def _check_text(config: TrainConfig) -> None:
    """Refuse names of files with bytes that are no UTF-8: a checkpoint, which holds all settings, could not be written."""
    for name, value in config.to_flat().items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not text.isprintable() and text.encode("utf-8", "replace").decode() != text:
                shown = text.encode("utf-8", "backslashreplace").decode()
                raise UserError(f"--{name} {shown}: has bytes that are not UTF-8, as names in a checkpoint are; rename it, or make a link to it with another name.")


def check_column(column: str, columns: Iterable[str]) -> None:
    """Check that a condition is a column of obs.

    Raises
    ------
    UserError
        If it is not; the message lists those there are.
    """
    there = list(columns)
    if column not in there:
        raise UserError(f"--condition {column}: no such obs column; there are: {', '.join(map(str, there)) or 'none'}.")


def split_of_cells(config: TrainConfig, n_obs: int, *, shuffled: bool = False) -> tuple[Split, Split]:
    """Return training and validation cells; a limit is shared between them in the same proportion.

    Parameters
    ----------
    n_obs
        How many cells there are.
    shuffled
        Whether they lie in random order.

    Raises
    ------
    UserError
        If they are too few for one of each.
    """
    fraction, seed, limit = config.data.val_fraction, config.run.seed, config.data.limit_cells
    n_val = None if limit is None else max(1, round(limit * fraction))
    n_train = None if limit is None or n_val is None else max(1, limit - n_val)
    capped = round(fraction * n_obs) > config.data.val_cells
    # Where fewer than their share are taken of a store whose neighbours are no kin, they may as well lie together.
    block = min(BLOCK, config.data.val_cells) if capped and shuffled else 1
    most = config.data.val_cells if capped else None
    train = Split(n_obs, fraction, seed, "train", n_train, most, block)
    val = Split(n_obs, fraction, seed, "val", n_val, most, block)
    for part in (train, val):
        if part.n_cells == 0:
            raise UserError(
                f"{config.data.named}: {counted(n_obs, 'cell')} with --val_fraction {fraction} leave no cell to "
                f"{'train on' if part is train else 'validate with'}; expected at least one of each."
            )
    return train, val
