"""One writer at a time for a path, across processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sedd.errors import UserError


@contextmanager
def writing(output: str, wait: bool) -> Iterator[None]:
    """Hold the right to write `output`, by a lock on `OUTPUT.lock` that the system drops if we die.

    Parameters
    ----------
    wait : wait for another writer to finish, or raise `UserError` when there is one
    """
    path = f"{output}.lock"
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror}).") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise UserError(f"{output}: another process is writing it. Wait for it, or choose another output.") from error
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(fd)):
            break
        os.close(fd)  # the holder before us removed the file: lock the one that is there now
    try:
        yield
    finally:
        os.unlink(path)
        os.close(fd)
