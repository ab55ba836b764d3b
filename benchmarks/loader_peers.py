"""Peers of the loader, each run by `benchmarks/loader.py` in an interpreter that has it: prints one JSON line.

PEER_PYTHON benchmarks/loader_peers.py annbatch atlas.h5ad scratch --batches 64,512,4096 --seconds 3
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flags import Flags

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


SHAPES = {"32x256": (32, 256), "64x128": (64, 128), "512x16": (512, 16)}
"""Cells in a chunk, and chunks loaded ahead, that annbatch's documentation names."""


def annbatch_batches(store: Path, batch: int, shape: str) -> Iterator[Any]:
    """Sparse batches of annbatch."""
    import zarr
    import zarrs  # noqa: F401, registers the pipeline that annbatch recommends
    from annbatch import DatasetCollection, Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    chunk, ahead = SHAPES[shape]
    while True:
        loader = Loader(batch_size=batch, chunk_size=chunk, preload_nchunks=ahead, shuffle=True, preload_to_gpu=False)
        loader.use_collection(DatasetCollection(store))
        for item in loader:
            yield item["X"]


def annbatch_convert(h5ad: Path, store: Path) -> None:
    """Pre-shuffle the h5ad into annbatch's collection."""
    from annbatch import DatasetCollection

    DatasetCollection(store).add_adatas([str(h5ad)])


