"""The last steps of a conversion: bring parts to one type, join them into shards, write tables and statistics."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from scipy import sparse

from sedd.io import pack, stats
from sedd.io.parts import load_plan, part_path, save_arrays
from sedd.io.shards import CHUNK, SHARD, Encoder, create_vector, n_shards, shard_length, write_shard

ROWS = 1 << 20
"""Rows of a table column in one chunk: few files."""


def widen_part(folder: str, number: int, dtype: str) -> None:
    """Encode the values of a part again in a wider type, which another part turned out to need."""
    plan = load_plan(folder)
    stem = part_path(folder, number)
    with np.load(f"{stem}.npz") as meta:
        arrays = dict(meta)
    if arrays["data_edges"].dtype == np.dtype(dtype):
        return
    old, new = Encoder(arrays["data_edges"].dtype, plan.settings["codec"]), Encoder(np.dtype(dtype), plan.settings["codec"])
    sizes = []
    with open(f"{stem}.data", "rb") as source, open(f"{stem}.wide", "wb") as target:
        for size in arrays["data_sizes"]:
            encoded = new.encode(old.decode(source.read(int(size))))
            sizes.append(len(encoded))
            target.write(encoded)
    os.replace(f"{stem}.wide", f"{stem}.data-{np.dtype(dtype).name}")
    arrays["data_edges"] = arrays["data_edges"].astype(dtype)
    arrays["data_sizes"] = np.array(sizes, np.int64)
    save_arrays(f"{stem}.npz", **arrays)


def build_shard(folder: str, name: str, number: int, target: str, n: int) -> None:
    """Join the encoded chunks of all parts of shard `number` of `X/name` into one file."""
    if os.path.exists(target):
        return
    write_shard(target, _chunks(folder, name, number, n), shard_length(n) // CHUNK)


def _chunks(folder: str, name: str, number: int, n: int) -> Iterator[bytes]:
    """Encoded chunks of one shard in order; those that several parts share are put together here."""
    plan = load_plan(folder)
    begin, end = number * SHARD, min(n, (number + 1) * SHARD)
    waiting: list[np.ndarray] = []
    n_waiting = 0
    for part in range(plan.n_parts):
        stem = part_path(folder, part)
        with np.load(f"{stem}.npz") as meta:
            first, length = int(meta["first"]), int(meta["n"])
            if first >= end or first + length <= begin:
                continue
            head, tail = int(meta["head"]), int(meta["tail"])
            edges, sizes = meta[f"{name}_edges"], meta[f"{name}_sizes"]
        encoder = Encoder(edges.dtype, plan.settings["codec"])
        wide = f"{stem}.{name}-{edges.dtype.name}"
        # The fragment in front of the part's whole chunks, unless it belongs to the shard before.
        for piece, at in ((edges[:head], first), (None, first + head), (edges[head:], first + tail)):
            if piece is None:
                with open(wide if os.path.exists(wide) else f"{stem}.{name}", "rb") as file:
                    for chunk, size in enumerate(sizes):
                        encoded = file.read(int(size))
                        if begin <= at + chunk * CHUNK < end:
                            yield encoded
                continue
            while piece.size:
                room = CHUNK - at % CHUNK
                now, piece, here = piece[:room], piece[room:], at
                at += now.size
                if not begin <= here < end:
                    continue
                waiting.append(now)
                n_waiting += now.size
                if at % CHUNK == 0 or at == n:
                    yield encoder.encode(np.concatenate(waiting))
                    waiting, n_waiting = [], 0


class Gathered:
    """Statistics of all parts put together."""

    def __init__(self, folder: str) -> None:
        plan = load_plan(folder)
        self.n = 0
        self.rounded = 0
        self.dtype = np.dtype(np.uint8)
        columns: dict[str, list[np.ndarray]] = {"row_nnz": [], "total": [], "largest": [], "hashes": []}
        keys, numbers = np.empty(0, np.int64), np.empty(0, np.int64)
        real: np.ndarray | None = None
        for part in range(plan.n_parts):
            with np.load(f"{part_path(folder, part)}.npz") as meta:
                for key, column in columns.items():
                    column.append(meta[key])
                self.n += int(meta["n"])
                self.rounded += int(meta["rounded"])
                self.dtype = max(self.dtype, meta["data_edges"].dtype, key=lambda dtype: dtype.itemsize)
                if plan.settings["values"] == "real":
                    own = meta["gene_real"]
                    real = own if real is None else np.concatenate([real[:3] + own[:3], np.maximum(real[3:], own[3:])])
                else:
                    keys, numbers = stats.merge_keys([(keys, numbers), (meta["keys"], meta["numbers"])])
        self.row_nnz, self.total, self.largest, self.hashes = (np.concatenate(c) for c in columns.values())
        self.max = self.largest.max().item() if self.largest.size else 0
        self.histogram: sparse.csr_array | None = None
        if real is None:
            nonzero = stats.from_keys(keys, numbers, plan.n_vars, int(self.max))
            self.histogram = stats.with_zeros(nonzero, self.row_nnz.size)
            counts = np.arange(self.histogram.shape[1], dtype=np.int64)
            largest = np.zeros(plan.n_vars, np.int64)
            np.maximum.at(largest, keys >> 32, keys & 0xFFFFFFFF)
            real = np.stack([
                self.histogram @ counts, self.histogram @ counts**2, np.asarray(nonzero.sum(axis=1)).reshape(-1), largest
            ])  # fmt: skip
        else:
            real[3] = np.where(real[2] < self.row_nnz.size, np.maximum(real[3], 0), real[3])
        self.genes = dict(zip(("sum", "sum_sq", "nnz", "max"), real, strict=True))
        self.genes["nnz"] = self.genes["nnz"].astype(np.int64)

    def content(self) -> str:
        """A hash of the matrix: of every cell's entries, in order."""
        return hashlib.blake2b(self.hashes.tobytes(), digest_size=16).hexdigest()


