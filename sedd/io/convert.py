r"""Files of counts to a store, on threads or a Dask cluster, in bounded memory, never half-written.

    inputs ------------------------> make_shard --> shards --check, rename--> OUTPUT.zarr
       \--spill_span--> spill --/

Here are the functions to call. The steps are in `conversion/job.py`, the tasks in `conversion/shard.py` and `conversion/spill.py`.
Everything unfinished is in `OUTPUT.zarr.partial`, from which `resume` continues. What is slow to import is imported when it is needed:
for tables and metadata, while the tasks run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from sedd.config import ConversionSettings
from sedd.errors import UserError
from sedd.io import remote
from sedd.options import grouped, keywords_of

if TYPE_CHECKING:
    from sedd.io.store import CellStore


@keywords_of(ConversionSettings)
def convert(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    **settings: Any,
) -> CellStore | None:
    """Convert one or several inputs to a store.

    Parameters
    ----------
    inputs : path or paths (local, or URLs that fsspec opens) of an `.h5ad`, an AnnData `.zarr`, an `.h5mu`, a `.loom`, a 10x `.h5` or a folder
        with `matrix.mtx`
    output : path of the store, `*.zarr`, or a URL
    resume : continue an unfinished conversion
    overwrite : replace a store, or an unfinished conversion
    dry_run : print what would be done, and return None
    progress : show a bar
    **settings : fields of `sedd.config.ConversionSettings`, which says what each means

    Returns
    -------
    store : the open store

    Raises
    ------
    UserError
        For bad input, in one line; nothing is left behind.
    """
    from sedd.io.conversion.job import Job

    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    target = str(output).rstrip("/")
    if not target.endswith(".zarr"):
        raise UserError(f"{target}: the output is a Zarr store; expected a name that ends in .zarr. Name the output last, after all inputs.")
    job = Job(
        [str(path) for path in paths],
        remote.staging(target) if remote.is_remote(target) else target,
        *grouped(settings, ConversionSettings),
        progress=progress,
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
    values: Literal["counts", "real"] = "counts",
    progress: bool = True,
) -> CellStore:
    """Open a store, converting an `.h5ad` once and using the result until the file changes.

    Several processes may call this at once: one converts, the others wait for it. The store of `mine.h5ad` is `mine.sedd.zarr`, a
    name of its own, and only what was made of the same file is ever replaced there.

    Parameters
    ----------
    path : a `.zarr` store, which is opened directly, or an `.h5ad`
    cache_dir : where the store is put, by default beside the file
    layer, values : as in `convert`
    progress : show a bar while converting

    Raises
    ------
    UserError
        As `convert`, or if something else is at the place of the store.
    """
    from sedd.io.conversion.job import Job
    from sedd.io.store import CellStore

    path = str(path).rstrip("/")
    if path.endswith(".zarr") or os.path.isdir(path):
        return CellStore(path)
    if remote.is_remote(path) and cache_dir is None:
        raise UserError(f"{path}: is converted once into a store on this machine; pass --cache_dir to say where, or convert it yourself.")
    folder = str(cache_dir) if cache_dir is not None else os.path.dirname(path) or "."
    parts = [os.path.basename(path).removesuffix(".h5ad"), quote(layer, safe=" ") if layer else "", "real" if values == "real" else ""]
    output = os.path.join(folder, ".".join([*filter(None, parts), "sedd", "zarr"]))
    job = Job([path], output, ConversionSettings(layer=layer, values=values), progress=progress)
    if os.path.lexists(output):
        in_the_way = f"{output}: is in the way of the store of {path}. Move it, or pass --cache_dir to put that store elsewhere."
        try:
            store = CellStore(output)
        except UserError as error:
            raise UserError(in_the_way) from error
        if job.made(store):
            return store
        if os.path.islink(output) or [one["path"] for one in store.uns_sedd["inputs"]] != [one["path"] for one in job.records()]:
            raise UserError(in_the_way)
    os.makedirs(folder, exist_ok=True)
    return job.run(resume=True, overwrite=True, wait=True)
