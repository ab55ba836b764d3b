"""Peers of the loader, each run by `benchmarks/loader.py` in an interpreter that has it: prints one JSON line.

PEER_PYTHON benchmarks/loader_peers.py annbatch atlas.h5ad scratch --batches 64,512,4096 --seconds 3
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

N_BINS = 100


def dense_tokens(x: Any) -> np.ndarray:
    """What a user of a peer writes to get tokens: digitise the non-zeros, then make them dense."""
    out = np.zeros(x.shape, np.uint8)
    binned = np.digitize(x.data, np.arange(1, N_BINS)).astype(np.uint8)
    out[np.repeat(np.arange(x.shape[0]), np.diff(x.indptr)), x.indices] = binned
    return out


def masked_tokens(x: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same, with a mask drawn per gene at a rate of its own per cell."""
    return dense_tokens(x), rng.random(x.shape, np.float32) < rng.random((x.shape[0], 1), np.float32)


def annbatch_batches(store: Path, batch: int) -> Iterator[Any]:
    """Sparse batches of annbatch in chunks of 512 x 16, the fastest of the shapes its documentation names."""
    import zarr
    import zarrs  # noqa: F401, registers the pipeline that annbatch recommends
    from annbatch import DatasetCollection, Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    while True:
        loader = Loader(batch_size=batch, chunk_size=512, preload_nchunks=16, shuffle=True, preload_to_gpu=False)
        loader.use_collection(DatasetCollection(store))
        for item in loader:
            yield item["X"]


def annbatch_convert(h5ad: Path, store: Path) -> None:
    """Pre-shuffle the h5ad into annbatch's collection."""
    from annbatch import DatasetCollection

    DatasetCollection(store).add_adatas([str(h5ad)])


def scdataset_batches(h5ad: Path, batch: int) -> Iterator[Any]:
    """Sparse batches of scDataset: blocks of 16 cells, a buffer of 16,384."""
    import anndata as ad
    from scdataset import BlockShuffling, scDataset

    backed = ad.read_h5ad(h5ad, backed="r")
    factor = max(1, 16_384 // batch)
    while True:
        dataset = scDataset(backed.X, BlockShuffling(block_size=16), batch_size=batch, fetch_factor=factor)
        yield from dataset


def rate(batches: Iterator[Any], use: Callable[[Any], Any], seconds: float) -> dict[str, float]:
    """Cells per second, by the clock and by the processor time of all threads, after a first stretch to warm up."""
    stop = time.perf_counter() + seconds / 2
    while time.perf_counter() < stop:
        use(next(batches))
    cells, began, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        x = next(batches)
        use(x)
        cells += x.shape[0]
    return {"wall": cells / (time.perf_counter() - began), "per_cpu_second": cells / (time.process_time() - cpu)}


def main() -> None:
    """Measure one peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["annbatch", "scdataset"])
    parser.add_argument("h5ad", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--batches", default="512")
    parser.add_argument("--seconds", type=float, default=3)
    args = parser.parse_args()
    source = args.h5ad
    if args.peer == "annbatch":
        source = args.scratch / f"{args.h5ad.stem}.annbatch.zarr"
        if not source.exists():
            annbatch_convert(args.h5ad, source)
    make = annbatch_batches if args.peer == "annbatch" else scdataset_batches
    rng = np.random.default_rng(0)
    forms: dict[str, Callable[[Any], Any]] = {
        "csr": lambda x: x,
        "tokens": dense_tokens,
        "masked": lambda x: masked_tokens(x, rng),
        "float32": lambda x: x.toarray().astype(np.float32, copy=False),
    }
    result: dict[str, Any] = {"version": version(args.peer)}
    for batch in map(int, args.batches.split(",")):
        for name, use in forms.items():
            result[f"{name}/{batch}"] = rate(make(source, batch), use, args.seconds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
