"""What is written by hand against the way of the library that it stands in for, in interleaved rounds.

    python benchmarks/atlas.py /tmp/data/a120k.h5ad
    python benchmarks/libraries.py /tmp/data/a120k.h5ad

Each part is swapped for the library's way while the program runs, and nothing else is changed:

- reading: `sedd.io.format.reader` and `codec` against zarr-python, and against zarr-python with zarrs' codecs if it is installed
- memory: `sedd.io.loading.buffers` against `np.empty`
- threads: `sedd.io.loading.threads` against `ThreadPoolExecutor`, interrupted at each call and return of `submit` and `result`

Speed is that of the part over that of the library, round by round; the median of the rounds is what counts. By processor time it means
something on a busy machine as well. Figures go to `benchmarks/results/libraries.json`. Its rows on inflating and encoding are of parts
that read gzipped chunks past HDF5 and encoded chunks by C functions until 2026-11-26; they are why these went.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import google_crc32c
import numcodecs.blosc
import numpy as np
import zarr
from common import RESULTS, machine, write_result
from flags import Flags

if TYPE_CHECKING:
    from sedd.io.loader import CellLoader

OWN = "sedd"
Cost = dict[str, float]
"""Seconds by the clock ("wall") and of processors ("cpu")."""
Swap = Callable[[], contextlib.AbstractContextManager[Any]]


# -- the library's ways ----------------------------------------------------------------------------------------------


def _decode_in_python(
    raw: np.ndarray, starts: np.ndarray, lengths: np.ndarray, *, codec: int, checked: bool, out: np.ndarray,
    targets: np.ndarray, size: int,
) -> tuple[int, int]:  # fmt: skip
    """Stand in for `decode_chunks`, by a call of numcodecs for each chunk; only of Blosc with a checksum."""
    for i, (start, length, target) in enumerate(zip(starts.tolist(), lengths.tolist(), targets.tolist(), strict=True)):
        if length < 0:
            out[target : target + size] = 0
            continue
        body = raw[start : start + length - 4]
        if struct.pack("<I", google_crc32c.value(body.tobytes())) != raw[start + length - 4 : start + length].tobytes():
            return i, 1
        numcodecs.blosc.decompress(body, out[target : target + size])
    return -1, 0


@contextlib.contextmanager
def _zarr_with_zarrs() -> Iterator[None]:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}), _zarr():
        yield


def _zarr() -> contextlib.AbstractContextManager[Any]:
    return mock.patch("sedd.io.format.reader._direct_layout", return_value=None)


def _numcodecs() -> contextlib.AbstractContextManager[Any]:
    return mock.patch("sedd.io.format.reader.decode_chunks", _decode_in_python)


def _np_empty() -> contextlib.AbstractContextManager[Any]:
    return mock.patch("sedd.io.loading.buffers.Slabs.take", lambda self, shape, dtype: np.empty(shape, dtype))


class Executor:
    """`sedd.io.loading.threads.Threads`, made of a `ThreadPoolExecutor`."""

    def __init__(self, number: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(number, thread_name_prefix=name)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a call made."""
        return self._pool.submit(function, *arguments)

    def close(self) -> None:
        """Drop the calls that wait, wait for those that are being made."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def readers() -> dict[str, Swap]:
    """The ways to read chunks of a store."""
    ways: dict[str, Swap] = {OWN: contextlib.nullcontext, "zarr-python": _zarr, "own reader, codecs from Python": _numcodecs}
    if importlib.util.find_spec("zarrs"):
        import zarrs  # noqa: F401  (registers its pipeline)

        ways["zarr-python, zarrs"] = _zarr_with_zarrs
    return ways


# -- speed -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed(cost: Cost) -> Iterator[None]:
    """Note in `cost` what the body takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    cost.update(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def epoch(loader: CellLoader) -> Cost:
    """Cost of a whole epoch, of which nothing was read or filled before the clock began."""
    loader.set_epoch(loader.epoch + 1)
    cost: Cost = {}
    with timed(cost):
        for _ in loader:
            pass
    return cost


def open_loader(store: str, cells: int, **options: Any) -> CellLoader:
    """A loader of neighbouring cells, so that a windowed order has its runs."""
    from sedd.io.loader import CellLoader

    return CellLoader(store, split=np.arange(cells), binning="counts", pin_memory=False, **options)


def reading(store: str, shuffle: str) -> Cost:
    """Cost of the first epoch of a new loader."""
    with open_loader(store, 16_384, batch_size=512, mask=None, shuffle=shuffle) as loader:
        return epoch(loader)


@contextlib.contextmanager
def filling(store: str, shuffle: str, form: str, size: int) -> Iterator[Callable[[], Cost]]:
    """Keep a loader, that holds all its cells in memory with a full shuffle, and time an epoch on each call."""
    mask = {"tokens": None, "masked": "score_entropy"}[form]
    with open_loader(store, 32_768, batch_size=size, mask=mask, shuffle=shuffle) as loader:
        epoch(loader)
        yield lambda: epoch(loader)


def same_batches(store: str, ways: dict[str, Swap]) -> None:
    """Make sure that all ways read the same."""
    from sedd.io.loader import CellLoader

    sums = {}
    for name, swap in ways.items():
        with swap(), CellLoader(store, batch_size=512, split="all", binning="counts", shuffle="window") as loader:
            first = next(iter(loader))
            assert loader._pipeline is not None and loader._pipeline.reader.direct == ("zarr" not in name)
        sums[name] = (int(first.tokens.long().sum()), first.cell.tolist())
    assert all(value == sums[OWN] for value in sums.values()), "the ways do not read the same"


Measure = contextlib.AbstractContextManager[Callable[[], Cost]]


def contests(store: str) -> dict[str, tuple[dict[str, Swap], Measure, float]]:
    """Each row of the table: the ways, what is timed, and how many times as fast the part must be to be kept."""
    own: dict[str, Swap] = {OWN: contextlib.nullcontext}

    rows: dict[str, tuple[dict[str, Swap], Measure, float]] = {
        "reading: tokens/512 window": (readers(), contextlib.nullcontext(lambda: reading(store, "window")), 2.0),
        "reading: tokens/512 full, first epoch": (readers(), contextlib.nullcontext(lambda: reading(store, "full")), 2.0),
    }
    for mode, form, size in itertools.product(("full", "window"), ("tokens", "masked"), (64, 512, 4096)):
        rows[f"memory: {form}/{size} {mode}"] = ({**own, "np.empty": _np_empty}, filling(store, mode, form, size), 1.1)
    return rows


def speed(rounds: list[dict[str, Cost]], way: str) -> dict[str, float]:
    """Median over the rounds of the way's cost over the part's."""
    return {unit: statistics.median(one[way][unit] / one[OWN][unit] for one in rounds) for unit in ("wall", "cpu")}


# -- interrupts -----------------------------------------------------------------------------------------------------


def points_that_lock(pool_type: Callable[[int, str], Any]) -> dict[str, int]:
    """Interrupt a `submit(...).result()` at each of its calls and returns in turn; after how many of them the pool is dead."""
    outcomes: list[int] = []
    while not outcomes or outcomes[-1] != _NOT_INTERRUPTED:
        child = os.fork()  # a process for each: one dead `ThreadPoolExecutor` holds a lock that all of a process share
        if not child:
            outcome = _OTHER_ERROR
            try:
                outcome = _interrupted_at(len(outcomes), pool_type)
            finally:
                os._exit(outcome)
        outcomes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return {"points": len(outcomes) - 1, "dead": outcomes.count(_DEAD), "other_error": outcomes.count(_OTHER_ERROR)}


_ALIVE, _DEAD, _NOT_INTERRUPTED, _OTHER_ERROR = 0, 1, 2, 3


def _interrupted_at(at: int, pool_type: Callable[[int, str], Any]) -> int:
    pool = pool_type(1, "pool")
    pool.submit(abs, -1).result()
    events = itertools.count()

    def interrupt(_frame: object, event: str, _argument: object) -> None:
        if event in ("call", "return", "c_return") and next(events) == at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    try:
        sys.setprofile(interrupt)
        pool.submit(abs, -1).result()
        sys.setprofile(None)
        return _NOT_INTERRUPTED
    except KeyboardInterrupt:
        pass
    later = threading.Thread(target=lambda: pool.submit(abs, -2).result(), daemon=True)
    later.start()
    later.join(2)
    return _DEAD if later.is_alive() else _ALIVE


# -- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print a table and write the JSON."""
    if "--points" in sys.argv:
        from sedd.io.loading.threads import Threads

        kinds: dict[str, Callable[[int, str], Any]] = {OWN: Threads, "ThreadPoolExecutor": Executor}
        print(json.dumps({name: points_that_lock(kind) for name, kind in kinds.items()}))
        return
    parser = Flags(__doc__)
    parser.add_argument("h5ad", type=Path)
    parser.add_argument("--store", type=Path, help="the h5ad converted by sedd; made beside it when missing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows that contain this")
    parser.add_argument("--output", type=Path, default=RESULTS / "libraries.json")
    args = parser.parse_args()
    store = args.store or args.h5ad.with_suffix(".zarr")
    if not store.exists():
        from sedd.io.convert import convert

        convert(args.h5ad, store, progress=False)
    about = machine()
    about["versions"] |= {name: version(name) for name in ("h5py", "google-crc32c")}
    if "zarr-python, zarrs" in readers():
        about["versions"]["zarrs"] = version("zarrs")
    same_batches(str(store), readers())
    began = time.perf_counter()
    rows: dict[str, Any] = {}
    for row, (ways, measuring, least) in contests(str(store)).items():
        if args.only not in row:
            continue
        rounds: list[dict[str, Cost]] = []
        with measuring as measure:
            for number in range(args.rounds):
                one: dict[str, Cost] = {}
                for name in list(ways)[:: 1 if number % 2 else -1]:
                    with ways[name]():
                        one[name] = measure()
                    print(f"{row}, round {number + 1}: {name}: {one[name]}", file=sys.stderr, flush=True)
                rounds.append(one)
        medians = {
            name: {unit: statistics.median(one[name][unit] for one in rounds) for unit in ("wall", "cpu")} for name in ways
        }
        speeds = {name: speed(rounds, name) for name in ways if name != OWN}
        rows[row] = {"keep_from": least, "medians": medians, "times_as_fast": speeds, "rounds": rounds}
        for name, times in speeds.items():
            print(f"{row:46s} {medians[OWN]['wall']:6.2f} s {medians[OWN]['cpu']:6.2f} s cpu | {name:32s} "
                  f"{medians[name]['wall']:6.2f} s {medians[name]['cpu']:6.2f} s cpu | {times['wall']:5.2f} x wall "
                  f"{times['cpu']:5.2f} x cpu (keep from {least})", flush=True)  # fmt: skip
    record: dict[str, Any] = {"machine": about, "data": [args.h5ad.name], "rounds": args.rounds, "rows": rows}
    if args.only in "threads":
        done = subprocess.run([sys.executable, __file__, "--points"], capture_output=True, text=True, check=True)
        record["interrupted_at_each_point"] = json.loads(done.stdout)
        print(f"threads: interrupted at each call and return: {done.stdout.strip()}")
    record["seconds"] = time.perf_counter() - began
    write_result(args.output, record)
    print(args.output)


if __name__ == "__main__":
    main()
