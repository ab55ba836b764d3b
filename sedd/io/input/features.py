"""Inputs of 10x: an `.h5` of Cell Ranger, or the folder with `matrix.mtx`, `features.tsv` and `barcodes.tsv`.

Both hold genes x cells by cells, which is CSR of cells x genes. Names of genes are their symbols, as in scanpy; identifiers are in the
column `gene_ids`.
"""

from __future__ import annotations

import gzip
import os
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sedd.errors import SeveralPartsError, UserError
from sedd.io.files import fingerprint
from sedd.io.input.base import Input, Naming
from sedd.io.input.faults import reading
from sedd.io.input.matrix import Matrix
from sedd.io.input.slices import is_array

if TYPE_CHECKING:
    import pandas as pd

EXPRESSION = "Gene Expression"
"""The features that are taken where there are several types of them and none is asked for."""


class _OfFeatures(Input):
    """Cells by features, of which those of one type are taken."""

    def __init__(self, path: str, naming: Naming, modality: str | None) -> None:
        super().__init__(path, naming)
        self._modality = modality

    @property
    @abstractmethod
    def _cells(self) -> pd.DataFrame:
        """The cells' table; read once."""

    @property
    @abstractmethod
    def _features(self) -> pd.DataFrame:
        """The table of features of all types; read once."""

    def _obs(self, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        return self._cells.drop(columns=[name for name in self._cells if f"obs/{name}" in drop])

    def _var(self, raw: bool = False, drop: tuple[str, ...] = ()) -> pd.DataFrame:
        return self._features.drop(columns=[name for name in self._features if f"var/{name}" in drop])

    @property
    def modalities(self) -> list[str]:
        """Types of the features, of which one is taken."""
        return self.types if len(self.types) > 1 else []

    @property
    def types(self) -> list[str]:
        """Types of the features."""
        found: list[str] = self._features["feature_types"].unique().tolist() if "feature_types" in self._features else []
        return found

    def kept_genes(self, raw: bool = False) -> np.ndarray | None:
        """Which features are of the type that is taken; None for all."""
        wanted = self._modality
        if wanted is None and len(self.types) > 1 and EXPRESSION in self.types:
            wanted = EXPRESSION
        if wanted is None or self.types == [wanted]:
            return None
        return (self._features["feature_types"] == wanted).to_numpy()

    def _check_modality(self) -> None:
        if self._modality is not None and self._modality not in self.types:
            there = ", ".join(map(repr, self.types)) or "none"
            raise UserError(f"{self.path}: has no features of type {self._modality!r} (--modality); its types are: {there}.")

    def _no_layers(self, layer: str | None, raw: bool) -> None:
        if layer is not None or raw:
            raise self._no_matrix("raw" if raw else f"layer {layer!r}")


class TenXFile(_OfFeatures):
    """An `.h5` of Cell Ranger, version 2 or 3.

    Parameters
    ----------
    root : the open file
    modality : the genome to take of a file of version 2, the type of features of one of version 3
    close : called when it is let go
    """

    kind = "10x .h5"

    def __init__(
        self, path: str, root: Any, naming: Naming, modality: str | None, close: Callable[[], None], *, remote: bool = False
    ) -> None:
        self._root, self._close, self._remote = root, close, remote
        if "matrix" in root:
            self._group, self._name = root["matrix"], "matrix"
            super().__init__(path, naming, modality)
            self._check_modality()
            return
        genomes = [name for name in root if is_genome(root[name])]
        if modality is None and len(genomes) > 1:
            raise SeveralPartsError(f"{path}: holds the genomes {', '.join(genomes)}; choose one with --modality.", genomes)
        if modality is not None and modality not in genomes:
            raise UserError(f"{path}: has no genome {modality!r} (--modality); it has: {', '.join(genomes)}.")
        self._name = modality or genomes[0]
        self._group = root[self._name]
        super().__init__(path, naming, None)

    def close(self) -> None:
        """Close the file."""
        self._close()

    def _matrix(self, layer: str | None, raw: bool) -> Matrix:
        self._no_layers(layer, raw)
        with reading(self.path, self._name):
            n_vars, n_obs = (int(n) for n in self._group["shape"][:])
            return Matrix(self.path, self._group, self._name, remote=self._remote, layout="csr", shape=(n_obs, n_vars))

    @cached_property
    def _cells(self) -> pd.DataFrame:
        import pandas as pd

        with reading(self.path, f"{self._name}/barcodes"):
            return pd.DataFrame(index=pd.Index(_texts(self._group["barcodes"]), dtype=object))

    @cached_property
    def _features(self) -> pd.DataFrame:
        import pandas as pd

        with reading(self.path, f"{self._name}/features"):
            if "features" not in self._group:
                names, ids = (_texts(self._group[key]) for key in ("gene_names", "genes"))
                return pd.DataFrame({"gene_ids": ids}, index=pd.Index(names, dtype=object))
            features = self._group["features"]
            names = _texts(features["name"])
            columns = {"gene_ids": _texts(features["id"])}
            for key, name in (("feature_type", "feature_types"), ("genome", "genome"), ("interval", "interval")):
                if key in features and features[key].shape == (len(names),):
                    columns[name] = _texts(features[key])
            return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def is_genome(node: Any) -> bool:
    """Whether a group is a matrix as Cell Ranger 2 wrote one for each genome."""
    return not is_array(node) and all(key in node for key in ("data", "indices", "indptr", "shape", "barcodes", "gene_names"))


class MtxFolder(_OfFeatures):
    """A folder with `matrix.mtx`, `features.tsv` (or `genes.tsv`) and `barcodes.tsv`, each with or without `.gz`.

    The matrix is read whole, by scipy.

    Parameters
    ----------
    path : of the folder, or of a matrix `PREFIXmatrix.mtx` whose tables have the same prefix
    """

    kind = "matrix.mtx folder"

    def __init__(self, path: str, naming: Naming, modality: str | None) -> None:
        self._files = parts_of(path)
        super().__init__(path, naming, modality)
        self._check_modality()

    def _matrix(self, layer: str | None, raw: bool) -> Matrix:
        self._no_layers(layer, raw)
        name = os.path.basename(self._files["matrix"])
        n_obs, n_vars = len(self._cells), len(self._features)
        arrays = _read_mtx(self._files["matrix"], fingerprint(self._files["matrix"]))
        if arrays["shape"] != (n_obs, n_vars):
            raise UserError(
                f"{self.path}: {name} is {arrays['shape'][1]} x {arrays['shape'][0]}, but "
                f"{os.path.basename(self._files['features'])} has {n_vars} rows and {os.path.basename(self._files['barcodes'])} {n_obs}; "
                "expected genes x cells."
            )
        return Matrix(self.path, arrays, name, layout="csr", shape=(n_obs, n_vars))

    @cached_property
    def _cells(self) -> pd.DataFrame:
        import pandas as pd

        rows = _read_table(self._files["barcodes"])
        return pd.DataFrame(index=pd.Index([row[0] for row in rows], dtype=object))

    @cached_property
    def _features(self) -> pd.DataFrame:
        import pandas as pd

        rows = _read_table(self._files["features"])
        width = min(map(len, rows), default=0)
        names = [row[1 if width > 1 else 0] for row in rows]
        columns = {name: [row[at] for row in rows] for at, name in ((0, "gene_ids"), (2, "feature_types")) if width > max(at, 1)}
        return pd.DataFrame(columns, index=pd.Index(names, dtype=object))


def parts_of(path: str) -> dict[str, str]:
    """Return the files of a 10x folder: "matrix", "features" and "barcodes".

    Raises
    ------
    UserError
        If one is not there, or if there are several matrices to choose from.
    """
    folder, name = (path, "") if os.path.isdir(path) else os.path.split(path)
    matrices = [name] if name else sorted(own for own in os.listdir(folder) if own.endswith(("matrix.mtx", "matrix.mtx.gz")))
    if not matrices:
        raise UserError(f"{path}: has no matrix.mtx or matrix.mtx.gz.")
    if len(matrices) > 1:
        plain = matrices[0].removesuffix(".gz")
        if matrices != [plain, f"{plain}.gz"]:
            raise UserError(f"{path}: holds several matrices ({', '.join(matrices[:4])}); give the path of one of them.")
    matrix = matrices[0]
    prefix = matrix.removesuffix(".gz").removesuffix(".mtx")
    prefix = prefix.removesuffix("matrix") if prefix.endswith("matrix") else ""
    found = {"matrix": os.path.join(folder, matrix)}
    for key, stems in (("features", ("features.tsv", "genes.tsv")), ("barcodes", ("barcodes.tsv",))):
        names = [f"{prefix}{stem}{end}" for stem in stems for end in ("", ".gz")]
        there = [own for own in names if os.path.isfile(os.path.join(folder, own))]
        if not there:
            raise UserError(f"{path}: has {matrix} but none of {', '.join(names)} beside it.")
        found[key] = os.path.join(folder, there[0])
    return found


@lru_cache(maxsize=1)
def _read_mtx(path: str, _: str) -> dict[str, Any]:
    """Return CSR arrays of cells x genes and their shape; kept for the next call while the file is the same."""
    from scipy.io import mmread
    from scipy.sparse import csr_array

    with reading(path, "the matrix", "Is it in the Matrix Market format?"):
        matrix = csr_array(mmread(path, spmatrix=False).T)
    return {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": matrix.shape}


def close_matrices() -> None:
    """Let go of the matrix that is held in memory."""
    _read_mtx.cache_clear()


def _read_table(path: str) -> list[list[str]]:
    """Return the fields of each line of a tab-separated file."""
    opener = gzip.open if path.endswith(".gz") else open
    with reading(path, "the table"), opener(path, "rt", encoding="utf-8-sig", newline=None) as file:
        return [line.rstrip("\r\n").split("\t") for line in file if line.strip()]


def _texts(node: Any) -> list[str]:
    return [text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in node[:]]