def scdataset_batches(h5ad: Path, batch: int, _: str) -> Iterator[Any]:
    """Sparse batches of scDataset: blocks of 16 cells, a buffer of 16,384."""
    import anndata as ad
    from scdataset import BlockShuffling, scDataset

    backed = ad.read_h5ad(h5ad, backed="r")
    factor = max(1, 16_384 // batch)
    while True:
        yield from scDataset(
            backed,
            BlockShuffling(block_size=16),
            batch_size=batch,
            fetch_factor=factor,
            fetch_callback=lambda file, cells: file.X[cells],
        )


def scdl_batches(folder: Path, batch: int, _: str) -> Iterator[Any]:
    """Sparse batches of bionemo-scdl, in truly random order."""
    import scipy.sparse as sp
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
    from torch.utils.data import DataLoader

    cells = SingleCellMemMapDataset(str(folder))
    while True:
        for x in DataLoader(cells, batch_size=batch, shuffle=True, collate_fn=collate_sparse_matrix_batch):
            parts = (x.values().numpy(), x.col_indices().numpy(), x.crow_indices().numpy())
            yield sp.csr_matrix(parts, shape=tuple(x.shape))


def scdl_convert(h5ad: Path, folder: Path) -> None:
    """Write the memory maps of bionemo-scdl."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    SingleCellMemMapDataset(str(folder), h5ad_path=str(h5ad), use_X_not_raw=True)


def soma_batches(folder: Path, batch: int, _: str) -> Iterator[Any]:
    """Sparse batches of tiledbsoma-ml, shuffled as it does by default."""
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

    with tiledbsoma.Experiment.open(str(folder)) as experiment, experiment.axis_query("RNA") as query:
        while True:
            cells = ExperimentDataset(
                query, layer_name="data", obs_column_names=["cell_type"], batch_size=batch, shuffle=True, return_sparse_X=True
            )
            for x, _ in experiment_dataloader(cells):
                yield x


def soma_convert(h5ad: Path, folder: Path) -> None:
    """Write a SOMA experiment."""
    import tiledbsoma.io

    tiledbsoma.io.from_h5ad(str(folder), str(h5ad), measurement_name="RNA")


PEERS: dict[str, tuple[Any, Any, str, int]] = {
    "annbatch": (annbatch_batches, annbatch_convert, "annbatch", 8_192),
    "scdataset": (scdataset_batches, None, "scdataset", 16_384),
    "scdl": (scdl_batches, scdl_convert, "bionemo-scdl", 0),
    "soma": (soma_batches, soma_convert, "tiledbsoma-ml", 65_536),
}
"""Name -> batches, conversion (None: it reads the h5ad), package, cells of its buffer."""


def annbatch_entropy(store: Path, batch: int) -> Iterator[Any]:
    """Labels of annbatch's batches."""
    import annbatch
    import zarr

    loader = annbatch.Loader(batch_size=batch, chunk_size=32, preload_nchunks=256, shuffle=True, preload_to_gpu=False)
    loader.use_collection(annbatch.DatasetCollection(zarr.open_group(store, mode="r")))
    for item in loader:
        yield item["obs"]["cell_type"].to_numpy()


def scdataset_entropy(h5ad: Path, batch: int) -> Iterator[Any]:
    """Labels of scDataset's batches."""
    import anndata as ad
    from scdataset import BlockShuffling, scDataset

    labels = ad.read_h5ad(h5ad, backed="r").obs["cell_type"].to_numpy()
    for cells in scDataset(np.arange(labels.size), BlockShuffling(block_size=16), batch_size=batch, fetch_factor=256):
        yield labels[cells]


def mean_entropy(batches: Iterator[Any], size: int, n_batches: int) -> float:
    """Mean label entropy in bits of the first whole batches."""
    values = []
    for labels in itertools.islice((one for one in batches if len(one) == size), n_batches):
        share = np.unique(labels, return_counts=True)[1] / size
        values.append(-(share * np.log2(share)).sum())
    return float(np.mean(values))


def rate(sizes: Iterator[int], seconds: float, buffer: int = 0) -> dict[str, float]:
    """Cells per second, by the clock and by the processor time of all threads, after as long a stretch to warm up.

    Parameters
    ----------
    sizes : of batches, each of which is made when it is asked for
    buffer : cells that are read at once now and then; the rate is that over whole buffers
    """

    def take() -> tuple[int, float, float]:
        cells, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() < began + seconds or cells < buffer:
            cells += next(sizes)
        return cells, time.perf_counter() - began, time.process_time() - cpu

    if buffer <= SLOW:
        take()
    cells, wall, cpu = take()
    return {"wall": cells / wall, "per_cpu_second": cells / cpu}


SLOW = 1 << 15
"""Cells of the largest buffer that is filled once to warm up: larger ones take most of a minute."""

ENTROPY: dict[str, Any] = {"annbatch": annbatch_entropy, "scdataset": scdataset_entropy}
"""Peers whose order can be looked at without reading cells."""


def main() -> None:
    """Measure one peer."""
    parser = Flags(__doc__)
    parser.add_argument("peer", help="which loader", choices=list(PEERS))
    parser.add_argument("h5ad", type=Path)
    parser.add_argument("scratch", help="folder for what the peer makes of the file", type=Path)
    parser.add_argument("--batches", default="512")
    parser.add_argument("--forms", help="forms of the batches, with commas between them", default="csr,tokens,masked,float32")
    parser.add_argument("--seconds", type=float, default=3)
    args = parser.parse_args()
    make, convert, package, buffer = PEERS[args.peer]
    source = args.h5ad
    if convert is not None:
        source = args.scratch / f"{args.h5ad.stem}.{args.peer}"
        if args.peer == "annbatch":
            source = source.with_suffix(".annbatch.zarr")
        if not source.exists():
            convert(args.h5ad, source)
    rng = np.random.default_rng(0)
    forms: dict[str, Callable[[Any], Any]] = {
        "tokens": dense_tokens,
        "masked": lambda x: masked_tokens(x, rng),
        "float32": lambda x: x.toarray().astype(np.float32, copy=False),
    }
    result: dict[str, Any] = {"version": version(package)}
    if args.peer in ENTROPY:
        result["label_entropy_bits"] = mean_entropy(ENTROPY[args.peer](source, 64), 64, 400)

    def used(batches: Iterator[Any], use: Callable[[Any], Any]) -> Iterator[int]:
        for x in batches:
            use(x)
            yield x.shape[0]

    for batch in map(int, args.batches.split(",")):
        shapes = list(SHAPES) if args.peer == "annbatch" else [""]
        rates = {shape: rate(used(make(source, batch, shape), id), args.seconds, buffer) for shape in shapes}
        best = max(shapes, key=lambda shape: rates[shape]["wall"])
        for shape in shapes if len(shapes) > 1 else []:
            result[f"csr/{batch} {shape}"] = rates[shape]
        result[f"csr/{batch}"] = rates[best]
        for name, use in forms.items():  # in the shape that was the fastest just now
            if name in args.forms.split(","):
                result[f"{name}/{batch}"] = rate(used(make(source, batch, best), use), args.seconds, buffer)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
