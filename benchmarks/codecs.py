"""What each codec costs: bytes a cell, and cells a second to encode and decode, on one core.

    python benchmarks/codecs.py atlas.h5ad data/pbmc3k.h5ad

Inner chunks as in a store (16,384 values): counts in uint8 or uint16 and gene indices in uint16, measured apart, because they need not
have the same filter. Besides the codecs that a store may have, it measures gap-coding the indices first: smaller, but Zarr v3 knows it only as an extension that warns
whoever opens the store, so it is not offered. Results go to `benchmarks/results/codecs.json`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numcodecs
import numpy as np
from common import machine, write_result
from flags import Flags

from sedd.io.conversion import counts as pack
from sedd.io.format.codec import keep_freed_memory
from sedd.io.format.shards import CHUNK
from sedd.io.input.opening import open_input

CANDIDATES = {
    "none": None,
    "lz4": ("lz4", 5, numcodecs.Blosc.SHUFFLE),
    "lz4 bits": ("lz4", 5, numcodecs.Blosc.BITSHUFFLE),
    "lz4hc": ("lz4hc", 5, numcodecs.Blosc.SHUFFLE),
    "zstd 1": ("zstd", 1, numcodecs.Blosc.SHUFFLE),
    "zstd 3": ("zstd", 3, numcodecs.Blosc.SHUFFLE),
    "zstd 1 bits": ("zstd", 1, numcodecs.Blosc.BITSHUFFLE),
    "zstd 9": ("zstd", 9, numcodecs.Blosc.SHUFFLE),
}


def sample(path: str, n_values: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Counts and indices of the first cells of a CSR h5ad, in the types of a store, and how many cells."""
    with open_input(path) as file:
        matrix = file.matrix()
        lo, hi = matrix.spans(n_values)[0]
        _, indices, raw = matrix.read_major(lo, hi)
        counts = pack.to_counts(raw, np.dtype(np.uint8))
        return counts.values, indices.astype(pack.index_dtype(matrix.shape[1])), hi - lo


def measure(array: np.ndarray, setting: tuple[str, int, int] | None, n_cells: int, rounds: int) -> dict[str, float]:
    """Bytes a cell, and cells a second to encode and decode (medians), of all chunks of an array."""
    codec = setting and numcodecs.Blosc(*setting)
    chunks = [array[k : k + CHUNK] for k in range(0, array.size - CHUNK + 1, CHUNK)]
    out = np.empty(CHUNK, array.dtype)
    encoded, encoding, decoding = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        encoded = [codec.encode(chunk) if codec else chunk.tobytes() for chunk in chunks]
        middle = time.perf_counter()
        for chunk in encoded:
            if codec:
                codec.decode(chunk, out)
            else:
                out[:] = np.frombuffer(chunk, array.dtype)
        encoding.append(middle - start)
        decoding.append(time.perf_counter() - middle)
    return {
        "bytes_a_cell": sum(len(chunk) for chunk in encoded) / n_cells,
        "encode_cells_a_second": n_cells / statistics.median(encoding),
        "decode_cells_a_second": n_cells / statistics.median(decoding),
    }


def main() -> None:
    """Measure on each file, print a table, write the JSON."""
    parser = Flags(__doc__)
    parser.add_argument("sources", help="stores or .h5ad files whose counts are encoded", nargs="+")
    parser.add_argument("--values", help="values to encode, at most", type=int, default=1 << 23)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    numcodecs.blosc.use_threads = False
    keep_freed_memory()
    result: dict = {"machine": machine(), "sources": {}}
    for source in args.sources:
        counts, indices, n_cells = sample(source, args.values)
        gaps = np.diff(indices, prepend=indices[:1])
        table = {
            f"{what}, {name}": measure(array, setting, n_cells, args.rounds)
            for what, array in (("counts", counts), ("indices", indices), ("gaps", gaps))
            for name, setting in CANDIDATES.items()
        }
        result["sources"][Path(source).name] = {"cells": n_cells, "dtype": counts.dtype.name, "codecs": table}
        print(f"{source}: {n_cells} cells, {counts.dtype}")
        for name, row in table.items():
            print(f"  {name:22s} {row['bytes_a_cell']:8.0f} B a cell  {row['encode_cells_a_second'] / 1e3:8.0f}k encoded/s "
                  f"{row['decode_cells_a_second'] / 1e3:8.0f}k decoded/s")  # fmt: skip
    output = Path(__file__).parent / "results" / "codecs.json"
    output.parent.mkdir(exist_ok=True)
    write_result(output, result)


if __name__ == "__main__":
    main()
