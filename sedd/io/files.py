"""Files that appear whole or not at all, and their identity."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np

from sedd.io.remote import filesystem

SAMPLES, SAMPLE_BYTES = 16, 1 << 16
"""How much of a file its fingerprint looks at."""


@contextmanager
def new_file(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[BinaryIO]:
    """Write a file that gets its name when it is complete; nothing is left behind otherwise.

    Until then it is beside its place, as `.NAME.HOST-PROCESS-RANDOM.part`.

    Parameters
    ----------
    path : of the file; one that is there is replaced in one rename
    sync : wait until the file and its name are on the disk
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    shown = os.fsdecode(os.fsencode(name)[:160])  # a name has 255 bytes at most
    # Workers on several hosts may write the same file: each has one of its own until it is complete.
    writer = f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"
    partial = os.path.join(folder, f".{shown}.{writer}.part")
    try:
        with open(partial, "xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):  # it is the first error that counts
            os.unlink(partial)
        if isinstance(error, OSError) and error.filename == partial:
            error.filename = path  # the name that the user knows
        raise
    if sync:
        _sync(folder or ".")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON whole or not at all. Not-a-number is an error: it is not JSON."""
    with new_file(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def save_arrays(path: str, **arrays: Any) -> None:
    """Write an `.npz` whole or not at all."""
    with new_file(path) as file:
        np.savez(file, **arrays)


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
    paths = [path for folder, _, names in os.walk(root) for path in (*(f"{folder}/{name}" for name in names), folder)]
    with ThreadPoolExecutor(16) as pool:  # a file system writes many at once about as fast as one
        list(pool.map(_sync, paths))


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


def tree_fingerprint(path: str) -> str:
    """Identity of a folder, such as a Zarr store: the names, sizes and times of change of all its files.

    Parameters
    ----------
    path : local, or a URL that fsspec opens
    """
    digest = hashlib.blake2b(digest_size=16)
    if "://" in path:
        fs, inside = filesystem(path)
        for name, info in sorted(fs.find(inside, detail=True).items()):
            changed = info.get("ETag") or info.get("LastModified") or info.get("mtime")
            digest.update(f"{name.removeprefix(inside)} {info['size']} {changed}\n".encode())
        return digest.hexdigest()
    names = [os.path.join(folder, name) for folder, _, files in os.walk(path) for name in files]
    for name in sorted(names):
        stat = os.stat(name)
        digest.update(f"{os.path.relpath(name, path)} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def obs_digest(names: Iterable[Any]) -> str:
    """Return an identity of cells by their names in their order, which any container of them keeps."""
    digest, names = hashlib.sha256(), map(str, names)
    digest.update(next(names, "").encode())
    while some := list(itertools.islice(names, 1 << 16)):
        digest.update(("\0" + "\0".join(some)).encode())
    return digest.hexdigest()[:32]
