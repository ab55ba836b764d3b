"""One process at a time, on every file system: the system's own lock, or a file that its owner keeps writing to.

`flock` is dropped by the system when its process dies. Some cluster file systems have none (they answer ENOLCK, ENOTSUP or ENOSYS);
there the lock is the file `lock.held`, which only one process can create. It names its owner, who writes a number into it every few
seconds. Who finds such a file watches it: if it changes, its owner is at work; if it stays as it is for half a minute, its owner is
dead, and the file is taken over. So nobody compares the clocks of two hosts, or asks whether a process of another host is alive. A process
that was stopped for longer than that, and then continued, is not noticed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import socket
import threading
import time
from contextlib import suppress

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What systems answer where `flock` does not work."""

HEARTBEAT = 5.0
"""Seconds after which the owner of a lock file writes to it again."""

SILENCE = 30.0
"""Seconds without a change after which the owner of a lock file is dead."""


class NoFlockError(OSError):
    """The file system has no locks of its own."""


def flock(fd: int, *, wait: bool) -> bool:
    """Lock an open file; return whether it is ours.

    Raises
    ------
    NoFlockError
        Where that does not work.
    OSError
        If the system refuses for another reason.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            return False
        if error.errno in UNSUPPORTED:
            raise NoFlockError(*error.args) from error
        raise
    return True


class HeldFile:
    """A lock that is a file.

    Parameters
    ----------
    path : of the file
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._token = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}\n".encode()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sedd-lock", daemon=True)

    def take(self, *, wait: bool) -> str | None:
        """Take the lock, from a dead owner too.

        Parameters
        ----------
        wait : wait until a living owner is done

        Returns
        -------
        owner : of the lock if that is another process, as "host process"; None if it is ours

        Raises
        ------
        FileNotFoundError
            If the folder is not there.
        """
        seen, since = self._read(), time.monotonic()
        while True:
            if seen is None and self._create(self.path):
                break
            now = self._read()
            if seen is not None and now is not None and now != seen and not wait:
                return b" ".join(now.split()[:2]).decode(errors="replace")
            if now != seen:
                seen, since = now, time.monotonic()
            elif seen is not None and time.monotonic() - since > SILENCE and self._replace(seen):
                break
            elif seen is not None:
                time.sleep(HEARTBEAT / 5)
        self._thread.start()
        return None

    def release(self) -> None:
        """Let go of the lock."""
        self._end.set()
        self._thread.join()
        if (self._read() or b"").startswith(self._token):
            with suppress(OSError):
                os.unlink(self.path)

    def _create(self, path: str) -> bool:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(fd, "wb") as file:
            file.write(self._token)
        return True

    def _replace(self, dead: bytes) -> bool:
        """Take over from a dead owner: of those who would, the one that creates a file named after what it left."""
        claim = f"{self.path}.{hashlib.blake2b(dead, digest_size=8).hexdigest()}"
        if not self._create(claim):
            return False
        own = f"{claim}.{secrets.token_hex(4)}"
        try:
            if self._read() != dead:  # another was quicker
                return False
            self._create(own)
            os.replace(own, self.path)
            return True
        finally:
            os.unlink(claim)

    def _read(self) -> bytes | None:
        """Return what the file says now; opened anew, so that a file system of a network looks again."""
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        number = 0
        while not self._end.wait(HEARTBEAT):
            number += 1
            with suppress(OSError), open(self.path, "r+b") as file:
                if file.readline() != self._token:  # taken over, as if we had died
                    return
                file.seek(len(self._token))
                file.write(b"%012d\n" % number)
