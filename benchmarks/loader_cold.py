"""The loader from a cold page cache beside what the disk gives: `loader.py --cold` calls this.

Interleaved, with the page cache emptied of the store before each: its shards from end to end in reads of 8 MiB; the byte ranges of a windowed epoch, in the
loader's order, by as many threads, thrown away; and the loader. What the kernel says it fetched shows whether the cache was cold.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import ratios, summary

from sedd.io.format import reader
from sedd.io.loader import CellLoader

THREADS, SEQUENTIAL = 2, 8 << 20


def cold_epochs(store: str, rounds: int) -> dict[str, Any]:
    """Bytes and cells a second of a windowed epoch and of the disk alone, and the loader's share of each."""
    ranges = ranges_of_an_epoch(store)
    found = []
    for number in range(rounds + 1):
        one = {"sequential": timed(store, lambda: from_end_to_end(store)), "ranges": timed(store, lambda: read_all(ranges)), "loader": timed(store, lambda: epoch(store))}
        one["share"] = {name: ratios(one["loader"], one[name])["bytes_a_second"] for name in ("sequential", "ranges")}
        if number:  # the first compiles
            found.append(one)
            print(Path(store).name, one["share"], file=sys.stderr, flush=True)
    return {"range_bytes": float(np.mean([size for _, _, size in ranges])), **summary(found)}


def timed(store: str, work: Callable[[], tuple[int, int]]) -> dict[str, float]:
    """Run `work`, which returns bytes and cells, after the page cache has let go of the store."""
    os.sync()
    for file in shards(store):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    fetched, began, cpu = from_disk(), time.perf_counter(), time.process_time()
    size, cells = work()
    seconds = time.perf_counter() - began
    result = {"bytes_a_second": size / seconds, "cpu_share": (time.process_time() - cpu) / seconds, "of_bytes_from_disk": (from_disk() - fetched) / size}
    return result | ({"cells_a_second": cells / seconds} if cells else {})


def shards(store: str) -> list[Path]:
    """All files of the store's matrix."""
    return sorted(file for file in Path(store, "X").rglob("*") if file.is_file())


def from_disk() -> int:
    """Bytes that the kernel has fetched from disks for this process."""
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def from_end_to_end(store: str) -> tuple[int, int]:
    """Read the shards one after the other."""
    total, room = 0, bytearray(SEQUENTIAL)
    for file in shards(store):
        with file.open("rb", buffering=0) as stream:
            while size := stream.readinto(room):
                total += size
    return total, 0


def ranges_of_an_epoch(store: str) -> list[tuple[Path, int, int]]:
    """File, place and size of each read of an epoch, in the loader's order."""
    found: list[tuple[Path, int, int]] = []
    real = reader._pread

    def note(descriptor: int, buffer: np.ndarray, offset: int, path: Path) -> None:
        found.append((path, offset, buffer.size))
        real(descriptor, buffer, offset, path)

    reader._pread = note
    try:
        epoch(store, threads=1)
    finally:
        reader._pread = real
    return found


def read_all(ranges: list[tuple[Path, int, int]]) -> tuple[int, int]:
    """Read ranges on threads, each a stretch of what a window takes."""
    files = {path: os.open(path, os.O_RDONLY) for path in {path for path, _, _ in ranges}}

    def read(some: list[tuple[Path, int, int]]) -> int:
        room = memoryview(bytearray(max(size for _, _, size in some)))
        return sum(os.preadv(files[path], [room[:size]], offset) for path, offset, size in some)

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return sum(pool.map(read, [ranges[low : low + 256] for low in range(0, len(ranges), 256)])), 0
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def epoch(store: str, threads: int = THREADS) -> tuple[int, int]:
    """One windowed epoch of tokens."""
    with CellLoader(store, split="all", batch_size=512, mask=None, shuffle="window", pin_memory=False, threads=threads) as loader:
        cells = sum(len(batch.cell) for batch in loader)
        return loader.bytes_read, cells
