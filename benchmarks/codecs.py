"""What each codec costs: bytes a cell, and cells a second to encode and decode, on one core.

    python benchmarks/codecs.py atlas.h5ad data/pbmc3k.h5ad

Inner chunks as in a store (16,384 values of counts in uint8 or uint16, gene indices in uint16), each with its crc32c. Besides the
codecs that a store may have, it measures gap-coding the indices first: smaller, but Zarr v3 knows it only as an extension that warns
whoever opens the store, so it is not offered. Results go to `benchmarks/results/codecs.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numcodecs
import numpy as np
from convert import machine

from sedd.io import pack
from sedd.io.h5ad import H5ad
from sedd.io.shards import CHUNK

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
    with H5ad(path) as file:
        matrix = file.matrix()
        lo, hi = matrix.spans(n_values)[0]
        _, indices, raw = matrix.read_major(lo, hi)
        counts = pack.to_counts(raw, np.dtype(np.uint8))
        return counts.values, indices.astype(pack.index_dtype(matrix.shape[1])), hi - lo


def measure(arrays: list[np.ndarray], setting: tuple[str, int, int] | None, rounds: int) -> tuple[float, float, float]:
    """Bytes, seconds to encode and seconds to decode (medians) all chunks of the arrays."""
    n_bytes, encoding, decoding = 0, [], []
    for _ in range(rounds):
        n_bytes, encode, decode = 0, 0.0, 0.0
        for array in arrays:
            codec = setting and numcodecs.Blosc(*setting)
            chunks = [array[k : k + CHUNK] for k in range(0, array.size - CHUNK + 1, CHUNK)]
            start = time.perf_counter()
            encoded = [codec.encode(chunk) if codec else chunk.tobytes() for chunk in chunks]
            middle = time.perf_counter()
            out = np.empty(CHUNK, array.dtype)
            for chunk in encoded:
                if codec:
                    codec.decode(chunk, out)
                else:
                    out[:] = np.frombuffer(chunk, array.dtype)
            encode, decode = encode + middle - start, decode + time.perf_counter() - middle
            n_bytes += sum(len(chunk) for chunk in encoded)
        encoding.append(encode)
        decoding.append(decode)
    return n_bytes, statistics.median(encoding), statistics.median(decoding)


def main() -> None:
    """Measure on each file, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--values", type=int, default=1 << 23)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    numcodecs.blosc.use_threads = False
    result: dict = {"machine": machine(), "sources": {}}
    for source in args.sources:
        counts, indices, n_cells = sample(source, args.values)
        gaps = np.diff(indices, prepend=indices[:1])
        table = {}
        for prefix, arrays in (("", [counts, indices]), ("gaps, ", [counts, gaps])):
            for name, setting in CANDIDATES.items():
                n_bytes, encode, decode = measure(arrays, setting, args.rounds)
                table[prefix + name] = {
                    "bytes_a_cell": n_bytes / n_cells,
                    "encode_cells_a_second": n_cells / encode,
                    "decode_cells_a_second": n_cells / decode,
                }
        result["sources"][Path(source).name] = {"cells": n_cells, "dtype": counts.dtype.name, "codecs": table}
        print(f"{source}: {n_cells} cells, {counts.dtype}")
        for name, row in table.items():
            print(f"  {name:18s} {row['bytes_a_cell']:8.0f} B a cell  {row['encode_cells_a_second'] / 1e3:8.0f}k encoded/s "
                  f"{row['decode_cells_a_second'] / 1e3:8.0f}k decoded/s")  # fmt: skip
    output = Path(__file__).parent / "results" / "codecs.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
