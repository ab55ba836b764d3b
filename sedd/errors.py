"""Errors and warnings for users: one line for bad input, one line for a warning."""

from __future__ import annotations

import warnings


class UserError(ValueError):
    """Bad input. The message is one line: what was found, what was expected and the way out.

    The command line prints the message and exits with status 2; from Python it is an ordinary `ValueError`.
    """


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
    warnings.warn(message, SeddWarning, stacklevel=3)
