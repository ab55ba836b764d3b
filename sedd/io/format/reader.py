"""Chosen inner chunks of a one-dimensional Zarr array, decoded into memory that the caller owns.

On a local file system the shards are read directly: index, `pread`, checksum, codec. Those on an object store too, with the ranges of all
chunks of a call asked for at once, neighbours in one. Everything else (a codec that is not known here) goes through zarr-python, to the same bytes.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.storage import FsspecStore, LocalStore

from sedd.errors import DamagedFileError
from sedd.io.format.codec import ABSENT, BAD_CHECKSUM, BLOSC, RAW, ZSTD, available, decode_chunks
from sedd.io.format.object_store import RemoteFiles

_SCRATCH = 4 << 20  # encoded bytes held before they are decoded: small enough to be still in the cache
_INDEXES_KEPT = 512  # shard indexes in memory, 64 KB each


class ChunkReader:
    """Reads chunks of `chunk` values of a one-dimensional array.

    Parameters
    ----------
    array : zarr.Array
        One-dimensional.
    name : str
        What errors call the array.
    direct : bool
        Read shards directly where that is possible; False goes through zarr-python.

    Attributes
    ----------
    chunk : int
        Values of a chunk.
    direct : bool
        Whether shards are read directly.
    bytes_read : int
        Encoded bytes read so far, shard indexes included; only counted when reading directly.
    """

    def __init__(self, array: zarr.Array, *, name: str, direct: bool = True) -> None:
        self.array = array
        self.name = name
        self.dtype = np.dtype(array.dtype)
        self.size = int(array.shape[0])
        self.chunk = int(array.chunks[0])
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._indexes: dict[int, np.ndarray] = {}
        layout = _direct_layout(array) if direct and available() else None
        self.direct = layout is not None
        if layout is not None:
            self._folder, self._slots, self._codec, self._checked = layout

    @property
    def n_chunks(self) -> int:
        """Chunks in the array."""
        return -(-self.size // self.chunk)

    def read(self, chunks: np.ndarray, out: np.ndarray, targets: np.ndarray) -> None:
        """Decode `chunks` into `out`.

        Parameters
        ----------
        chunks : (k,) int64, increasing
        out : (m,) of the array's dtype
        targets : (k,) int64, the element of `out` at which each chunk begins

        Raises
        ------
        UserError
            If a shard is missing, truncated or damaged; names the file and the chunk.
        """
        if chunks.size == 0:
            return
        if not self.direct:
            self._read_general(chunks, out, targets)
            return
        shards = chunks // self._slots
        if isinstance(self._folder, RemoteFiles):
            self._read_remote(self._folder, shards, chunks % self._slots, out, targets)
            return
        edges = np.flatnonzero(np.diff(shards)) + 1
        for low, high in zip(np.r_[0, edges], np.r_[edges, chunks.size], strict=True):
            self._read_shard(int(shards[low]), chunks[low:high] % self._slots, out, targets[low:high])

    def read_range(self, lo: int, hi: int) -> np.ndarray:
        """Values `lo:hi`."""
        if hi <= lo:
            return np.empty(0, self.dtype)
        chunks = np.arange(lo // self.chunk, -(-hi // self.chunk))
        out = np.empty(chunks.size * self.chunk, self.dtype)
        self.read(chunks, out, (chunks - chunks[0]) * self.chunk)
        start = lo - int(chunks[0]) * self.chunk
        return out[start : start + hi - lo]

    def _read_general(self, chunks: np.ndarray, out: np.ndarray, targets: np.ndarray) -> None:
        edges = np.flatnonzero((np.diff(chunks) != 1) | (np.diff(targets) != self.chunk)) + 1
        for low, high in zip(np.r_[0, edges], np.r_[edges, chunks.size], strict=True):
            start = int(chunks[low]) * self.chunk
            stop = min((int(chunks[high - 1]) + 1) * self.chunk, self.size)
            try:
                values = np.asarray(self.array[start:stop])
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise DamagedFileError(
                    f"{self.name}: values {start} to {stop} cannot be read ({error}); {_WAY_OUT}"
                ) from error
            out[int(targets[low]) : int(targets[low]) + values.size] = values

    def _read_remote(self, files: RemoteFiles, shards: np.ndarray, slots: np.ndarray, out: np.ndarray, targets: np.ndarray) -> None:
        try:
            indexes = self._remote_indexes(files, np.unique(shards).tolist())
            found = np.stack([indexes[shard][slot] for shard, slot in zip(shards.tolist(), slots.tolist(), strict=True)])
            absent = found[:, 0] == ABSENT
            offsets, lengths = np.where(absent[:, None], np.uint64(0), found).astype(np.int64).T
            follows = (shards[1:] == shards[:-1]) & (offsets[1:] == (offsets + lengths)[:-1])
            first = np.r_[0, np.flatnonzero(~follows) + 1]
            asked = np.add.reduceat(lengths, first)
            some = asked > 0
            ranges = files.read(shards[first][some].tolist(), offsets[first][some].tolist(), (offsets[first] + asked)[some].tolist())
            low, parts = 0, list[np.ndarray]()
            for shard, expected, high in zip(shards[first].tolist(), asked.tolist(), [*first[1:].tolist(), shards.size], strict=True):
                if expected:
                    parts.append(np.frombuffer(next(ranges), np.uint8))
                    if parts[-1].size != expected:
                        raise DamagedFileError(
                            f"{self.name}: shard {files.path(shard)} is truncated: {expected} bytes expected, {parts[-1].size} found; {_WAY_OUT}"
                        )
                if high < shards.size and sum(part.size for part in parts) < _SCRATCH:
                    continue
                scratch = np.concatenate(parts) if parts else np.empty(0, np.uint8)
                those = slice(low, high)  # decoded while the next are under way
                places = [(files.path(shard), shard * self._slots + slot) for shard, slot in zip(shards[those].tolist(), slots[those].tolist(), strict=True)]
                self._decode(scratch, lengths[those], absent[those], out, targets[those], places.__getitem__)
                low, parts = high, []
        except FileNotFoundError as error:
            raise DamagedFileError(f"{self.name}: a shard is missing ({error}); {_WAY_OUT}") from None
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, DamagedFileError):
                raise
            raise DamagedFileError(f"{self.name}: cannot be read ({error}); {_WAY_OUT}") from error
        with self._lock:
            self.bytes_read += int(lengths.sum())

    def _remote_indexes(self, files: RemoteFiles, shards: list[int]) -> dict[int, np.ndarray]:
        found = {shard: self._indexes[shard] for shard in shards if shard in self._indexes}
        if absent := [shard for shard in shards if shard not in found]:
            for shard, (there, raw) in zip(absent, files.tails(absent, self._index_size), strict=True):
                self._check_room(there, files.path(shard))
                found[shard] = self._index(np.frombuffer(raw, np.uint8), there, files.path(shard))
            if len(self._indexes) + len(absent) > _INDEXES_KEPT:
                self._indexes.clear()
            self._indexes |= found
        return found

    def _read_shard(self, shard: int, slots: np.ndarray, out: np.ndarray, targets: np.ndarray) -> None:
        assert isinstance(self._folder, Path)
        path = self._folder / str(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise DamagedFileError(f"{self.name}: shard {path} is missing; {_WAY_OUT}") from None
        except OSError as error:
            raise DamagedFileError(f"{self.name}: shard {path} cannot be opened ({error.strerror}); {_WAY_OUT}") from error
        try:
            index = self._indexes.get(shard)
            if index is None:
                index = self._read_index(descriptor, path)
                if len(self._indexes) >= _INDEXES_KEPT:
                    self._indexes.clear()
                self._indexes[shard] = index
            places = index[slots]
            absent = places[:, 0] == ABSENT
            lengths = np.where(absent, np.uint64(0), places[:, 1]).astype(np.int64)
            offsets = np.where(absent, np.uint64(0), places[:, 0]).astype(np.int64)
            for low, high in _groups(lengths):
                self._read_group(
                    descriptor, path, shard, slots[low:high], offsets[low:high], lengths[low:high], absent[low:high],
                    out, targets[low:high],
                )  # fmt: skip
        finally:
            os.close(descriptor)

    def _read_group(
        self, descriptor: int, path: Path, shard: int, slots: np.ndarray, offsets: np.ndarray, lengths: np.ndarray,
        absent: np.ndarray, out: np.ndarray, targets: np.ndarray,
    ) -> None:  # fmt: skip
        total = int(lengths.sum())
        scratch = self._scratch(total)
        starts = np.cumsum(lengths) - lengths
        breaks = np.flatnonzero(offsets[1:] != (offsets + lengths)[:-1]) + 1  # chunks that follow each other: one read
        for low, high in zip(np.r_[0, breaks], np.r_[breaks, slots.size], strict=True):
            length = int(lengths[low:high].sum())
            if length:
                _pread(descriptor, scratch[int(starts[low]) : int(starts[low]) + length], int(offsets[low]), path)
        with self._lock:
            self.bytes_read += total
        self._decode(scratch, lengths, absent, out, targets, lambda bad: (path, shard * self._slots + int(slots[bad])))

    def _decode(
        self, scratch: np.ndarray, lengths: np.ndarray, absent: np.ndarray, out: np.ndarray, targets: np.ndarray,
        place: Callable[[int], tuple[Any, int]],
    ) -> None:  # fmt: skip
        """Decode chunks that lie back to back; `place` names the shard and the number of one of them."""
        bad, code = decode_chunks(
            scratch,
            np.cumsum(lengths) - lengths,
            np.where(absent, -1, lengths),
            codec=self._codec,
            checked=self._checked,
            out=out.view(np.uint8),
            targets=targets * self.dtype.itemsize,
            size=self.chunk * self.dtype.itemsize,
        )
        if bad >= 0:
            what = "the checksum is wrong" if code == BAD_CHECKSUM else "the compressed bytes are damaged"
            path, chunk = place(bad)
            raise DamagedFileError(f"{self.name}: chunk {chunk} in shard {path}: {what}; {_WAY_OUT}")

    def _scratch(self, size: int) -> np.ndarray:
        scratch: np.ndarray | None = getattr(self._local, "scratch", None)
        if scratch is None or scratch.size < size:
            scratch = np.empty(max(size, _SCRATCH), np.uint8)
            self._local.scratch = scratch
        return scratch

    def _read_index(self, descriptor: int, path: Path) -> np.ndarray:
        there = os.fstat(descriptor).st_size
        self._check_room(there, path)
        raw = np.empty(self._index_size, np.uint8)
        _pread(descriptor, raw, there - raw.size, path)
        return self._index(raw, there, path)

    @property
    def _index_size(self) -> int:
        return 16 * self._slots + 4

    def _check_room(self, there: int, path: Any) -> None:
        if self._index_size > there:
            raise DamagedFileError(f"{self.name}: shard {path} is truncated: {there} bytes, and its index alone has {self._index_size}; {_WAY_OUT}")

    def _index(self, raw: np.ndarray, there: int, path: Any) -> np.ndarray:
        """Return where each chunk of a shard of `there` bytes lies, of the bytes of its index."""
        size, body = self._index_size, raw[:-4].tobytes()
        if struct.pack("<I", google_crc32c.value(body)) != raw[-4:].tobytes():
            raise DamagedFileError(f"{self.name}: shard {path}: the checksum of its index is wrong; {_WAY_OUT}")
        with self._lock:
            self.bytes_read += size
        index = np.frombuffer(body, "<u8").reshape(-1, 2)
        offsets, lengths = index[index[:, 0] != ABSENT].T
        end = np.uint64(there - size)
        if ((offsets > end) | (lengths > end - np.minimum(offsets, end))).any():
            raise DamagedFileError(f"{self.name}: shard {path}: its index names bytes that are not there; {_WAY_OUT}")
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {"array": self.array, "name": self.name, "direct": self.direct}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["array"], name=state["name"], direct=state["direct"])  # type: ignore[misc]


def chunks_of(starts: np.ndarray, stops: np.ndarray, chunk: int) -> np.ndarray:
    """Find the chunks that hold some rows.

    Parameters
    ----------
    starts, stops : (k,) int64, the rows' bounds among the non-zeros
    chunk : int, non-zeros in a chunk

    Returns
    -------
    chunks : (m,) int64, increasing
    """
    some = stops > starts
    first, last = starts[some] // chunk, (stops[some] - 1) // chunk
    counts = last - first + 1
    ends = np.cumsum(counts)
    within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(ends - counts, counts)
    return np.unique(np.repeat(first, counts) + within)


def side_by_side(starts: np.ndarray, stops: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the chunks that hold some rows, and where the rows are once these chunks lie back to back in memory.

    Parameters
    ----------
    starts, stops : (k,) int64, the rows' bounds among the non-zeros
    chunk : int, non-zeros in a chunk

    Returns
    -------
    chunks : (m,) int64, increasing
    starts, stops : (k,) int64, the rows' bounds among the `m * chunk` entries
    """
    chunks, first = chunks_of(starts, stops, chunk), starts // chunk
    # The chunks of one row are neighbours in the store, so they are neighbours here too.
    shift = np.where(stops > starts, (np.searchsorted(chunks, first) - first) * chunk, -starts)
    return chunks, starts + shift, stops + shift


