"""What a file or a store may not do to who opens it: looked at in its headers before anything of it is read.

It may not run a program (pickle), lead outside itself (links, data kept in other files) or ask for much more memory than it has bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import h5py

from sedd.errors import DamagedFileError, UserError, WrongFileError

_FREE = 1 << 30
"""Bytes that a file may ask for without having them, as a column of zeros does that was never written."""
_RATIO = 1 << 17
"""Bytes that one stored byte can stand for: more than any compression makes of real data."""


class _Claims:
    """Adds up what arrays ask for and do not have; what is stored of them is looked up only where all of them ask for much."""

    def __init__(self, path: str) -> None:
        self._path, self._sum = path, 0
        self._waiting: list[tuple[str, tuple[int, ...], int, Callable[[], int]]] = []

    def add(self, name: str, shape: tuple[int, ...], size: int, stored: Callable[[], int]) -> None:
        """Count an array: `size` bytes when read, of which `stored()` are there."""
        self._sum += size
        self._waiting.append((name, shape, size, stored))
        if self._sum <= _FREE:
            return
        found = [(size, name, shape, there) for name, shape, size, look in self._waiting if (there := look()) * _RATIO < size]
        self._sum -= sum(size for _, _, size, _ in self._waiting) - sum(size for size, *_ in found)
        self._waiting = []
        if self._sum > _FREE:
            size, name, shape, there = max(found, key=lambda one: one[0])
            raise DamagedFileError(
                f"{self._path}: {name} has the shape {str(shape)[:60]}, which takes {size / 2**30:,.1f} GiB, and {there} bytes of it are there. "
                "Copy or write it again."
            )


def check_hdf5(path: str, root: h5py.File) -> None:
    """Check an HDF5 file, with those that its links lead to.

    A link to a file in the folder of this one, or below it, is followed; it may have been made to share a matrix.

    Raises
    ------
    UserError
        If it links to a file elsewhere, data of it are bytes of another file, or it asks for much more memory than it has bytes.
    """
    neighbours = _check_hdf5(path, root)
    checked = {os.path.realpath(path)}
    while neighbours:
        if (name := neighbours.pop()) in checked:
            continue
        checked.add(name)
        with h5py.File(name, "r") as other:
            neighbours |= _check_hdf5(name, other)


def _check_hdf5(path: str, root: h5py.File) -> set[str]:
    claims = _Claims(path)
    links: dict[str, str] = {}

    def note(name: str, link: Any) -> None:  # h5py cannot pass an error on from here
        if isinstance(link, h5py.ExternalLink):
            links[name] = link.filename

    def look(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            plist = node.id.get_create_plist()
            if plist.get_external_count():
                raise _leads_out(path, name, os.fsdecode(plist.get_external(0)[0]))
            if plist.get_layout() == h5py.h5d.VIRTUAL:
                others = [source.file_name for source in node.virtual_sources() if source.file_name != "."]
                if others:
                    raise _leads_out(path, name, others[0])
            shape = node.shape or ()
            size = max(math.prod(shape), math.prod(node.chunks or ())) * max(1, node.id.get_type().get_size())
            claims.add(name, shape, size, node.id.get_storage_size)

    try:
        root.visititems_links(note)
    except SystemError as error:  # as h5py passes on what HDF5 says within such a visit
        raise RuntimeError(str(error.__cause__ or error)) from error
    neighbours, folder = set(), os.path.dirname(os.path.realpath(path))
    for name, where in links.items():
        target = os.path.realpath(os.path.join(folder, where))
        # Where it is missing HDF5 would try the working directory.
        if "://" in path or not target.startswith(f"{folder}/") or not os.path.isfile(target):
            raise _leads_out(path, name, where)
        neighbours.add(target)
    root.visititems(look)
    return neighbours


def check_zarr(path: str, group: Any) -> None:
    """Check a Zarr store, with the files of a local one.

    Raises
    ------
    UserError
        If a file of it is a link out of it, an array is encoded by pickle, or asks for much more memory than it has bytes.
    """
    if "://" not in path:
        _check_links(path)
    claims = _Claims(path)
    for name, array in _arrays(group, ""):
        metadata = array.metadata
        codecs = str([metadata.codecs] if metadata.zarr_format == 3 else [metadata.filters, metadata.compressor])
        if "pickle" in codecs.lower():
            raise WrongFileError(f"{path}: {name} is encoded by pickle, which could run a program; nothing of it was read. Write it again without.")
        shards = array.shards or array.chunks
        slots = math.prod(-(-outer // max(1, inner)) for outer, inner in zip(shards, array.chunks, strict=True))
        size = max(math.prod(array.shape), math.prod(array.chunks)) * max(1, array.dtype.itemsize) + 16 * slots
        claims.add(name, array.shape, size, array.nbytes_stored)


def _arrays(group: Any, at: str) -> Iterator[tuple[str, Any]]:
    for name, node in group.members(max_depth=None):
        if hasattr(node, "shape"):
            yield f"{at}{name}", node


def _check_links(root: str) -> None:
    inside = os.path.realpath(root)
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = f"{folder}/{name}"
            if os.path.islink(path) and not f"{os.path.realpath(path)}/".startswith(f"{inside}/"):
                raise _leads_out(root, os.path.relpath(path, root), os.readlink(path))
            if name in names and not os.path.isfile(path):
                raise DamagedFileError(f"{root}: {os.path.relpath(path, root)} is not a file. Take it out, or copy the store again.")


def _leads_out(path: str, name: str | bytes, where: str) -> UserError:
    return WrongFileError(
        f"{path}: {os.fsdecode(name)} is kept in another file ({where}), which is not read on behalf of this one. Copy it with all that it "
        "links to (cp -rL), or write it again in one piece."
    )
