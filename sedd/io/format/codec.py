"""Checksum and compression of many small chunks in one call that releases the GIL.

A chunk of 16k values takes 10 to 20 microseconds to check and decode, about what Python spends on calling a codec, and it
spends that holding the GIL. So the C functions that numcodecs and google-crc32c already carry are called from one Numba
loop over all chunks of a read or write. Where a build of these packages hides them, the caller goes through Python.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import google_crc32c
import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
import numcodecs
import numcodecs.blosc
import numpy as np
from numba import types

from sedd.errors import warn_user

RAW, BLOSC, ZSTD = 0, 1, 2
OK, BAD_CHECKSUM, BAD_DATA = 0, 1, 2
ABSENT = np.uint64((1 << 64) - 1)

_crc32c = types.ExternalFunction("sedd_crc32c_value", types.uint32(types.uintp, types.uintp))
_blosc = types.ExternalFunction(
    "sedd_blosc_decompress_ctx", types.intc(types.uintp, types.uintp, types.uintp, types.intc)
)
_blosc_compress = types.ExternalFunction(
    "sedd_blosc_compress_ctx",
    types.intc(
        types.intc, types.intc, types.uintp, types.uintp, types.uintp, types.uintp, types.uintp, types.uintp, types.uintp,
        types.intc,
    ),
)  # fmt: skip
_zstd = types.ExternalFunction("sedd_zstd_decompress", types.uintp(types.uintp, types.uintp, types.uintp, types.uintp))


@cache
def available() -> bool:
    """Tell whether the C functions can be called; binds them on the first call, or says once that they are not there.

    They are bound by name, not by address, so that the compiled loop can be cached on disk.
    """
    keep_freed_memory()
    try:
        checksum = ctypes.CDLL(google_crc32c._crc32c.__file__).crc32c_value
        codecs = ctypes.CDLL(numcodecs.blosc.__file__)
        functions = {
            "sedd_crc32c_value": checksum,
            "sedd_blosc_decompress_ctx": codecs.blosc_decompress_ctx,
            "sedd_blosc_compress_ctx": codecs.blosc_compress_ctx,
            "sedd_zstd_decompress": codecs.ZSTD_decompress,
        }
    except (AttributeError, OSError) as error:
        warn_user(
            f"stores are read and written through Python, several times slower: numcodecs {numcodecs.__version__} or google-crc32c does "
            f"not show its C functions here ({error}). Wheels of the registry do; was one of them built otherwise?"
        )
        return False
    for name, function in functions.items():
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return True


def keep_freed_memory() -> None:
    """Make the C library keep the memory that it frees.

    Blosc takes and frees scratch for each chunk. At first glibc gives it back to the system every time, and having it
    mapped in again takes longer than decoding; freeing one large block raises that threshold for good.
    """
    np.empty(1 << 24, np.uint8)


@numba.njit(cache=True, nogil=True)
def _word(raw: Any, at: Any) -> Any:
    return (
        np.uint32(raw[at])
        | np.uint32(raw[at + 1]) << np.uint32(8)
        | np.uint32(raw[at + 2]) << np.uint32(16)
        | np.uint32(raw[at + 3]) << np.uint32(24)
    )


@numba.njit(cache=True, nogil=True)
def _decode_one(raw: Any, start: Any, length: Any, codec: Any, checked: Any, out: Any, at: Any, size: Any) -> int:
    source = np.uint64(raw.ctypes.data) + np.uint64(start)
    if checked:
        if length < 4:
            return BAD_CHECKSUM
        length -= 4
        if _crc32c(source, np.uint64(length)) != _word(raw, start + length):
            return BAD_CHECKSUM
    target = np.uint64(out.ctypes.data) + np.uint64(at)
    if codec == RAW:
        if length != size:
            return BAD_DATA
        out[at : at + size] = raw[start : start + length]
    elif codec == BLOSC:
        # The header repeats both sizes; blosc trusts it, so a frame that disagrees would be read or written too far.
        if length < 16 or _word(raw, start + 4) != np.uint32(size) or _word(raw, start + 12) != np.uint32(length):
            return BAD_DATA
        if _blosc(source, target, np.uint64(size), np.int32(1)) != size:
            return BAD_DATA
    elif _zstd(target, np.uint64(size), source, np.uint64(length)) != np.uint64(size):
        return BAD_DATA
    return OK


@numba.njit(cache=True, nogil=True)
def _decode(
    raw: Any, starts: Any, lengths: Any, codec: Any, checked: Any, out: Any, targets: Any, size: Any
) -> tuple[int, int]:
    for i in range(starts.shape[0]):
        if lengths[i] < 0:  # a chunk that was never written holds the fill value, zero
            out[targets[i] : targets[i] + size] = np.uint8(0)
            continue
        code = _decode_one(raw, starts[i], lengths[i], codec, checked, out, targets[i], size)
        if code != OK:
            return i, code
    return -1, OK


def decode_chunks(
    raw: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    *,
    codec: int,
    checked: bool,
    out: np.ndarray,
    targets: np.ndarray,
    size: int,
) -> tuple[int, int]:
    """Check and decode chunks.

    Parameters
    ----------
    raw : (n,) uint8, encoded chunks
    starts, lengths : (k,) int64, where in `raw` each lies, its checksum included; a negative length is an absent chunk
    codec : RAW, BLOSC or ZSTD
    checked : bool
        Each chunk ends in the crc32c of what is before it.
    out : (m,) uint8, where to write
    targets : (k,) int64, where in `out` each chunk goes
    size : int
        Bytes of a decoded chunk.

    Returns
    -------
    chunk, code : int
        The first chunk that failed and how (BAD_CHECKSUM, BAD_DATA), or -1 and OK.
    """
    if starts.size:
        present = lengths >= 0
        if int((starts + lengths)[present].max(initial=0)) > raw.size or int(starts[present].min(initial=0)) < 0:
            raise ValueError("a chunk lies outside the bytes that were read")
        if int(targets.min()) < 0 or int(targets.max()) + size > out.size:
            raise ValueError("a chunk would be written outside the memory given")
    return _decode(raw, starts, lengths, codec, checked, out, targets, size)


BLOSC_OVERHEAD = 16
"""Bytes that a Blosc frame may be longer than what it holds."""


@numba.njit(cache=True, nogil=True)
def _encode(raw: Any, size: Any, itemsize: Any, name: Any, level: Any, shuffle: Any, out: Any, sizes: Any) -> int:
    at = np.int64(0)
    for i in range(sizes.shape[0]):
        source = np.uint64(raw.ctypes.data) + np.uint64(i * size)
        target = np.uint64(out.ctypes.data) + np.uint64(at)
        n = _blosc_compress(
            level, shuffle, np.uint64(itemsize), np.uint64(size), source, target, np.uint64(size + BLOSC_OVERHEAD),
            np.uint64(name.ctypes.data), np.uint64(0), np.int32(1),
        )  # fmt: skip
        if n <= 0:
            return i
        crc = _crc32c(target, np.uint64(n))
        for byte in range(4):
            out[at + n + byte] = np.uint8(crc >> np.uint32(8 * byte) & np.uint32(255))
        sizes[i] = n + 4
        at += n + 4
    return -1


def encode_chunks(
    raw: np.ndarray, size: int, itemsize: int, compressor: str, level: int, shuffle: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compress chunks with Blosc, each followed by its crc32c.

    Parameters
    ----------
    raw : (k * size,) uint8, contiguous, the chunks
    size : int, bytes of a chunk
    itemsize : int, bytes of one value
    compressor, level, shuffle : Blosc's

    Returns
    -------
    encoded : (n,) uint8, the encoded chunks one after the other
    sizes : (k,) int64, bytes of each
    """
    if raw.size % size:
        raise ValueError(f"{raw.size} bytes are not whole chunks of {size}")
    sizes = np.zeros(raw.size // size, np.int64)
    out = np.empty(sizes.size * (size + BLOSC_OVERHEAD + 4), np.uint8)
    name = np.frombuffer(compressor.encode() + b"\0", np.uint8)
    bad = _encode(raw, size, itemsize, name, np.int32(level), np.int32(shuffle), out, sizes)
    if bad >= 0:
        raise RuntimeError(f"Blosc cannot compress chunk {bad} with {compressor}")
    return out[: int(sizes.sum())], sizes
