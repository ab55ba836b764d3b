"""Byte ranges of files on an object store, asked for together: what a request costs there is its way, not its bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from zarr.storage import FsspecStore


class RemoteFiles:
    """Files in a folder of a Zarr store that fsspec opens.

    Parameters
    ----------
    store : FsspecStore
    folder : str
        Inside the store.
    """

    def __init__(self, store: FsspecStore, folder: str) -> None:
        self._opened, self._folder = store.fs, "/".join(part.rstrip("/") for part in (store.path, folder))
        self._files: tuple[int, Any] | None = None

    @property
    def files(self) -> Any:
        """The file system, whose calls wait for their results; another one after a fork, as its connections are its process's own."""
        if self._files is None or self._files[0] != os.getpid():
            opened = getattr(self._opened, "sync_fs", None)  # zarr has wrapped one that knows no other calls
            if opened is None:
                opened = type(self._opened)(*self._opened.storage_args, **{**self._opened.storage_options, "asynchronous": False})
            self._files = os.getpid(), opened
        return self._files[1]

    def path(self, name: int) -> str:
        """Return where a file is, for messages too."""
        return f"{self._folder}/{name}"

    def sizes(self, names: Sequence[int]) -> list[int]:
        """Return the bytes of files."""
        return [int(size) for size in self.files.sizes([self.path(name) for name in names])]

    def read(self, names: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> list[bytes]:
        """Return bytes `start` to `stop` of each file."""
        found: list[bytes] = self.files.cat_ranges([self.path(name) for name in names], list(starts), list(stops), on_error="raise")
        return found
