"""The bytes of a store's arrays: inner chunks, shards, codecs.

A vector of the store is a sharded Zarr v3 array. Its metadata is written by zarr-python; its shards are written here,
because zarr-python spends longer on each small chunk than the codec does. An inner chunk holds `CHUNK` entries,
compressed and followed by its crc32c; a shard file holds up to `SHARD // CHUNK` of them and ends in an index of their places.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from sedd.errors import UserError
from sedd.io import native
from sedd.io.files import new_file

CHUNK = 1 << 14
"""Entries in an inner chunk: a random block of 64 cells needs five or six, and wastes at most two."""

SHARD = 1 << 26
"""Entries in a shard: a million cells of 1,400 genes make 21 shards an array."""

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

    def encode_all(self, values: np.ndarray) -> tuple[bytes | memoryview, np.ndarray]:
        """Encode whole chunks: their bytes one after the other, and the size of each."""
        if self._blosc is None or not native.available():
            chunks = [self.encode(values[k : k + CHUNK]) for k in range(0, values.size, CHUNK)]
            return b"".join(chunks), np.array([len(chunk) for chunk in chunks], np.int64)
        blosc = self._blosc
        raw = np.ascontiguousarray(values, self.dtype).view(np.uint8)
        encoded, sizes = native.encode_chunks(
            raw, CHUNK * self.dtype.itemsize, self.dtype.itemsize, blosc.cname, blosc.clevel, blosc.shuffle
        )
        return memoryview(encoded), sizes  # type: ignore[arg-type]

    def decode(self, encoded: bytes | memoryview) -> np.ndarray:
        """The `CHUNK` values of an encoded inner chunk.

        Raises
        ------
        ValueError
            If the checksum or the compressed bytes are wrong.
        """
        body = bytes(encoded[:-4])
        if len(encoded) < 5 or struct.pack("<I", google_crc32c.value(body)) != bytes(encoded[-4:]):
            raise ValueError("the checksum is wrong")
        plain = self._blosc.decode(body) if self._blosc else body
        return np.frombuffer(plain, self.dtype)


def create_vector(group: zarr.Group, name: str, n: int, dtype: np.dtype[Any], codec: str) -> zarr.Array:
    """Write the metadata of a sharded vector of `n` entries; its shards are put beside it by `write_shard`."""
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
    """Entries a shard of an array of `n` entries is declared to hold: `SHARD`, or fewer when one shard holds all."""
    return min(SHARD, max(1, -(-n // CHUNK)) * CHUNK)


def n_shards(n: int) -> int:
    """Number of shard files of an array of `n` entries."""
    return -(-n // SHARD)


def write_shard(path: str, runs: Iterable[tuple[bytes, np.ndarray]], slots: int) -> None:
    """Write one shard file, whole or not at all, and wait until it is on the disk.

    Parameters
    ----------
    path : of the shard, `X/data/c/0`
    runs : encoded inner chunks in order: the bytes of some, and the size of each
    slots : inner chunks the shard has room for, `shard_length(n) // CHUNK`
    """
    sizes = np.zeros(0, np.uint64)
    with new_file(path) as out:
        for encoded, lengths in runs:
            out.write(encoded)
            sizes = np.concatenate([sizes, lengths.astype(np.uint64)])
        index = np.full((slots, 2), _ABSENT, np.uint64)
        index[: sizes.size] = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1)
        tail = index.astype("<u8").tobytes()
        out.write(tail + struct.pack("<I", google_crc32c.value(tail)))
        out.flush()
        os.fsync(out.fileno())
