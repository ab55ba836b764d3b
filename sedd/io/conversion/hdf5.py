"""Read slices of HDF5 datasets from several threads at once.

HDF5 serialises every call behind one lock, so two threads decompress a gzipped dataset no faster than one. Here the
library is asked once where the bytes of a dataset lie; the bytes are then read with `pread` and inflated outside the lock.
Datasets whose filters are not known here (lzf, blosc, fletcher32, ...), and remote files, go through `h5py`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

SLICE = 1 << 17
"""Values that `slices` reads at once: they stay in the processor's cache until they are used."""

DEFLATE, SHUFFLE = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE


class Reader:
    """Slices along the first axis of one HDF5 dataset.

    Parameters
    ----------
    dataset : the open dataset, one- or two-dimensional, numeric
    fd : descriptor of the same file for `pread`, or None when the file is not a local one
    """

    def __init__(self, dataset: h5py.Dataset, fd: int | None) -> None:
        _know_filters(dataset)
        self.dataset = dataset
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype: np.dtype[Any] = dataset.dtype.newbyteorder("=")
        self._fd = fd if fd is not None and _is_native(dataset) and _lies_in(dataset, fd) else None
        self._offset: int | None = None
        self._chunks: dict[int, tuple[int, int, int]] = {}
        self._filters: list[int] = []
        if self._fd is not None and 0 not in self.shape:
            self._locate()

    def _locate(self) -> None:
        """Ask where the bytes are; leave `_fd` unset when only the library can decode them."""
        plist = self.dataset.id.get_create_plist()
        self._filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        layout = plist.get_layout()
        if layout == h5py.h5d.CONTIGUOUS and not plist.get_external_count():
            self._offset = self.dataset.id.get_offset()
            if self._offset is None:  # never written: all fill value
                self._fd = None
            return
        self._fd = self._fd if layout == h5py.h5d.CHUNKED and set(self._filters) <= {DEFLATE, SHUFFLE} else None
        if self._fd is None:
            return
        rows = self.dataset.chunks[0]
        if self.dataset.chunks[1:] != self.shape[1:]:
            self._fd = None  # tiles: a row block needs parts of many chunks, which the library assembles well
            return
        self.dataset.id.chunk_iter(
            lambda info: self._chunks.__setitem__(
                info.chunk_offset[0] // rows, (info.byte_offset, info.size, info.filter_mask)
            )
        )
        if len(self._chunks) != -(-self.shape[0] // rows):
            self._fd = None  # chunks that were never written hold the fill value

    def read(self, lo: int, hi: int) -> np.ndarray:
        """Rows `lo:hi` in native byte order.

        Raises
        ------
        OSError
            If the file is shorter than it says, or a chunk does not inflate to its size.
        """
        if self._fd is None or hi <= lo:
            return np.asarray(self.dataset[lo:hi]).astype(self.dtype, copy=False)
        out = np.empty((hi - lo, *self.shape[1:]), self.dtype)
        row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        if self._offset is not None:
            _pread_into(self._fd, out, self._offset + lo * row_bytes)
            return out
        rows = self.dataset.chunks[0]
        for number in range(lo // rows, -(-hi // rows)):
            chunk = self._inflate(number, rows * row_bytes).view(self.dtype).reshape(rows, *self.shape[1:])
            start = number * rows
            first, last = max(lo, start), min(hi, start + rows)
            out[first - lo : last - lo] = chunk[first - start : last - start]
        return out

    def slices(self, lo: int, hi: int, at_most: int) -> Iterator[tuple[int, np.ndarray]]:
        """Read `lo:hi` of a vector slice by slice, no chunk of the file twice: `(place after lo, values)`.

        `at_most` values are read at once where each call of the library, or of a network, costs much more than its bytes.
        """
        step = SLICE if self._fd is not None else max(SLICE, at_most)
        if self.dataset.chunks:
            step = -(-step // self.dataset.chunks[0]) * self.dataset.chunks[0]
        for start in range(lo // step * step, hi, step):
            first = max(lo, start)
            yield first - lo, self.read(first, min(hi, start + step))

    def _inflate(self, number: int, n_bytes: int) -> np.ndarray:
        offset, size, mask = self._chunks[number]
        raw = np.empty(size, np.uint8)
        _pread_into(self._fd, raw, offset)
        for position in reversed(range(len(self._filters))):
            if mask >> position & 1:
                continue
            if self._filters[position] == DEFLATE:
                raw = _zlib(raw, n_bytes)
            elif self.dtype.itemsize > 1:
                raw = np.ascontiguousarray(raw.reshape(self.dtype.itemsize, -1).T).reshape(-1)
        if raw.size != n_bytes:
            raise OSError(f"chunk {number} of {self.dataset.name} holds {raw.size} bytes, expected {n_bytes}")
        return raw


def _know_filters(dataset: h5py.Dataset) -> None:
    """Register the filters that people's files use, if this dataset has one that the library itself does not know."""
    plist = dataset.id.get_create_plist()
    if not all(h5py.h5z.filter_avail(plist.get_filter(i)[0]) for i in range(plist.get_nfilters())):
        import hdf5plugin  # noqa: F401  (slow to import)


def _zlib(raw: np.ndarray, n_bytes: int) -> np.ndarray:
    # A damaged length field must not make us inflate gigabytes: ask for one byte more than a chunk holds.
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(raw.data, n_bytes + 1)
        if not inflater.eof:  # the checksum trails the data
            plain += inflater.decompress(inflater.unconsumed_tail, 1)
    except zlib.error as error:
        raise OSError(f"a gzipped chunk does not inflate ({error})") from error
    if not inflater.eof:
        raise OSError("a gzipped chunk is cut short")
    return np.frombuffer(plain, np.uint8)


def _is_native(dataset: h5py.Dataset) -> bool:
    """Whether the bytes in the file are those of the numpy dtype, so that no conversion is needed."""
    dtype = dataset.dtype
    return bool(dtype.isnative and dtype.kind in "iuf" and dataset.id.get_type().equal(h5py.h5t.py_create(dtype)))


def _lies_in(dataset: h5py.Dataset, fd: int) -> bool:
    """Whether the dataset is in the file that `fd` is of: an external link leads into another one."""
    try:
        return os.path.samestat(os.stat(dataset.file.filename), os.fstat(fd))
    except OSError:
        return False


def _pread_into(fd: int | None, out: np.ndarray, offset: int) -> None:
    assert fd is not None
    view = out.reshape(-1).view(np.uint8).data
    while len(view):
        n = os.preadv(fd, [view], offset)
        if n <= 0:
            raise OSError(f"the file ends {len(view)} bytes early")
        view, offset = view[n:], offset + n
