"""The same cells in every format that is read, each written by the library that the format is of, or as its makers describe it."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mmwrite

TYPES = ["Gene Expression", "Antibody Capture"]


def cells(matrix: sparse.csr_matrix) -> ad.AnnData:
    """Cells with symbols for names of genes, and identifiers beside them."""
    n_obs, n_vars = matrix.shape
    obs = pd.DataFrame({"batch": np.array(["x", "y"])[np.arange(n_obs) % 2]}, index=[f"cell{i}" for i in range(n_obs)])
    var = pd.DataFrame({"gene_ids": [f"ENSG{i:011d}.{i % 9}" for i in range(n_vars)]}, index=[f"gene{i}" for i in range(n_vars)])
    return ad.AnnData(matrix.astype(np.float32), obs=obs, var=var)


def h5ad(path: Path, adata: ad.AnnData) -> str:
    adata.write_h5ad(path.with_suffix(".h5ad"))
    return str(path.with_suffix(".h5ad"))


def zarr_2(path: Path, adata: ad.AnnData) -> str:
    return _zarr(path, adata, 2)


def zarr_3(path: Path, adata: ad.AnnData) -> str:
    return _zarr(path, adata, 3)


def _zarr(path: Path, adata: ad.AnnData, version: int) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what zarr and anndata say of their own format
        with ad.settings.override(zarr_write_format=version, auto_shard_zarr_v3=False):
            adata.write_zarr(path.with_suffix(".zarr"))
    return str(path.with_suffix(".zarr"))


def tenx_3(path: Path, adata: ad.AnnData) -> str:
    """As Cell Ranger 3 and later: `matrix` with `features`."""
    name = str(path.with_suffix(".h5"))
    with h5py.File(name, "w") as file:
        group = file.create_group("matrix")
        _tenx_matrix(group, adata)
        features = group.create_group("features")
        features["id"], features["name"] = _bytes(adata.var["gene_ids"]), _bytes(adata.var_names)
        features["feature_type"] = _bytes(adata.var.get("feature_types", [TYPES[0]] * adata.n_vars))
        features["genome"] = _bytes(["GRCh38"] * adata.n_vars)
        features["_all_tag_keys"] = _bytes(["genome"])
    return name


def tenx_2(path: Path, adata: ad.AnnData) -> str:
    """As Cell Ranger 2: a group for each genome."""
    name = str(path.with_suffix(".h5"))
    with h5py.File(name, "w") as file:
        group = file.create_group("GRCh38")
        _tenx_matrix(group, adata)
        group["genes"], group["gene_names"] = _bytes(adata.var["gene_ids"]), _bytes(adata.var_names)
    return name


def _tenx_matrix(group: h5py.Group, adata: ad.AnnData) -> None:
    own = sparse.csc_matrix(adata.X.T)  # genes x cells, as they have it
    group["data"], group["indices"], group["indptr"] = own.data.astype(np.int32), own.indices.astype(np.int64), own.indptr.astype(np.int64)
    group["shape"] = np.array(own.shape, np.int32)
    group["barcodes"] = _bytes(adata.obs_names)


def _bytes(values: object) -> np.ndarray:
    return np.array([str(value).encode() for value in values])  # type: ignore[attr-defined]


def mtx_3(path: Path, adata: ad.AnnData) -> str:
    """A folder of Cell Ranger 3 and later."""
    path.mkdir()
    types = adata.var.get("feature_types", [TYPES[0]] * adata.n_vars)
    lines = [f"{own}\t{name}\t{kind}" for own, name, kind in zip(adata.var["gene_ids"], adata.var_names, types, strict=True)]
    mmwrite(path / "matrix.mtx", sparse.coo_matrix(adata.X.T.astype(np.int64)))
    _zip(path / "matrix.mtx", (path / "matrix.mtx").read_text())
    (path / "matrix.mtx").unlink()
    _zip(path / "features.tsv", "\n".join(lines) + "\n")
    _zip(path / "barcodes.tsv", "\n".join(adata.obs_names) + "\n")
    return str(path)


def mtx_2(path: Path, adata: ad.AnnData) -> str:
    """A folder of Cell Ranger 2, with the prefix that GEO gives to files."""
    path.mkdir()
    mmwrite(path / "GSM1_matrix.mtx", sparse.coo_matrix(adata.X.T.astype(np.int64)))
    lines = [f"{own}\t{name}" for own, name in zip(adata.var["gene_ids"], adata.var_names, strict=True)]
    (path / "GSM1_genes.tsv").write_text("\n".join(lines) + "\n")
    (path / "GSM1_barcodes.tsv").write_text("\n".join(adata.obs_names) + "\n")
    return str(path / "GSM1_matrix.mtx")


def _zip(path: Path, text: str) -> None:
    with gzip.open(f"{path}.gz", "wt") as file:
        file.write(text)


def h5mu(path: Path, adata: ad.AnnData) -> str:
    """MuData with one modality."""
    name = str(path.with_suffix(".h5mu"))
    with h5py.File(name, "w") as file:
        file.attrs["encoding-type"] = "MuData"
        modalities = file.create_group("mod")
        ad.io.write_elem(modalities, "rna", adata)
        ad.io.write_elem(file, "obs", adata.obs)
        ad.io.write_elem(file, "var", adata.var)
    return name


def loom(path: Path, adata: ad.AnnData) -> str:
    """Dense genes x cells in square chunks, as loompy writes it."""
    name = str(path.with_suffix(".loom"))
    dense = adata.X.toarray()
    with h5py.File(name, "w") as file:
        file.create_dataset("matrix", data=dense.T, chunks=(min(16, dense.shape[1]), min(16, dense.shape[0])), compression="gzip")
        file.create_group("layers")["spliced"] = dense.T
        rows, columns = file.create_group("row_attrs"), file.create_group("col_attrs")
        rows["Gene"], rows["gene_ids"] = _bytes(adata.var_names), _bytes(adata.var["gene_ids"])
        columns["CellID"], columns["batch"] = _bytes(adata.obs_names), _bytes(adata.obs["batch"])
    return name


Writer = Callable[[Path, ad.AnnData], str]

WRITERS: dict[str, Writer] = {
    "h5ad": h5ad, "zarr v2": zarr_2, "zarr v3": zarr_3, "10x v3": tenx_3, "10x v2": tenx_2, "mtx v3": mtx_3, "mtx v2": mtx_2,
    "h5mu": h5mu, "loom": loom,
}  # fmt: skip
