"""Read slices of HDF5 datasets, in the types and the sizes that a conversion wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

SLICE = 1 << 17
"""Values that `slices` reads at once: they stay in the processor's cache until they are used."""


class Reader:
    """Slices along the first axis of one HDF5 dataset.

    Parameters
    ----------
    dataset : the open dataset, one- or two-dimensional, numeric
    remote : whether each read costs a round trip over a network
    """

    def __init__(self, dataset: h5py.Dataset, *, remote: bool = False) -> None:
        _know_filters(dataset)
        self.dataset = dataset
        self.shape: tuple[int, ...] = dataset.shape
        self.dtype = workable(dataset.dtype)
        self._remote = remote

    def read(self, lo: int, hi: int) -> np.ndarray:
        """Return rows `lo:hi` as `dtype`."""
        return np.asarray(self.dataset[lo:hi]).astype(self.dtype, copy=False)

    def slices(self, lo: int, hi: int, at_most: int) -> Iterator[tuple[int, np.ndarray]]:
        """Read `lo:hi` of a vector slice by slice, no chunk of the file twice: `(place after lo, values)`.

        `at_most` values are read at once where each call costs a network much more than its bytes.
        """
        step = max(SLICE, at_most) if self._remote else SLICE
        if self.dataset.chunks:
            step = -(-step // self.dataset.chunks[0]) * self.dataset.chunks[0]
        for start in range(lo // step * step, hi, step):
            first = max(lo, start)
            yield first - lo, self.read(first, min(hi, start + step))


def workable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type that values of `dtype` are read as: scipy and Numba know neither half nor quadruple precision."""
    if dtype.kind != "f":
        return dtype.newbyteorder("=")
    return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)


def _know_filters(dataset: h5py.Dataset) -> None:
    """Register the filters that people's files use, if this dataset has one that the library itself does not know."""
    plist = dataset.id.get_create_plist()
    if not all(h5py.h5z.filter_avail(plist.get_filter(i)[0]) for i in range(plist.get_nfilters())):
        import hdf5plugin  # noqa: F401  (slow to import)
