"""Errors and warnings for users: one line for bad input, one line for a warning.

::

    ValueError
      UserError                  bad input, of whatever kind
        MissingFileError         there is no such file, store, checkpoint or model
        WrongFileError           a file of another kind, or of another version of sedd, than what is read
        DamagedFileError         a file that is not as it was written, or that asks for more than it holds
        ExistsError              an output that is there already; `overwrite` replaces it where it is sedd's own
        SettingError             a setting that cannot be, or that disagrees with another or with the run to resume
        SeveralPartsError        an input that holds several matrices, of which one must be chosen
        NoSuchPartError          an input that has no such modality, layer or .raw
        NotCountsError           values that are no counts, such as log-normalised ones
          NegativeValuesError    values below 0, which no binning takes
    UserWarning
      SeddWarning                something to know that does not stop the work

A message that quotes a URL leaves out what is secret in it.
"""

from __future__ import annotations

import os
import re
import stat
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


_USER = re.compile(r"(?<=://)[^/@\s'\"]+@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\",;)]*?(?=:?(?:[\s'\",;)]|$))")


def without_secrets(text: str) -> str:
    """Return text in which URLs have no name, password, key or signature: only scheme, host and path of each are left."""
    return _QUERY.sub(r"\1", _USER.sub("", text)) if "://" in text else text


class UserError(ValueError):
    """Bad input. The message is one line: what was found, what was expected and the way out.

    The command line prints the message and exits with status 2; from Python it is an ordinary `ValueError`.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(_as_known(message)))


class MissingFileError(UserError):
    """A file, folder, store, checkpoint or model that is not there."""


class WrongFileError(UserError):
    """A file of another kind, or of another version of sedd, than what is read."""


class DamagedFileError(UserError):
    """A file that is not as it was written, or that asks for more than it holds."""


class ExistsError(UserError):
    """An output that is there already."""


class SettingError(UserError):
    """A setting that cannot be, or that disagrees with another or with the run to resume."""


class SeveralPartsError(UserError):
    """An input that holds several matrices of other cells or genes, of which one must be chosen."""

    def __init__(self, message: str, names: list[str]) -> None:
        super().__init__(message)
        self.names = names


class NoSuchPartError(UserError):
    """An input that lacks the modality, layer or `.raw` that is asked for."""


class NotCountsError(UserError):
    """Values that are no counts, such as log-normalised ones."""


class NegativeValuesError(NotCountsError):
    """Values below 0, such as z-scores, which no binning takes either."""


def not_permitted(path: str | os.PathLike[str]) -> UserError:
    """Return the error for a path that this user may not read."""
    return UserError(f"{os.fspath(path)}: may not be read (permission denied). Ask its owner for the right to.")


def check_permitted(path: str | os.PathLike[str]) -> None:
    """Refuse a path that is there, or may be there, and that this user may not read: `os.path.exists` says that it is not there.

    What is not on this machine, such as what a URL names, is let through.
    """
    try:
        needed = os.R_OK | os.X_OK if stat.S_ISDIR(os.stat(path).st_mode) else os.R_OK
    except PermissionError as error:
        raise not_permitted(path) from error
    except (OSError, ValueError):  # whoever opens it says what is wrong with it
        return
    if not os.access(path, needed):
        raise not_permitted(path)


class SeddWarning(UserWarning):
    """Something that a user should know and that does not stop the work."""


def warn_user(message: str) -> None:
    """Emit `message` once as a `SeddWarning` that points at the caller's caller."""
    warnings.warn(without_secrets(_as_known(message)), SeddWarning, stacklevel=3)