def write_tables(group: zarr.Group, cells: ad.AnnData, var: pd.DataFrame, uns: dict[str, Any]) -> None:
    """Write everything of an AnnData store but X."""
    write_element(group, "obs", cells.obs)
    write_element(group, "var", var)
    write_element(group, "obsm", dict(cells.obsm))
    for name in ("layers", "obsp", "varm", "varp"):
        write_element(group, name, {})
    write_element(group, "uns", uns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that consolidated metadata are an extension of Zarr v3; anndata writes them too
        zarr.consolidate_metadata(group.store, zarr_format=3)


def write_element(group: zarr.Group, key: str, element: Any) -> None:
    """Write one AnnData element with its arrays in few chunks."""
    with ad.settings.override(auto_shard_zarr_v3=False):
        ad.experimental.write_dispatched(group, key, element, callback=_few_chunks)


def _few_chunks(func: Any, group: Any, key: str, element: Any, dataset_kwargs: Any, iospec: Any) -> None:
    shape = getattr(element, "shape", ())
    if iospec.encoding_type in ("array", "string-array") and len(shape) and 0 not in shape:
        dataset_kwargs = {**dataset_kwargs, "chunks": (min(ROWS, shape[0]), *shape[1:])}
    func(group, key, element, dataset_kwargs=dataset_kwargs)


def create_matrix(group: zarr.Group, gathered: Gathered, n_vars: int, codec: str) -> dict[str, int]:
    """Write the metadata of X; the number of entries of each array."""
    n_obs = gathered.row_nnz.size
    matrix = group.create_group("X")
    matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_obs, n_vars]})
    create_vector(matrix, "indptr", n_obs + 1, np.dtype(np.int64), codec)
    create_vector(matrix, "indices", gathered.n, pack.index_dtype(n_vars), codec)
    create_vector(matrix, "data", gathered.n, gathered.dtype, codec)
    return {"indptr": n_obs + 1, "indices": gathered.n, "data": gathered.n}


def write_indptr(root: str, row_nnz: np.ndarray, codec: str) -> None:
    """Write the shards of `X/indptr`."""
    indptr = np.concatenate([[0], np.cumsum(row_nnz, dtype=np.int64)])
    encoder = Encoder(indptr.dtype, codec)
    os.makedirs(f"{root}/X/indptr/c", exist_ok=True)
    for number in range(n_shards(indptr.size)):
        own = indptr[number * SHARD : (number + 1) * SHARD]
        chunks = (encoder.encode(own[k : k + CHUNK]) for k in range(0, own.size, CHUNK))
        write_shard(f"{root}/X/indptr/c/{number}", chunks, shard_length(indptr.size) // CHUNK)