_WAY_OUT = "run `sedd verify` on the store and convert it again"


def _pread(descriptor: int, buffer: np.ndarray, offset: int, path: Path) -> None:
    view = memoryview(buffer)  # type: ignore[arg-type]
    done = os.preadv(descriptor, [view], offset) if offset >= 0 else 0
    while 0 < done < len(view):
        more = os.preadv(descriptor, [view[done:]], offset + done)
        if more == 0:
            break
        done += more
    if done < len(view):
        raise DamagedFileError(f"shard {path} is truncated: {len(view)} bytes expected at byte {offset}; {_WAY_OUT}")


def _groups(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut chunks into runs of about `_SCRATCH` encoded bytes."""
    which = (np.cumsum(lengths) - lengths) // _SCRATCH
    edges = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), lengths.size]
    return list(pairwise(edges))


def _direct_layout(array: zarr.Array) -> tuple[Path | RemoteFiles, int, int, bool] | None:
    """Folder of the shards, chunks a shard, codec and whether a crc32c follows; None if zarr-python has to read it."""
    meta: Any = array.metadata
    if not isinstance(array.store, LocalStore | FsspecStore) or meta.zarr_format != 3 or len(array.shape) != 1:
        return None
    codecs = tuple(meta.codecs)
    if len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec) or meta.fill_value != 0:
        return None
    sharding = codecs[0]
    index = tuple(sharding.index_codecs)
    if str(getattr(sharding.index_location, "value", sharding.index_location)) != "end" or len(index) != 2:
        return None
    if not (_is_little(index[0]) and isinstance(index[1], Crc32cCodec)):
        return None
    chain = list(sharding.codecs)
    if not chain or not _is_little(chain.pop(0), array.dtype.itemsize):
        return None
    checked = bool(chain) and isinstance(chain[-1], Crc32cCodec)
    if checked:
        chain.pop()
    codec = RAW
    if chain and isinstance(chain[0], BloscCodec):
        codec = BLOSC
    elif chain and isinstance(chain[0], ZstdCodec):
        codec = ZSTD
    if len(chain) != (0 if codec == RAW else 1):
        return None
    key = meta.chunk_key_encoding
    if key.name != "default" or key.separator != "/":
        return None
    folder: Path | RemoteFiles
    if isinstance(array.store, LocalStore):
        folder = Path(array.store.root) / array.path / "c"
    else:
        folder = RemoteFiles(array.store, f"{array.path}/c".lstrip("/"))
    assert array.shards is not None
    return folder, int(array.shards[0]) // int(array.chunks[0]), codec, checked


def _is_little(codec: Any, itemsize: int = 8) -> bool:
    if not isinstance(codec, BytesCodec):
        return False
    return itemsize == 1 or str(getattr(codec.endian, "value", codec.endian)) == "little"
