"""What is said when an input cannot be read: the cause where it is known, and no guess where it is not."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from sedd.errors import DamagedFileError, UserError, not_permitted

READ_ERRORS = (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, EOFError, MemoryError, OverflowError, zlib.error)
"""What h5py, zarr, zlib and anndata raise when an element is damaged or of a kind that they do not know, and Python for a size that is infinite."""

_DAMAGE = ("truncated", "addr overflow", "signature", "bad ", "checksum", "inflate", "filter returned failure", "corrupt", "unable to read",
           "can't read", "decompress", "wrong ", "incorrect", "ran off end", "out of range", "end of file")  # fmt: skip
"""What HDF5 and decompressors say of bytes that are not what was written."""

_STARTS = {
    b"\x1f\x8b": ("compressed with gzip", "Unpack it with gunzip"),
    b"PK\x03\x04": ("a zip archive", "Unpack it with unzip"),
    b"BZh": ("compressed with bzip2", "Unpack it with bunzip2"),
    b"\xfd7zXZ": ("compressed with xz", "Unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "Unpack it with unzstd"),
}
"""First bytes of files -> what they are, and what to do."""

_OTHERS = {
    ".rds": "R", ".rdata": "R", ".rda": "R", ".qs": "R", ".h5seurat": "SeuratDisk", ".csv": "text", ".tsv": "text", ".txt": "text",
    ".npz": "NumPy", ".npy": "NumPy", ".pkl": "Python", ".pickle": "Python", ".parquet": "Parquet", ".xlsx": "Excel", ".csv.gz": "text", ".tsv.gz": "text", ".txt.gz": "text",
}  # fmt: skip
"""Endings of files that hold cells, but are not read here -> whose they are."""

READ = ".h5ad, an AnnData .zarr, .h5mu, a 10x .h5, a folder with matrix.mtx or .loom"
"""The formats that are read, as messages list them."""


@contextmanager
def reading(path: str, what: str, way_out: str = "") -> Iterator[None]:
    """Turn whatever is raised while `what` is read into one line that names the file and the place.

    Parameters
    ----------
    way_out : what the user may do where nothing says that the file is damaged
    """
    try:
        yield
    except UserError:
        raise
    except READ_ERRORS as error:
        detail = " ".join(str(error).split())[:200]
        damaged = _is_damage(error)
        end = "The file is damaged or incomplete: copy or write it again." if damaged else way_out
        raise (DamagedFileError if damaged else UserError)(f"{path}: cannot read {what} ({detail or type(error).__name__}). {end}".rstrip()) from error


def _is_damage(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, EOFError | zlib.error) or (isinstance(error, OSError | RuntimeError | LookupError) and any(word in text for word in _DAMAGE))


def why_not_hdf5(path: str, error: OSError, *, remote: bool) -> str:
    """Return the message for a file that HDF5 does not open."""
    text = str(error)
    if "unable to lock file" in text:
        if any(f"errno = {number}" in text for number in (11, 13, 35)):
            return f"{path}: is locked, as another program has it open for writing. Close it there and try again."
        return f"{path}: cannot be locked, as this file system has no locks. Set HDF5_USE_FILE_LOCKING=FALSE to read it without."
    if isinstance(error, PermissionError):
        return str(not_permitted(path))
    if "already open" in text and "write" in text:
        return f"{path}: is open for writing in this program. Close it first."
    if remote:
        return f"{path}: is not an HDF5 file, as an .h5ad is. Expected {READ}."
    if "truncated file" in text:
        return f"{path}: the file is cut short ({os.path.getsize(path)} bytes are there). Copy it again."
    with open(path, "rb") as file:
        start = file.read(8)
    if not start:
        return f"{path}: is empty (0 bytes). Copy or write it again."
    whose = owner(path)
    if whose is not None:
        way_out = _way_out_of_text(path) if whose == "text" else "Write it as .h5ad with the program that made it"
        return f"{path}: is a file of {whose}, which is not read. {way_out}; expected {READ}."
    for bytes_, (what, way_out) in _STARTS.items():
        if start.startswith(bytes_):
            return f"{path}: is {what}, so it cannot be read by rows. {way_out}, and pass what is in it."
    if start == b"\x89HDF\r\n\x1a\n":
        return f"{path}: is HDF5, but cannot be opened ({' '.join(text.split())[:200]})."
    return f"{path}: is not an .h5ad: it is no HDF5 file. Expected {READ}."


def _way_out_of_text(path: str) -> str:
    name = os.path.basename(path)
    between = "" if ".csv" in name.lower() else ', sep="\\t"'
    return (
        f'In Python anndata.AnnData(pandas.read_csv("{name}"{between}, index_col=0)).write_h5ad("{name.split(".")[0]}.h5ad") makes one '
        "of a table of cells by genes, with .T after read_csv(...) of genes by cells"
    )


def owner(path: str) -> str | None:
    """Return whose format a file has by its name, if it is one that people keep cells in and that is not read."""
    name = os.path.basename(path).lower()
    return next((whose for ending, whose in _OTHERS.items() if name.endswith(ending)), None)
