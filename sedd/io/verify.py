"""Prove that a store is whole, and that it holds what its input holds."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import zarr

from sedd.errors import UserError
from sedd.io.shards import CHUNK, SHARD, Encoder, n_shards, read_index, shard_length


def shard_path(path: str, name: str, number: int) -> str:
    """File of shard `number` of `X/name`."""
    return f"{path}/X/{name}/c/{number}"


def check_shard(path: str, name: str, number: int, dtype: np.dtype[Any], codec: str, n: int) -> str | None:
    """Check the index and every chunk of one shard; what is wrong, or None."""
    file = shard_path(path, name, number)
    slots = shard_length(n) // CHUNK
    held = -(-min(SHARD, n - number * SHARD) // CHUNK)
    encoder = Encoder(dtype, codec)
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(0, size - 16 * slots - 4))
            index = read_index(stream.read())
            for chunk in range(held):
                offset, length = int(index[chunk, 0]), int(index[chunk, 1])
                if offset + length > size:
                    return f"X/{name}, chunk {number * SHARD // CHUNK + chunk} ({file}): lies outside the file"
                stream.seek(offset)
                try:
                    encoder.decode(stream.read(length))
                except (ValueError, RuntimeError) as error:
                    return f"X/{name}, chunk {number * SHARD // CHUNK + chunk} ({file}): {error}"
    except OSError as error:
        return f"X/{name}, shard {number} ({file}): {error.strerror or error}"
    except ValueError as error:
        return f"X/{name}, shard {number} ({file}): {error}"
    return None


def locate(path: str, name: str, lo: int, hi: int, error: Exception) -> str:
    """Which chunk of `X/name` made reading entries `lo:hi` fail, as one line."""
    advice = "The store is damaged: convert its input again."
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    if "://" not in path:
        array = zarr.open_array(f"{path}/X/{name}", mode="r")
        codec = codec_of(array)
        for number in range(lo // SHARD, min(n_shards(array.shape[0]), hi // SHARD + 1)):
            found = check_shard(path, name, number, np.dtype(array.dtype), codec, array.shape[0])
            if found:
                return f"{path}: {found}. {advice}"
    return f"{path}: X/{name}[{lo}:{hi}] cannot be read ({detail}). {advice}"


def codec_of(array: zarr.Array) -> str:
    """Name in `shards.CODECS` of the compressor of an array."""
    sharding = array.metadata.codecs[0]
    for codec in sharding.codecs:
        if type(codec).__name__ == "BloscCodec":
            return str(codec.cname.value)
    return "none"


def verify(path: str, against: str | None = None) -> dict[str, Any]:
    """Check a store.

    Parameters
    ----------
    path : of the store
    against : the h5ad it was made from; None checks the store alone

    Returns
    -------
    report : `chunks` checked, `cells` compared

    Raises
    ------
    UserError
        At the first thing that is wrong.
    """
    from sedd.io.store import CellStore

    store = CellStore(path)
    n_chunks = 0
    for name, array in store.x_arrays.items():
        for number in range(n_shards(array.shape[0])):
            wrong = check_shard(store.path, name, number, np.dtype(array.dtype), codec_of(array), array.shape[0])
            if wrong:
                raise UserError(f"{path}: {wrong}. The store is damaged: convert its input again.")
        n_chunks += -(-array.shape[0] // CHUNK)
    return {"path": path, "chunks": n_chunks, "against": against}
