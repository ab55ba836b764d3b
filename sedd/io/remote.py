"""Stores on object storage: made in a local folder, then uploaded with the file that makes them a store last."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from typing import Any

from sedd.errors import ExistsError, UserError


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def staging(target: str) -> str:
    """Local path where the store for `target` is made; the same in every run, so that `--resume` finds it."""
    name = hashlib.blake2b(target.encode(), digest_size=8).hexdigest()
    return os.path.join(tempfile.gettempdir(), f"sedd-{name}.zarr")


def filesystem(target: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it."""
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(target)
    except Exception as error:  # a missing package, an unknown scheme, or whatever the service raises
        raise UserError(f"{target}: cannot be reached ({error}). Remote paths need `pip install 'sedd[s3]'`.") from error
    return fs, str(path).rstrip("/")


def check_free(target: str, overwrite: bool) -> None:
    """Refuse a target that exists, unless it may be replaced."""
    fs, path = filesystem(target)
    if fs.exists(f"{path}/zarr.json") and not overwrite:
        raise ExistsError(f"{target}: exists already. Pass --overwrite to replace it, or choose another name.")


def upload(local: str, target: str) -> None:
    """Move a finished local store to `target`; its root `zarr.json` is taken away first and put back last."""
    fs, path = filesystem(target)
    try:
        if fs.exists(f"{path}/zarr.json"):
            fs.rm_file(f"{path}/zarr.json")
            fs.rm(path, recursive=True)
        for folder, _, names in os.walk(local):
            inside = os.path.relpath(folder, local)
            for name in names:
                if inside == "." and name == "zarr.json":
                    continue
                fs.put_file(os.path.join(folder, name), f"{path}/{name}" if inside == "." else f"{path}/{inside}/{name}")
        fs.put_file(f"{local}/zarr.json", f"{path}/zarr.json")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error}). The finished store is {local}: copy it yourself.") from error
    shutil.rmtree(local, ignore_errors=True)


def file_sizes(path: str) -> list[int]:
    """Sizes of all files of a store, wherever it is."""
    if is_remote(path):
        fs, inside = filesystem(path)
        return [int(info["size"]) for info in fs.find(inside, detail=True).values()]
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    return [os.path.getsize(name) for name in files]
