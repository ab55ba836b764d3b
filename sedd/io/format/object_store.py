"""Byte ranges of files on an object store, many asked for at once: what a request costs there is its way, not its bytes.

Those on S3 are asked for by obstore where it is installed: it takes a tenth of the processor time of s3fs for a request (by hand) and holds no GIL in it.
All else goes through fsspec: other services, and what obstore cannot be told of how s3fs was told to reach S3.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from zarr.storage import FsspecStore

from sedd.errors import warn_user
from sedd.io.loading.threads import Threads

_IN_FLIGHT = 32  # requests of one call; as many calls are under way as a loader has threads to read
_SIGNED_FOR = timedelta(minutes=5)  # after which credentials are asked for again: s3fs renews those that end

T = TypeVar("T")


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
        self._files: tuple[int, Any, Any] | None = None

    @property
    def files(self) -> tuple[Any, Any]:
        """The file system of fsspec, whose calls wait for their results, and the bucket of obstore or None; others after a fork."""
        if self._files is None or self._files[0] != os.getpid():
            opened = getattr(self._opened, "sync_fs", None)  # zarr has wrapped one that knows no other calls
            if opened is None:
                opened = type(self._opened)(*self._opened.storage_args, **{**self._opened.storage_options, "asynchronous": False})
            self._files = os.getpid(), opened, _bucket(opened, self.path(0))
        return self._files[1:]

    def path(self, name: int) -> str:
        """Return where a file is, for messages too."""
        return f"{self._folder}/{name}"

    def tails(self, names: Sequence[int], size: int) -> list[tuple[int, Any]]:
        """Return the bytes that each file has, and the last `size` of them, or all where there are fewer."""
        paths = [self.path(name) for name in names]
        files, bucket = self.files
        if bucket is not None:
            return list(_at_once(lambda path: bucket.tail(path, size), paths))
        there = [int(found) for found in files.sizes(paths)]
        return list(zip(there, files.cat_ranges(paths, [max(0, found - size) for found in there], there, on_error="raise"), strict=True))

    def read(self, names: Sequence[int], starts: Sequence[int], stops: Sequence[int]) -> Iterator[Any]:
        """Yield bytes `start` to `stop` of each file, in their order, while later ones are under way."""
        paths = [self.path(name) for name in names]
        files, bucket = self.files
        if bucket is None:
            yield from files.cat_ranges(paths, list(starts), list(stops), on_error="raise")
        else:
            yield from _at_once(lambda place: bucket.read(*place), list(zip(paths, starts, stops, strict=True)))


def _at_once(ask: Callable[[Any], T], asked: Sequence[Any]) -> Iterator[T]:
    if not asked:
        return
    threads = Threads(min(_IN_FLIGHT, len(asked)), "sedd-fetch")
    tasks = deque(threads.submit(ask, one) for one in asked)
    try:
        while tasks:
            yield tasks.popleft().result()
    finally:
        threads.close()  # what was not sent yet is not


class _Bucket:
    """A bucket that obstore reads, reached as the file system of s3fs reaches it."""

    started: int | None = None
    """The process that obstore's threads are in; they do not live on in one that is forked from it."""

    def __init__(self, files: Any, name: str) -> None:
        from fsspec.asyn import sync
        from obstore.store import S3Store

        async def credentials() -> dict[str, Any]:
            if files.key:
                return {"access_key_id": files.key, "secret_access_key": files.secret, "token": files.token, "expires_at": None}
            found = await (await files.session.get_credentials()).get_frozen_credentials()
            until = None if found.token is None else datetime.now(UTC) + _SIGNED_FOR
            return {"access_key_id": found.access_key, "secret_access_key": found.secret_key, "token": found.token, "expires_at": until}

        reached = files.connect().meta
        options: dict[str, Any] = {"region": reached.region_name or "us-east-1"}
        if "amazonaws.com" in reached.endpoint_url:
            told = files.call_s3("head_bucket", Bucket=name)["ResponseMetadata"]["HTTPHeaders"]
            options["region"] = told.get("x-amz-bucket-region", options["region"])
        else:
            options["endpoint"] = reached.endpoint_url
        if files.anon:
            options["skip_signature"] = True
        else:
            options["credential_provider"] = lambda: sync(files.loop, credentials)
        client = {"allow_http": reached.endpoint_url.startswith("http:"), "timeout": timedelta(minutes=2)}
        self._start = len(name) + 1
        self._store = S3Store(name, client_options=client, virtual_hosted_style_request=False, **options)

    def tail(self, path: str, size: int) -> tuple[int, Any]:
        found = _tell(lambda: self._store.get(path[self._start :], options={"range": {"suffix": size}}))
        return int(found.meta["size"]), _tell(found.bytes)

    def read(self, path: str, start: int, stop: int) -> Any:
        return _tell(lambda: self._store.get_range(path[self._start :], start=start, end=stop))


def _tell(ask: Callable[[], T]) -> T:
    from obstore.exceptions import BaseError

    try:
        return ask()
    except (BaseError, OSError) as error:
        first = str(error).split("\n\nDebug source", 1)[0].strip()  # ten lines of Rust's structures follow
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else OSError)(" ".join(first.split())[:300]) from None


def _bucket(files: Any, path: str) -> _Bucket | None:
    """Return what reads the file at `path` by obstore; None where fsspec is to do it."""
    if "s3" not in files.protocol or files.version_aware or files.requester_pays or files.s3_additional_kwargs:
        return None
    if _Bucket.started not in (None, os.getpid()):
        return None
    try:
        import obstore  # noqa: F401
    except ImportError:
        return None
    try:
        bucket = _Bucket(files, path.split("/", 1)[0])
        _Bucket.started = os.getpid()
        bucket.tail(path, 1)
    except FileNotFoundError:  # a missing shard is told of where it is read
        return bucket
    except Exception as error:  # each of the two packages has errors of its own, of settings, rights and certificates
        warn_user(f"s3://{path}: is read by s3fs, slowly, as obstore cannot reach it ({' '.join(str(error).split())[:200]})")
        return None
    return bucket
