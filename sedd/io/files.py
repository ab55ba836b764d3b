"""Files that appear whole or not at all, their identity, and one writer at a time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from typing import Any, BinaryIO

import numpy as np

from sedd.errors import UserError
from sedd.io.remote import filesystem

SAMPLES, SAMPLE_BYTES = 16, 1 << 16
"""How much of a file its fingerprint looks at."""


@contextmanager
def new_file(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[BinaryIO]:
    """Write a file that gets its name when it is complete; nothing is left behind otherwise.

    Until then it is beside its place, as `.NAME.HOST.PROCESS.RANDOM.part`: two workers may do the same task, each in its own file.

    Parameters
    ----------
    path : a file that is there is replaced
    sync : return only when the file and its name are on the disk
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    shown = os.fsdecode(os.fsencode(name)[:160])  # a name has 255 bytes at most
    writer = f"{socket.gethostname()[:32]}.{os.getpid()}.{os.urandom(4).hex()}"
    part = os.path.join(folder, f".{shown}.{writer}.part")
    try:
        with open(part, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
        if sync:
            _sync(folder or ".")
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError) and error.filename == part:
            error.filename = path
        raise


def save_arrays(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Write an `.npz` whole or not at all."""
    with new_file(path) as file:
        np.savez(file, **arrays)


def move_into_place(made: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Move a complete file or folder to its name, over what is there."""
    old = f"{os.fspath(made)}.replaced"
    if os.path.isdir(path):  # a folder cannot be replaced in one step as a file can
        os.rename(path, old)
    try:
        os.replace(made, path)
    except OSError:
        if os.path.isdir(old):
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def begin_to_sync(file: BinaryIO) -> None:
    """Have the system begin to write a file to the disk, without waiting, so that `sync_tree` need not wait long."""
    start = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it; elsewhere all is written in the end
    if start is not None:
        start(file.fileno(), ctypes.c_int64(0), ctypes.c_int64(0), 2)


def sync_tree(root: str) -> None:
    """Wait until all files and folders under `root` are on the disk."""
    for folder, _, names in os.walk(root):
        for name in names:
            with open(f"{folder}/{name}", "rb") as file:
                begin_to_sync(file)
    for folder, _, names in os.walk(root):
        for path in (*(f"{folder}/{name}" for name in names), folder):
            _sync(path)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fingerprint(path: str) -> str:
    """Identity of a file: its size, when it changed, and a hash of samples of its bytes.

    Parameters
    ----------
    path : local, or a URL that fsspec opens (then its size and entity tag, or time of change)
    """
    if "://" in path:
        fs, name = filesystem(path)
        info = fs.info(name)
        text = f"{info['size']} {info.get('ETag') or info.get('LastModified') or info.get('mtime')}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    stat = os.stat(path)
    digest = hashlib.blake2b(f"{stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=16)
    with open(path, "rb") as file:
        for place in np.linspace(0, max(0, stat.st_size - SAMPLE_BYTES), SAMPLES).astype(np.int64):
            file.seek(int(place))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def obs_digest(names: Iterable[Any]) -> str:
    """Identity of cells: a hash of their names in their order, which any container of them keeps."""
    return hashlib.sha256("\0".join(map(str, names)).encode()).hexdigest()[:32]


def parse_bytes(size: str | int) -> int:
    """Bytes of a size as people write it: "1GiB", "500 MB", "1.5g", "1e9" or a number.

    Raises
    ------
    UserError
        If it is no size, or less than a byte.
    """
    match = re.fullmatch(r"(.+?)(?:([kmgt])(i?))?b?", "".join(str(size).lower().split()))
    try:
        number = Decimal(match[1]) if match else Decimal("nan")
    except InvalidOperation:
        number = Decimal("nan")
    if not match or not number.is_finite() or number.adjusted() > 24:
        raise UserError(f"memory_budget is {size!r}, which is not a size; expected a size such as 2GiB or 500MB.")
    n_bytes = int(number * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))
    if n_bytes < 1:
        raise UserError(f"memory_budget is {size!r}; expected more than nothing, such as 2GiB or 500MB.")
    return n_bytes


@contextmanager
def only_writer(folder: str, *, output: str, wait: bool) -> Iterator[None]:
    """Hold the right to write `output`, by a lock in `folder` that the system drops if this process dies.

    Parameters
    ----------
    folder : made when missing, and removed at the end if nothing else is in it
    wait : wait until another writer is done; otherwise another writer is an error

    Raises
    ------
    UserError
        If another process holds the lock, or the folder cannot be made.
    """
    path = f"{folder}/lock"
    while True:
        try:
            os.makedirs(folder, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the holder before us removed the folder just now
            continue
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error.strerror}).") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise UserError(f"{output}: cannot be locked ({error.strerror}).") from error
            raise UserError(f"{output}: another process is writing it. Wait for it, or choose another name.") from error
        try:
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                break
        except FileNotFoundError:  # removed by the holder before us: lock the one that is there now
            pass
        os.close(fd)
    try:
        yield
    finally:
        try:
            os.unlink(path)
            os.rmdir(folder)
        except OSError:  # kept for --resume, or gone already
            pass
        os.close(fd)
