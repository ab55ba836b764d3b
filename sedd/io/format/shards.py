"""The bytes of a store's arrays: inner chunks, shards, codecs.

A vector of the store is a sharded Zarr v3 array. Its metadata is written by zarr-python; its shards are written here,
because zarr-python spends longer on each small chunk than the codec does. An inner chunk holds `CHUNK` entries,
compressed and followed by its crc32c; a shard file holds up to `SHARD // CHUNK` of them and ends in an index of their places.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import google_crc32c
import numcodecs
import numpy as np

from sedd.errors import UserError

if TYPE_CHECKING:
    import zarr

CHUNK = 1 << 14
"""Entries in an inner chunk: a random block of 64 cells needs five or six, and wastes at most two."""

SHARD = 1 << 26
"""Entries in a shard at most: a million cells of 1,400 genes make 21 shards an array."""

LEAST_SHARD, SHARDS = 1 << 22, 16
"""An array of fewer entries gets smaller shards, more than half of `SHARDS` of them, so that all workers have one to make."""

CODECS: dict[str, tuple[str, int, dict[str, str]] | None] = {
    "lz4": ("lz4", 5, {"data": "bitshuffle", "indices": "shuffle", "indptr": "shuffle"}),
    "zstd": ("zstd", 1, {"data": "shuffle", "indices": "shuffle", "indptr": "shuffle"}),
    "none": None,
}
"""Name -> Blosc compressor, level and the filter of each array. Chosen by `benchmarks/codecs.py`: small counts gain from shuffled
bits with lz4, which looks for whole bytes that repeat; gene indices do not, and whole bytes are shuffled back in half the
time. zstd gains nothing from higher levels but costs twice the time."""

_FILTERS = {"shuffle": numcodecs.Blosc.SHUFFLE, "bitshuffle": numcodecs.Blosc.BITSHUFFLE}

_ABSENT = (1 << 64) - 1


def check_codec(codec: str) -> str:
    """Return `codec` if it is one of `CODECS`."""
    if codec not in CODECS:
        raise UserError(f"there is no codec {codec!r}; choose one of {', '.join(CODECS)}.")
    return codec


class Encoder:
    """Encodes inner chunks of one dtype: compressed bytes and their crc32c.

    Parameters
    ----------
    name : of the array in X, "data", "indices" or "indptr"
    dtype : of the array, little-endian numbers
    codec : a name of `CODECS`
    """

    def __init__(self, name: str, dtype: np.dtype[Any], codec: str) -> None:
        self.dtype = np.dtype(dtype)
        setting = CODECS[check_codec(codec)]
        self._blosc = setting and numcodecs.Blosc(setting[0], setting[1], _FILTERS[setting[2][name]], 0)

    def encode(self, values: np.ndarray) -> bytes:
        """Encode up to `CHUNK` values; a short last chunk is filled with zeros, as Zarr wants."""
        chunk = np.ascontiguousarray(values, self.dtype)
        if chunk.size < CHUNK:
            chunk = np.concatenate([chunk, np.zeros(CHUNK - chunk.size, self.dtype)])
        body = bytes(self._blosc.encode(chunk)) if self._blosc else chunk.tobytes()
        return body + struct.pack("<I", google_crc32c.value(body))

    def decode(self, encoded: bytes | memoryview) -> np.ndarray:
        """Return the `CHUNK` values of an encoded inner chunk.

        Raises
        ------
        ValueError
            If the checksum or the compressed bytes are wrong.
        """
        check_encoded(bytes(encoded))
        body = bytes(encoded[:-4])
        plain = self._blosc.decode(body) if self._blosc else body
        return np.frombuffer(plain, self.dtype)


def create_vector(group: zarr.Group, name: str, n: int, dtype: np.dtype[Any], codec: str) -> zarr.Array:
    """Write the metadata of a sharded vector of `n` entries; its shards are put beside it."""
    from zarr.codecs import BloscCodec, Crc32cCodec  # importing zarr takes longer than converting 10,000 cells

    setting = CODECS[check_codec(codec)]
    dtype = np.dtype(dtype)
    blosc = [BloscCodec(typesize=dtype.itemsize, cname=setting[0], clevel=setting[1], shuffle=setting[2][name])] if setting else []
    return group.create_array(
        name,
        shape=(n,),
        chunks=(CHUNK,),
        shards=(shard_length(n),),
        dtype=dtype,
        compressors=[*blosc, Crc32cCodec()],
        fill_value=0,
    )


def shard_length(n: int) -> int:
    """Entries a shard of an array of `n` entries is declared to hold."""
    length = LEAST_SHARD
    while length < SHARD and length * SHARDS < n:
        length *= 2
    return min(length, max(1, -(-n // CHUNK)) * CHUNK)


def n_shards(n: int) -> int:
    """Return the number of shard files of an array of `n` entries."""
    return -(-n // shard_length(n))


class Pen:
    """Writes one shard file from values that come in portions of any size.

    Parameters
    ----------
    file : to write
    encoder : of the array
    slots : inner chunks the shard has room for, `shard_length(n) // CHUNK`
    """

    def __init__(self, file: BinaryIO, encoder: Encoder, slots: int) -> None:
        self.file, self._encoder, self._slots = file, encoder, slots
        self._rest = np.empty(0, encoder.dtype)
        self._places = [np.empty((0, 2), np.uint64)]
        self._at = 0

    def take_over(self, path: str, n: int) -> None:
        """Begin with the first `n` values of another shard file of the same array: its whole chunks are copied as they are.

        Its bytes stay where they are, those of a last chunk that is filled up included: who has read the index of that file finds
        everything in this one, which takes its name.

        Raises
        ------
        ValueError
            If a checksum is wrong.
        """
        n_chunks, whole = -(-n // CHUNK), n // CHUNK
        with open(path, "rb") as file:
            places = read_index(file, self._slots)[:n_chunks]
            file.seek(0)
            for offset, size in places.astype(np.int64).tolist():
                gap = offset - self._at  # left by an earlier filling up
                self.file.write(file.read(gap))
                encoded = file.read(size)
                check_encoded(encoded)
                self.file.write(encoded)
                self._at = offset + size
        self._places.append(places[:whole])
        if whole < n_chunks:
            self._rest = self._encoder.decode(encoded)[: n - whole * CHUNK].copy()

    def write(self, values: np.ndarray) -> None:
        """Append values; whole chunks are encoded now."""
        if self._rest.size:
            missing = CHUNK - self._rest.size
            self._rest, values = np.concatenate([self._rest, values[:missing]]), values[missing:]
            if self._rest.size < CHUNK:
                return
            self._encode(self._rest)
        whole = values.size // CHUNK * CHUNK
        self._encode(values[:whole])
        self._rest = values[whole:].copy()

    def _encode(self, values: np.ndarray) -> None:
        for start in range(0, values.size, CHUNK):
            chunk = self._encoder.encode(values[start : start + CHUNK])
            self.file.write(chunk)
            self._places.append(np.array([[self._at, len(chunk)]], np.uint64))
            self._at += len(chunk)

    def finish(self) -> None:
        """Write the last chunk and the index of the chunks."""
        self._encode(self._rest)
        places = np.concatenate(self._places)
        index = np.full((self._slots, 2), _ABSENT, np.uint64)
        index[: len(places)] = places
        tail = index.astype("<u8").tobytes()
        self.file.write(tail + struct.pack("<I", google_crc32c.value(tail)))
        self.file.flush()


def read_index(file: BinaryIO, slots: int) -> np.ndarray:
    """Where each chunk of a shard file begins and how long it is, `(slots, 2)` uint64.

    Raises
    ------
    ValueError
        If its checksum is wrong.
    """
    file.seek(-(slots * 16 + 4), 2)
    raw = file.read()
    check_encoded(raw)
    return np.frombuffer(raw[:-4], "<u8").reshape(-1, 2)


def check_encoded(encoded: bytes) -> None:
    """Compare what was encoded with the checksum behind it; a ValueError if they differ."""
    if len(encoded) < 5 or struct.pack("<I", google_crc32c.value(encoded[:-4])) != encoded[-4:]:
        raise ValueError("the checksum is wrong")


def read_shard(path: str, encoder: Encoder, slots: int, n: int, chunks: int = 64) -> Iterator[np.ndarray]:
    """Return the first `n` values of a shard file that a `Pen` wrote, some chunks at a time."""
    with open(path, "rb") as file:
        sizes = read_index(file, slots)[: -(-n // CHUNK), 1].astype(np.int64)
        file.seek(0)
        for first in range(0, sizes.size, chunks):
            own = [encoder.decode(file.read(int(size))) for size in sizes[first : first + chunks]]
            yield np.concatenate(own)[: n - first * CHUNK]


def consolidate(group: zarr.Group) -> None:
    """Gather the metadata of a store in one place, as anndata does."""
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that consolidated metadata are an extension of Zarr v3; anndata writes them too
        zarr.consolidate_metadata(group.store)
