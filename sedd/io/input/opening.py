"""Open an input of any format that is read; say what a file is that is not."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import h5py

from sedd.errors import MissingFileError, NoSuchPartError, SeveralPartsError, UserError, WrongFileError, check_permitted
from sedd.io.files import fingerprint, tree_fingerprint
from sedd.io.format.lacking import Lacking
from sedd.io.format.plain import read_element
from sedd.io.format.untrusted import check_hdf5, check_zarr
from sedd.io.input.anndata_file import AnnDataFile
from sedd.io.input.base import Input, Naming
from sedd.io.input.faults import READ, READ_ERRORS, owner, reading, why_not_hdf5
from sedd.io.input.features import MtxFolder, TenXFile, is_genome, parts_of
from sedd.io.input.loom import LoomFile
from sedd.io.input.slices import is_array
from sedd.io.remote import filesystem, is_remote

_ENDINGS = (".h5ad", ".h5mu", ".h5", ".loom", ".mtx", ".h5ad.gz", ".mtx.gz", ".zip", ".npz")
"""Of files that are said to be inputs even where they are not."""

_ZARR = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")


def open_input(
    path: str | os.PathLike[str], *, modality: str | None = None, gene_names: str | None = None, strip_version: bool = False
) -> Input:
    """Open an input.

    Parameters
    ----------
    path : of a file or folder, or a URL that fsspec opens (`s3://bucket/file.h5ad`)
    modality : of an `.h5mu`; of a 10x file the type of features, or the genome
    gene_names : column of `var` that holds the names of genes; its index if None
    strip_version : take the versions off identifiers of genes

    Raises
    ------
    UserError
        If there is no such file, it cannot be read, or it holds no matrix of cells and genes.
    """
    path = without_slash(path)
    naming = Naming(gene_names, strip_version)
    check_permitted(path)
    if is_zarr(path):
        return _of_anndata(path, _open_zarr(path), naming, modality, _nothing, "zarr")
    if not is_remote(path):
        if not os.path.exists(path):
            unfinished = f" There is {path}.partial: its conversion did not finish." if os.path.isdir(f"{path}.partial") else ""
            raise MissingFileError(f"{path}: {_why_not_there(path)}.{unfinished}")
        if os.path.isdir(path):
            if not any(name.endswith(("matrix.mtx", "matrix.mtx.gz")) for name in os.listdir(path)):
                raise WrongFileError(f"{path}: is a directory with neither a Zarr store nor a matrix.mtx in it. Expected {READ}.")
            return MtxFolder(path, naming, modality)
        if path.endswith((".mtx", ".mtx.gz")):
            return MtxFolder(path, naming, modality)
    return _open_hdf5(path, naming, modality)


def opened_as(path: str, settings: Mapping[str, Any]) -> Input:
    """Open an input by the settings of a conversion; those of stores of before there were formats lack some."""
    return open_input(
        path,
        modality=settings.get("modality"),
        gene_names=settings.get("gene_names"),
        strip_version=bool(settings.get("strip_version")),
    )


@contextlib.contextmanager
def one_of(paths: Sequence[str]) -> Iterator[None]:
    """Say of an input that lacks what is chosen for all `paths`, or that needs a choice, that others need not be read like it."""
    try:
        yield
    except (NoSuchPartError, SeveralPartsError) as error:
        if len(paths) > 1:
            error.args = (f"{error} One choice holds for all inputs: where they differ, convert each alone and give the stores that are made.",)
        raise


def is_zarr(path: str) -> bool:
    """Whether a path is that of a Zarr store, by its files, or by its name if it is a URL."""
    if is_remote(path):
        return path.endswith(".zarr")
    return os.path.isdir(path) and any(os.path.isfile(f"{path}/{name}") for name in _ZARR)


def is_input(path: str) -> bool:
    """Whether a local path is that of an input rather than of a checkpoint, by its name, first bytes or files, whether or not it can be read."""
    path = without_slash(path)
    check_permitted(path)
    if os.path.isdir(path):
        return is_zarr(path) or any(name.endswith(("matrix.mtx", "matrix.mtx.gz")) for name in os.listdir(path))
    with open(path, "rb") as file:
        start = file.read(8)
    return path.endswith(_ENDINGS) or not (path.endswith(".pt") or start.startswith(b"PK"))


def without_slash(path: str | os.PathLike[str]) -> str:
    """Return a path without slashes at its end, which shells put there and which a file cannot be opened with."""
    return os.fspath(path).rstrip("/") or os.fspath(path)


def _why_not_there(path: str) -> str:
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)}, which is not there"
    return "there is no such file" + ("; give the path in full, as ~ stands for a home in shells only" if path.startswith("~") else "")


def _nothing() -> None:
    pass


def _open_zarr(path: str) -> Any:
    import zarr  # slow to import

    try:
        group = zarr.open_group(path, mode="r")
        check_zarr(path, group)
        return group
    except UserError:
        raise
    except Exception as error:  # zarr, fsspec and their backends raise many kinds
        raise UserError(f"{path}: cannot be opened as a Zarr store ({' '.join(str(error).split())[:200]}).") from error


def _open_hdf5(path: str, naming: Naming, modality: str | None) -> Input:
    remote = _open_remote(path) if is_remote(path) else None
    try:
        root = h5py.File(remote or path, "r")
    except OSError as error:
        raise UserError(why_not_hdf5(path, error, remote=remote is not None)) from error

    def close() -> None:
        root.close()
        if remote is not None:
            remote.close()

    try:
        with reading(path, "its table of contents"):
            check_hdf5(path, root)
            return _of_hdf5(path, root, naming, modality, close, remote is not None)
    except BaseException:
        close()
        raise


def _of_hdf5(
    path: str, root: h5py.File, naming: Naming, modality: str | None, close: Callable[[], None], remote: bool
) -> Input:
    found = list(root)
    if "row_attrs" in found and "col_attrs" in found and is_array(root.get("matrix")):
        if modality is not None:
            raise _no_modalities(path, ".loom", modality)
        return LoomFile(path, root, naming, close, remote=remote)
    if ("matrix" in found and not is_array(root["matrix"]) and "barcodes" in root["matrix"]) or any(
        is_genome(root[name]) for name in found if not is_array(root[name])
    ):
        return TenXFile(path, root, naming, modality, close, remote=remote)
    if {"X", "layers", "obs", "raw", "mod"} & set(found):
        return _of_anndata(path, root, naming, modality, close, "h5", remote)
    whose = owner(path)
    hint = f" It is a file of {whose}: write it as .h5ad there." if whose is not None else ""
    raise WrongFileError(
        f"{path}: is HDF5 but not an h5ad or another format that is read (found {', '.join(found[:8]) or 'nothing'}; "
        f"expected {READ}).{hint}"
    )


def _of_anndata(
    path: str, root: Any, naming: Naming, modality: str | None, close: Callable[[], None], suffix: str, remote: bool = False
) -> Input:
    """Return AnnData at the top of a file or store, or in a modality of MuData."""
    kind = "AnnData .zarr" if suffix == "zarr" else ".h5ad"
    modalities = _modalities(path, root)
    if modalities is not None:
        listed = ", ".join(modalities) or "none"
        if modality is None and len(modalities) == 1:
            modality = modalities[0]
        if modality is None:
            raise SeveralPartsError(
                f"{path}: is MuData (.h5mu) with the modalities {listed}; choose one with --modality NAME.", modalities
            )
        if modality not in modalities:
            raise NoSuchPartError(f"{path}: has no modality {modality!r} (--modality); it has: {listed}.")
        with reading(path, f"modality {modality!r}"):
            node = root["mod"][modality]
        if is_array(node):
            raise UserError(f"{path}: modality {modality!r} is an array; expected AnnData there. Copy or write it again.")
        return AnnDataFile(path, node, naming, close, remote=remote, kind=f"modality {modality!r} of MuData")
    if modality is not None:
        raise _no_modalities(path, kind, modality)
    if suffix == "zarr" and not any(name in root for name in ("X", "layers", "obs", "raw")):
        raise WrongFileError(
            f"{path}: is a Zarr store but not AnnData (found {', '.join(list(root)[:8]) or 'nothing'}; expected X, obs and var)."
        )
    return AnnDataFile(path, root, naming, close, remote=remote or is_remote(path), kind=kind)


def _modalities(path: str, root: Any) -> list[str] | None:
    """Names of the modalities of MuData; None of anything else."""
    try:
        node = root.get("mod")
        if node is None or is_array(node) or "X" in root:
            return None
        return list(node)
    except READ_ERRORS as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}).") from error


def _no_modalities(path: str, kind: str, modality: str) -> UserError:
    return NoSuchPartError(f"{path}: is {kind}, which has no modalities; leave --modality {modality} out.")


def _open_remote(path: str) -> Any:
    fs, name = filesystem(path)
    try:
        return fs.open(name, "rb", block_size=8 << 20)
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: there is no such file.") from error
    except Exception as error:  # every storage service raises errors of its own
        raise UserError(f"{path}: cannot be opened ({' '.join(str(error).split())[:200]}).") from error


def input_fingerprint(path: str) -> str:
    """Identity of an input, of whatever files it consists."""
    path = without_slash(path)
    if is_zarr(path):
        return tree_fingerprint(path)
    if not is_remote(path) and (os.path.isdir(path) or path.endswith((".mtx", ".mtx.gz"))):
        text = " ".join(fingerprint(part) for part in parts_of(path).values())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return fingerprint(path)


def lacking_of(file: Input) -> Lacking | None:
    """Return which genes the files lack that this one, or the store that it was, was made of; None if none, or if nothing can be read of it."""
    root = getattr(file, "root", None)
    if root is None or "uns/sedd/lacking" not in root:
        return None
    with contextlib.suppress(*READ_ERRORS):
        return Lacking.read(read_element(root["uns/sedd/lacking"]))
    return None
