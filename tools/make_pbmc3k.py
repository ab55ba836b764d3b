"""Rebuild `data/pbmc3k.h5ad` from the wheel of the PyPI package `desc==2.1.1`.

    pip download desc==2.1.1 --no-deps
    python tools/make_pbmc3k.py desc-2.1.1-py3-none-any.whl data/pbmc3k.h5ad

The wheel holds the 2,700 x 32,738 UMI counts of 10x Genomics' PBMC 3k in a file of anndata 0.6 with float32 values and
32-bit indices, uncompressed (20 MB). Here the same numbers are stored as integers, in today's layout, with the HDF5
shuffle filter in front of gzip. `data/README.md` tells the source and the licence.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

MEMBER = "desc/datasets/pbmc.h5ad"


def read_wheel(wheel: Path) -> ad.AnnData:
    """Read the counts of the wheel; integer, with indices sorted."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            path = archive.extract(MEMBER, folder)
        with h5py.File(path, "r") as h5:
            group = h5["X"]
            shape = tuple(int(n) for n in group.attrs["h5sparse_shape"])
            counts = sparse.csr_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape=shape)
            obs, var = h5["obs"][:], h5["var"][:]
    counts.sort_indices()
    integers = counts.astype(np.int32)
    if (integers != counts).nnz:
        raise SystemExit(f"{wheel}: {MEMBER} holds non-integer values; expected the raw counts of desc 2.1.1.")
    cells = pd.Index(obs["index"].astype(str), name="barcode")
    genes = pd.DataFrame({"gene_ids": var["gene_ids"].astype(str)}, index=pd.Index(var["index"].astype(str)))
    return ad.AnnData(integers, obs=pd.DataFrame(index=cells), var=genes)


def main(wheel: str, output: str) -> None:
    """Write the file; `anndata.read_h5ad` reads it like any other."""
    adata = read_wheel(Path(wheel))
    with h5py.File(output, "w") as h5:
        ad.io.write_elem(
            h5, "/", adata, dataset_kwargs={"compression": "gzip", "compression_opts": 9, "shuffle": True}
        )
    print(f"{output}: {adata.n_obs} cells x {adata.n_vars} genes, {Path(output).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
