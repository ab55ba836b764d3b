"""Outputs: one writer at a time, complete or not there, and never in the place of what is not theirs.

Everything unfinished of OUTPUT is in the folder OUTPUT.partial, which belongs to whoever holds its lock (`only_writer`). The holder finds there
no more than what an earlier process left, puts right what that one was killed at, and may delete the rest.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from sedd.errors import UserError
from sedd.io.locks import HeldFile, NoFlockError, flock

LOCK = "lock"
"""Name of the file in OUTPUT.partial that is locked; where it is not, the folder is not ours."""

_ASIDE = "replaced"

_OURS = {LOCK, "plan.json", "task.json"}
"""Files by which a folder of an unfinished output is known: the two plans are older than the rule that the lock stays beside them."""

_PART = re.compile(r"\..*\.[^.]*-\d+-[0-9a-f]{8}\.part$")


def partial_folder(output: str | os.PathLike[str]) -> str:
    """Where everything unfinished of an output is."""
    return f"{os.fspath(output)}.partial"


@contextmanager
def only_writer(output: str | os.PathLike[str], *, wait: bool) -> Iterator[str]:
    """Hold the right to write `output`, until the end or the death of this process.

    An output that was moved aside by a process that died before its own was in place is put back, and files that a dead process
    left half-written in the folder are removed.

    Parameters
    ----------
    output : the file or folder
    wait : wait until another writer is done; otherwise another writer is an error

    Yields
    ------
    folder : `partial_folder(output)`, made when missing; removed at the end if nothing else is in it

    Raises
    ------
    UserError
        If another process is writing the output, or the folder is another's or cannot be made.
    """
    output = os.fspath(output)
    folder = partial_folder(output)
    check_folder(output)
    with _locked(f"{folder}/{LOCK}", output, wait=wait):
        _put_back(output)
        remove_parts(folder)
        yield folder


@contextmanager
def only_writer_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the right to write into a folder that is there and stays, such as that of a run; half-written files of dead processes are removed.

    Raises
    ------
    UserError
        If another process is writing there.
    """
    folder = os.fspath(folder)
    with _locked(f"{folder}/.{LOCK}", folder, wait=False):
        remove_parts(folder)
        yield


@contextmanager
def _locked(path: str, output: str, *, wait: bool) -> Iterator[None]:
    folder, held = os.path.dirname(path), None
    while True:
        fd = -1
        try:
            os.makedirs(folder, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            owner = None if flock(fd, wait=wait) else ""
        except FileNotFoundError:  # the holder before us removed the folder just now
            continue
        except NoFlockError:
            held = HeldFile(f"{path}.held")
            try:
                owner = held.take(wait=wait)
            except FileNotFoundError:
                os.close(fd)
                continue
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise UserError(f"{output}: cannot be {'locked' if fd >= 0 else 'written'} ({error.strerror}).") from error
        if owner is not None:
            os.close(fd)
            who = f" ({' process '.join(owner.split())})" if owner else ""
            raise UserError(
                f"{output}: another process is writing it{who}. Wait for it, or choose another name; if the machine of that process is "
                f"gone, delete {held.path if held else path}."
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                break
        # Removed by the holder before us: lock the one that is there now.
        if held is not None:
            held.release()
        os.close(fd)
    try:
        yield
    finally:
        with suppress(OSError):
            if {os.path.basename(path), f"{os.path.basename(path)}.held"}.issuperset(
                os.listdir(folder)
            ) or path.endswith(f"/.{LOCK}"):
                os.unlink(path)  # else it says whose the folder is
        if held is not None:
            held.release()
        with suppress(OSError):
            os.rmdir(folder)
        os.close(fd)


def check_folder(output: str) -> None:
    """Refuse a folder of an unfinished output that is not ours: what is in it would be deleted.

    Raises
    ------
    UserError
        If it is another's.
    """
    folder = partial_folder(output)
    if not os.path.lexists(folder):
        return
    if os.path.islink(folder) or not os.path.isdir(folder):
        found = "a link" if os.path.islink(folder) else "a file"
    else:
        names = sorted(os.listdir(folder))
        if not names or _OURS.intersection(names):
            return
        found = f"a folder with {', '.join(names[:3])}, which sedd did not make"
    raise UserError(
        f"{folder}: is {found}; what is unfinished of {output} would be there. Move it, or choose another output."
    )


def clear(folder: str) -> None:
    """Remove all but the lock, and an old output that is to be put back; for the lock's holder."""
    for name in os.listdir(folder):
        path = f"{folder}/{name}"
        if name in (LOCK, _ASIDE) or name.startswith(f"{LOCK}.held"):
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def remove_parts(folder: str) -> None:
    """Remove what dead processes left half-written in a folder (`sedd.io.files.new_file`); for the holder of its lock."""
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if _PART.match(name):
                with suppress(FileNotFoundError):
                    os.unlink(f"{folder}/{name}")


def check_replaceable(path: str | os.PathLike[str], kind: Literal["file", "store"]) -> None:
    """Refuse to replace what is no output of this kind: a slip of the hand must not cost anybody their files.

    Parameters
    ----------
    path : where something may be
    kind : what is to be written: a file, or a Zarr store

    Raises
    ------
    UserError
        If a link, or anything but a file or a Zarr store (or an empty folder), is there.
    """
    path = os.fspath(path)
    if os.path.islink(path):
        raise UserError(
            f"{path}: is a link to {os.readlink(path)}, so it is not replaced. Name that as the output, or choose another."
        )
    if not os.path.lexists(path):
        return
    if kind == "file":
        if not os.path.isfile(path):
            raise UserError(f"{path}: is not a file, so it is not replaced. Choose another output.")
    elif not os.path.isdir(path) or (
        os.listdir(path) and not any(os.path.exists(f"{path}/{name}") for name in ("zarr.json", ".zgroup"))
    ):
        raise UserError(f"{path}: is not a Zarr store, so it is not replaced. Choose another output.")


def move_into_place(made: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Move a complete file or folder to its name, over what is there; for the holder of `only_writer(path)`.

    Where a file system cannot exchange two folders in one step, the old one is moved aside first. Of a process that dies before the
    new one is in place, the next holder puts the old one back.
    """
    aside = _aside(path)
    if os.path.isdir(path):
        if exchange(os.fspath(made), os.fspath(path)):
            shutil.rmtree(made, ignore_errors=True)
            return
        os.rename(path, aside)
    try:
        os.replace(made, path)
    except BaseException:
        _put_back(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def exchange(one: str, other: str) -> bool:
    """Exchange two names in one step; whether that could be done, which Linux and most of its file systems can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and not rename(here, os.fsencode(one), here, os.fsencode(other), both)


def _aside(path: str | os.PathLike[str]) -> str:
    return f"{partial_folder(path)}/{_ASIDE}"


def _put_back(path: str | os.PathLike[str]) -> None:
    aside = _aside(path)
    if not os.path.isdir(aside):
        return
    if os.path.lexists(path):  # replaced by then
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(aside, path)
