"""Whether the result of a task may be written where it is to be: said before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import anndata as ad

from sedd.errors import ExistsError, UserError
from sedd.io.input.opening import without_slash
from sedd.io.outputs import check_folder, check_replaceable, partial_folder
from sedd.processes import is_main


def check_output(output: str | Path | None, *, overwrite: bool, resume: bool = False, data: Any = None) -> None:
    """Refuse an output before any work is done; None is memory.

    Parameters
    ----------
    output
        An .h5ad or .zarr.
    overwrite, resume
        Whether an output, or an unfinished one, may be replaced, or the latter completed.
    data
        What the output is made from.

    Raises
    ------
    UserError
        If its name does not end so, if it exists or is unfinished and neither `overwrite` nor `resume` allows that, if it is no such output, or if
        its directory cannot be written.
    """
    if output is None:
        if resume:
            raise UserError("resume completes an unfinished output; give its name as output.")
        return
    if resume and isinstance(data, ad.AnnData):
        raise UserError("resume needs the cells in a file, to know that they are the same as before; give a path.")
    target, unfinished = Path(output), Path(partial_folder(output))
    if target.suffix not in (".h5ad", ".zarr"):
        raise UserError(f"{output}: a result is an .h5ad file or a .zarr store; expected a name that ends so.")
    if not is_main():  # the main process may be at work on it already
        return
    origin = data.filename if isinstance(data, ad.AnnData) else None if data is None else without_slash(data)  # None of one in memory
    if origin is not None and os.path.exists(origin) and target.exists() and os.path.samefile(origin, target):
        raise UserError(f"{output}: is the data itself, which is not replaced by a result; choose another output.")
    check_free(target, "store" if target.suffix == ".zarr" else "file", overwrite=overwrite)
    check_folder(str(output))
    if unfinished.exists() and not (overwrite or resume) and (unfinished / "task.json").exists():
        raise UserError(
            f"{unfinished}: holds an unfinished output; pass --resume to complete it or --overwrite to start again."
        )
    check_writable(target)


def check_report(directory: str | Path | None, names: Iterable[str], *, overwrite: bool) -> None:
    """Refuse a directory in which files of these names would replace others; None is memory.

    Raises
    ------
    UserError
        If one is there and may not be replaced, or the directory is none that can be written.
    """
    if directory is None:
        return
    folder = Path(directory)
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: is not a directory; expected one for {', '.join(names)}.")
    for name in names:
        check_free(folder / name, "file", overwrite=overwrite)
        check_writable(folder / name)


def check_free(target: Path, kind: Literal["file", "store"], *, overwrite: bool) -> None:
    """Refuse a place that is taken, unless what is there may be replaced and is of this kind.

    Raises
    ------
    UserError
        If it is taken.
    """
    if overwrite:
        check_replaceable(target, kind)
    elif os.path.lexists(target):
        raise ExistsError(f"{target}: exists already; pass --overwrite to replace it, or another name.")


def check_writable(target: Path) -> None:
    """Refuse a place in a directory that cannot be written, or made.

    Raises
    ------
    UserError
        If it cannot.
    """
    parent = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{target}: {parent} is not a directory that can be written; choose another output.")
