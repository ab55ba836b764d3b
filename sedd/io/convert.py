r"""Files of counts to a store, on threads or a Dask cluster, in bounded memory, never half-written.

    inputs ------------------------> make_shard --> shards --check, rename--> OUTPUT.zarr
       \--spill_span--> spill --/

Here are the functions to call. The steps are in `conversion/job.py`, the tasks in `conversion/shard.py` and `conversion/spill.py`.
Everything unfinished is in `OUTPUT.zarr.partial`, from which `resume` continues. What is slow to import is imported when it is needed:
for tables and metadata, while the tasks run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from sedd.config import ConversionSettings, InputSettings
from sedd.errors import UserError, without_secrets
from sedd.io import remote
from sedd.io.input.opening import is_zarr, without_slash
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
    append: bool = False,
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
    append : add the cells to a store that is there, by its genes and settings; the shards that are full stay as they are
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

    Examples
    --------
    >>> store = sedd.convert(["lung.h5ad", "liver.h5ad"], "both.zarr", keys=["lung", "liver"], shuffle=True)  # doctest: +SKIP
    """
    from sedd.io.conversion.job import Job

    paths = [without_slash(path) for path in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
    target = str(output).rstrip("/")
    if not target.endswith(".zarr"):
        raise UserError(f"{target}: the output is a Zarr store; expected a name that ends in .zarr. Name the output last, after all inputs.")
    if append:
        return _append(paths, target, resume, overwrite, dry_run, progress, settings)
    job = Job(
        paths,
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


def _append(
    paths: list[str], output: str, resume: bool, overwrite: bool, dry_run: bool, progress: bool, settings: dict[str, Any]
) -> CellStore | None:
    from sedd.io.conversion.append import Append

    if overwrite:
        raise UserError("--append keeps the store that --overwrite would replace; leave one of them out.")
    if remote.is_remote(output):
        raise UserError(
            f"{output}: cannot be appended to there, as object storage cannot put a store in the place of another in one step. Copy "
            "it to a disk, append to the copy and upload that."
        )
    (asked,) = grouped(settings, ConversionSettings)
    work = Append(paths, output, asked, progress=progress)
    if dry_run:
        print(work.forecast())
        return None
    return work.run(resume=resume)


@keywords_of(InputSettings)
def ensure_store(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    values: Literal["counts", "real"] = "counts",
    progress: bool = True,
    **settings: Any,
) -> CellStore:
    """Open a store, converting inputs once and using the result until they change.

    Several processes may call this at once: one converts, the others wait for it. The store of `mine.h5ad` is `mine.sedd.zarr`, a
    name of its own, and only what was made of the same input is ever replaced there.

    Parameters
    ----------
    path : a store that sedd made, which is opened directly, or one or several inputs as in `convert`
    cache_dir : where the store is put, by default beside the first input
    values : as in `convert`
    progress : show a bar while converting
    **settings : fields of `sedd.config.InputSettings`, which says what each means

    Raises
    ------
    UserError
        As `convert`, if something else is at the place of the store, or if a store was made with other settings.
    """
    from sedd.io.conversion.job import Job
    from sedd.io.store import CellStore

    paths = [without_slash(one) for one in ([path] if isinstance(path, str | os.PathLike) else path)]
    (own,) = grouped(settings, InputSettings)
    if len(paths) == 1 and is_store(paths[0]):
        store = CellStore(paths[0])
        _check_made_with(store, own)
        return store
    if remote.is_remote(paths[0]) and cache_dir is None:
        raise UserError(f"{paths[0]}: is converted once into a store on this machine; pass --cache_dir to say where, or convert it yourself.")
    folder = str(cache_dir) if cache_dir is not None else os.path.dirname(os.path.abspath(paths[0]))
    output = os.path.join(folder, _automatic_name(paths, own, values))
    if os.path.isdir(folder) and not os.access(folder, os.W_OK) and not os.path.lexists(output):
        raise UserError(
            f"{folder}: may not be written, and {' '.join(paths)} is converted once into a store there; pass --cache_dir to put that store "
            "elsewhere."
        )
    job = Job(paths, output, ConversionSettings(**settings, values=values), progress=progress)
    if os.path.lexists(output):
        in_the_way = (
            f"{output}: is in the way of the store of {' '.join(paths)}. Move it, or pass --cache_dir to put that store elsewhere."
        )
        try:
            store = CellStore(output)
        except UserError as error:
            raise UserError(in_the_way) from error
        if job.made(store):
            return store
        if os.path.islink(output) or [one["path"] for one in store.uns_sedd["inputs"]] != [one["path"] for one in job.records()]:
            raise UserError(in_the_way)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: no directory can be made there ({error.strerror}); pass another --cache_dir.") from error
    return job.run(resume=True, overwrite=True, wait=True)


def is_store(path: str) -> bool:
    """Whether a path is that of a store, rather than of an input; one that is not there is what its name says."""
    if not remote.is_remote(path) and is_zarr(path):
        return os.path.exists(f"{path}/uns/sedd/meta/zarr.json")
    return path.endswith(".zarr")


def _automatic_name(paths: list[str], own: InputSettings, values: str) -> str:
    """Return the name of the store of inputs, of which each choice of settings has its own."""
    first = os.path.basename(without_secrets(paths[0]) if remote.is_remote(paths[0]) else os.path.abspath(paths[0])).removesuffix(".h5ad")
    parts = [first if len(paths) == 1 else f"{first}+{len(paths) - 1}"]
    parts += [quote(name, safe=" ") for name in (own.modality, own.layer) if name]
    parts += ["raw"] * own.raw + ["real"] * (values == "real")
    chosen = {
        field.name: value
        for field in dataclasses.fields(own)
        if field.name not in ("layer", "raw", "modality") and (value := getattr(own, field.name)) != field.default
    }
    if len(paths) > 1:
        chosen["paths"] = [path if remote.is_remote(path) else os.path.abspath(path) for path in paths]
    if chosen:
        parts.append(hashlib.blake2b(json.dumps(chosen, sort_keys=True).encode(), digest_size=4).hexdigest())
    return ".".join([*parts, "sedd", "zarr"])


def _check_made_with(store: CellStore, own: InputSettings) -> None:
    """Refuse settings of inputs for a store that was made with others: its matrix is what it is."""
    made_with = {**ConversionSettings().of_the_store(), **store.uns_sedd["settings"]}
    for field in dataclasses.fields(own):
        value = getattr(own, field.name)
        if field.name == "layer" and value == "X":  # which the matrix of a store is, whatever it was made of
            continue
        plain = list(value) if isinstance(value, tuple) else value
        if value != field.default and plain != made_with[field.name]:
            words = " ".join(value) if isinstance(value, tuple) else "" if value is True else str(value)
            raise UserError(
                f"{store.path}: is a store, made without `{f'--{field.name} {words}'.strip()}`, and holds one matrix. Leave that out, or convert the "
                "input again with it."
            )
