"""The bytes of a store that grows: shards that stay, by another name of the same files, and those that come after them."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from sedd.errors import DamagedFileError, UserError
from sedd.io.conversion.runner import check_abandoned
from sedd.io.files import begin_to_sync, new_file, write_json
from sedd.io.format import shards
from sedd.io.format.reader import ChunkReader
from sedd.io.format.shards import Encoder, Pen
from sedd.io.outputs import remove_parts
from sedd.io.store import CellStore

STEP = 1 << 20
"""Entries moved at once."""


def matrices_of(store: CellStore) -> dict[str, Any]:
    """Return the arrays of X and of each layer, by where they are."""
    return {"X": store.x_arrays, **{f"layers/{name}": arrays for name, arrays in store.layer_arrays.items()}}


def lay_out(store: CellStore, added: CellStore, root: str) -> list[tuple[Any, ...]]:
    """Begin the grown store in `root` with the metadata of its matrices and the shards that stay.

    Parameters
    ----------
    store, added : what there is, and the new cells
    root : of the grown store; shards that are there already are kept

    Returns
    -------
    tasks : arguments of `extend_shard` for the shards that are still to be made
    """
    tasks: list[tuple[Any, ...]] = []
    for name, arrays in matrices_of(store).items():
        os.makedirs(f"{root}/{name}", exist_ok=True)
        remove_parts(f"{root}/{name}")  # of a process that was killed
        meta = _read_json(f"{store.path}/{name}/zarr.json")
        meta["attributes"]["shape"] = [store.n_obs + added.n_obs, store.n_vars]
        write_json(f"{root}/{name}/zarr.json", meta)
        for part, array in arrays.items():
            n, more = int(array.shape[0]), int(matrices_of(added)[name][part].shape[0]) - (part == "indptr")
            fresh = _lay_out_array(f"{store.path}/{name}/{part}", f"{root}/{name}/{part}", n, n + more, array.shards[0])
            tasks += [(store.path, added.path, root, name, part, number) for number in fresh]
    return tasks


def copy_rest(old: str, root: str, *, anew: list[str]) -> None:
    """Copy what a store has beside its matrices, but for the metadata of all of it in one place, which no longer holds.

    Parameters
    ----------
    old, root : of the store and of the grown one
    anew : what is left out, as it is written anew
    """
    for name in os.listdir(root):
        if name not in ("X", "layers"):  # of an earlier attempt
            _remove(f"{root}/{name}")
    os.makedirs(f"{root}/layers", exist_ok=True)
    shutil.copyfile(f"{old}/layers/zarr.json", f"{root}/layers/zarr.json")
    for name in os.listdir(old):
        if name in ("X", "layers", "zarr.json", *anew):
            continue
        if os.path.isdir(f"{old}/{name}"):
            shutil.copytree(f"{old}/{name}", f"{root}/{name}")
        else:
            shutil.copyfile(f"{old}/{name}", f"{root}/{name}")
    for name in anew:
        _remove(f"{root}/{name}")
    meta = _read_json(f"{old}/zarr.json")
    write_json(f"{root}/zarr.json", {name: value for name, value in meta.items() if name != "consolidated_metadata"})


def _read_json(path: str) -> dict[str, Any]:
    with open(path) as file:
        found: dict[str, Any] = json.load(file)
    return found


def _lay_out_array(old: str, new: str, n: int, total: int, length: int) -> list[int]:
    """Give an array its metadata and the shards that stay; return the numbers of those still to be made.

    Parameters
    ----------
    old, new : folders of the array
    n, total : entries it has, and is to have
    length : entries of a shard
    """
    os.makedirs(f"{new}/c", exist_ok=True)
    write_json(f"{new}/zarr.json", {**_read_json(f"{old}/zarr.json"), "shape": [total]})
    for folder in (new, f"{new}/c"):
        remove_parts(folder)
    fresh = range(n // length, -(-total // length)) if total > n else range(0)
    for number in range(-(-n // length)):
        if number not in fresh and not os.path.exists(f"{new}/c/{number}"):
            _link(f"{old}/c/{number}", f"{new}/c/{number}")
    return [number for number in fresh if not os.path.exists(f"{new}/c/{number}")]


def _link(old: str, new: str) -> None:
    """Have a file under another name too; a copy where the file system has no such links."""
    if not os.path.exists(old):
        raise DamagedFileError(f"shard {old}: is missing, so nothing was appended. Run `sedd verify` on the store and convert its files again.")
    try:
        os.link(old, new)
    except OSError:
        with open(old, "rb") as source, new_file(new) as file:
            shutil.copyfileobj(source, file, 4 << 20)


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.unlink(path)


def extend_shard(old: str, added: str, new: str, matrix: str, part: str, number: int) -> None:
    """Make shard `number` of an array of the grown store: what the old one has in it, then new entries; a task.

    Parameters
    ----------
    old, added, new : paths of the store, of that of the new cells, of the grown one
    matrix, part : of the array, such as "X" and "data"
    """
    store = CellStore(old)
    array, source = (matrices_of(one)[matrix][part] for one in (store, CellStore(added)))
    n, length, base, skip = int(array.shape[0]), int(array.shards[0]), 0, 0
    if part == "indptr":  # one longer than there are cells, from 0
        skip, base = 1, int(matrices_of(store)[matrix]["data"].shape[0])
    reader = ChunkReader(source, name=f"{added}/{matrix}/{part}")
    begin, total = number * length, n + reader.size - skip
    with new_file(f"{new}/{matrix}/{part}/c/{number}") as file:
        pen = Pen(file, Encoder(part, array.dtype, store.uns_sedd["codec"]), length // shards.CHUNK)
        if begin < n:
            path = f"{old}/{matrix}/{part}/c/{number}"
            try:
                pen.take_over(path, n - begin)
            except ValueError as error:
                raise UserError(
                    f"shard {path}: {error}, so nothing was appended. Run `sedd verify` on the store and convert its files again."
                ) from error
        at, stop = max(begin, n) - n + skip, min(begin + length, total) - n + skip
        for lo in range(at, stop, STEP):
            check_abandoned()
            pen.write(reader.read_range(lo, min(lo + STEP, stop)).astype(array.dtype) + array.dtype.type(base))
        pen.finish()
        begin_to_sync(file)
