"""Errors and warnings for users: one line for bad input, one line for a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_CALLED: dict[str, str] = {}
"""Paths of files that sedd made for itself, and what the user knows their content as."""


@contextmanager
def called(path: str, name: str) -> Iterator[None]:
    """Have messages say `name` where they would name a file that the user never saw."""
    _CALLED[path] = name
    try:
        yield
    finally:
        del _CALLED[path]


def _as_known(message: str) -> str:
    for path, name in list(_CALLED.items()):
        message = message.replace(path, name)
    return message


def counted(n: int, noun: str) -> str:
    """Return a number of things in words: `1 cell`, `2 cells`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


class UserError(ValueError):
    """Bad input. The message is one line: what was found, what was expected and the way out.

    The command line prints the message and exits with status 2; from Python it is an ordinary `ValueError`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_as_known(message))


class SeveralPartsError(UserError):
    """An input that holds several matrices of other cells or genes, of which one must be chosen."""

    def __init__(self, message: str, names: list[str]) -> None:
        super().__init__(message)
        self.names = names


class NotCountsError(UserError):
    """Values that are no counts, such as log-normalised ones."""


class NegativeValuesError(NotCountsError):
    """Values below 0, such as z-scores, which no binning takes either."""


class SeddWarning(UserWarning):
    """Something that a user should know and that does not stop the work."""


def warn_user(message: str) -> None:
    """Emit `message` once as a `SeddWarning` that points at the caller's caller."""
    warnings.warn(_as_known(message), SeddWarning, stacklevel=3)
