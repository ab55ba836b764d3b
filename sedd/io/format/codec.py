"""Check and decode many small chunks in one call that releases the GIL.

A chunk of 16k values takes 10 to 20 microseconds to check and decode, about what Python spends on calling a codec, and it
spends that holding the GIL. So the C functions that numcodecs and google-crc32c already carry are called from one Numba
loop over all chunks of a read. Where a build of these packages hides them, the caller goes through Python.
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
            "sedd_zstd_decompress": codecs.ZSTD_decompress,
        }
    except (AttributeError, OSError) as error:
        warn_user(
            f"stores are read through Python, several times slower: numcodecs {numcodecs.__version__} or google-crc32c does "
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
