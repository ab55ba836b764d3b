"""`.h5ad` files to a store, on threads or a Dask cluster, in bounded memory, never half-written.

    inputs ----------------------------> make_shard --> shards --check, rename--> OUTPUT.zarr
       \\--scatter_window--> spill --/

Here are the functions to call. The steps are in `job.py`, the tasks in `write.py` and `spill.py`. Everything unfinished is
in `OUTPUT.zarr.partial`, which `resume` goes on from. What is slow to import, for tables and metadata, is imported while the tasks run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sedd.errors import UserError
from sedd.io import remote
from sedd.io.conversion.job import DEFAULT_CODEC, Job
from sedd.io.files import parse_bytes

if TYPE_CHECKING:
    from sedd.io.store import CellStore

LEAST_BUDGET = 64 << 20
"""Bytes of memory that a conversion needs for data."""


def convert(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    layer: str | None = None,
    raw: bool = False,
    join: str = "inner",
    genes: str | os.PathLike[str] | list[str] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    codec: str = DEFAULT_CODEC,
    memory_budget: str | int = "1GiB",
    workers: int | None = None,
    scheduler: str | None = None,
    slurm_workers: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    obs: list[str] | None = None,
    keep_layers: Sequence[str] = (),
    values: str = "counts",
    progress: bool = True,
    limit_cells: int | None = None,
) -> CellStore | None:
    """Convert one or several `.h5ad` to a store.

    Parameters
    ----------
    inputs : path or paths (local, or URLs that fsspec opens)
    output : path of the store, `*.zarr`, or a URL
    layer, raw : take `layers[layer]` or `.raw.X` in place of `X`
    join : of several inputs' genes, "inner" or "outer"
    genes : keep only these, in this order; a list, or a file with one a line
    shuffle : permute all cells of all inputs; `obs["sedd_cell"]` keeps where each was
    seed : of the permutation
    codec : one of `sedd.io.format.shards.CODECS`
    memory_budget : of all workers together, "1GiB" or bytes
    workers : threads, by default one per core
    scheduler : address of a Dask scheduler whose workers see the same files
    slurm_workers : have SLURM start this many Dask workers of one core; needs dask-jobqueue
    resume : go on with an unfinished conversion
    overwrite : replace a store, or an unfinished conversion
    dry_run : print what would be done, and return None
    obs : columns of `obs` to keep, all by default
    keep_layers : layers to keep beside X, as counts if that is what they hold
    values : "counts", or "real" for float32 of any sign
    progress : show a bar
    limit_cells : take only the first so many cells

    Returns
    -------
    store : the open store

    Raises
    ------
    UserError
        For bad input, in one line; nothing is left behind.
    """
    budget = parse_bytes(memory_budget)
    if budget < LEAST_BUDGET:
        raise UserError(f"memory_budget is {memory_budget}; a conversion needs at least {LEAST_BUDGET >> 20}MiB.")
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    target = str(output).rstrip("/")
    job = Job(
        [str(path) for path in paths],
        remote.staging(target) if remote.is_remote(target) else target,
        layer=layer,
        raw=raw,
        join=join,
        genes=genes,
        shuffle=shuffle,
        seed=seed,
        codec=codec,
        budget=budget,
        workers=workers,
        scheduler=scheduler,
        slurm_workers=slurm_workers,
        obs=obs,
        keep_layers=keep_layers,
        values=values,
        progress=progress,
        limit_cells=limit_cells,
    )
    if dry_run:
        print(job.forecast())
        return None
    if not remote.is_remote(target):
        return job.run(resume=resume, overwrite=overwrite)
    remote.check_free(target, overwrite)
    job.run(resume=resume, overwrite=True)
    remote.upload(job.output, target)
    from sedd.io.store import CellStore

    return CellStore(target)


def ensure_store(
    path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    layer: str | None = None,
    values: str = "counts",
    progress: bool = True,
) -> CellStore:
    """Open a store, converting an `.h5ad` once and using the result while the file stays as it is.

    Several processes may call this at once: one converts, the others wait for it.

    Parameters
    ----------
    path : a `.zarr` store, opened as it is, or an `.h5ad`
    cache_dir : where the store is put, by default beside the file
    layer, values : as in `convert`
    progress : show a bar while converting
    """
    from sedd.io.store import CellStore

    path = str(path).rstrip("/")
    if path.endswith(".zarr") or os.path.isdir(path):
        return CellStore(path)
    folder = str(cache_dir) if cache_dir is not None else os.path.dirname(path) or "."
    name = os.path.basename(path).removesuffix(".h5ad")
    output = os.path.join(folder, name + (f".{layer}" if layer else "") + (".real" if values == "real" else "") + ".zarr")
    job = Job([path], output, layer=layer, values=values, progress=progress)
    if os.path.exists(output):
        try:
            store = CellStore(output)
        except UserError as error:
            raise UserError(f"{output}: is in the way of the store of {path}. Pass --cache_dir to put that elsewhere.") from error
        if job.made(store):
            return store
    os.makedirs(folder, exist_ok=True)
    return job.run(resume=True, overwrite=True, wait=True)
