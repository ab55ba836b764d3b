"""Read slices of arrays in HDF5, Zarr or memory, in the types and the sizes that a conversion wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

SLICE = 1 << 17
"""Values that `slices` reads at once: they stay in the processor's cache until they are used."""


def is_array(node: Any) -> bool:
    """Whether a node of an HDF5 file or a Zarr store is an array, rather than a group."""
    return hasattr(node, "shape")


class Reader:
    """Slices along the first axis of one array.

    Parameters
    ----------
    array : an open HDF5 dataset, a Zarr array or an array in memory; one- or two-dimensional, numeric
    remote : whether each read costs a round trip over a network
    transposed : whether the first axis here is the second one there
    """

    def __init__(self, array: Any, *, remote: bool = False, transposed: bool = False) -> None:
        if isinstance(array, h5py.Dataset):
            _know_filters(array)
        self.array = array
        self.shape: tuple[int, ...] = tuple(array.shape)[:: -1 if transposed else 1]
        self.dtype = workable(array.dtype)
        self._remote, self._transposed = remote, transposed

    def read(self, lo: int, hi: int) -> np.ndarray:
        """Return rows `lo:hi` as `dtype`."""
        values = np.asarray(self.array[:, lo:hi]).T if self._transposed else np.asarray(self.array[lo:hi])
        return values.astype(self.dtype, copy=False)

    def slices(self, lo: int, hi: int, at_most: int) -> Iterator[tuple[int, np.ndarray]]:
        """Read `lo:hi` of a vector slice by slice, no chunk of the file twice: `(place after lo, values)`.

        `at_most` values are read at once where each call costs a network much more than its bytes.
        """
        step = max(SLICE, at_most) if self._remote else SLICE
        if chunks := getattr(self.array, "chunks", None):
            step = -(-step // chunks[0]) * chunks[0]
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
