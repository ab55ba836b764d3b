"""Throughput of the loader against its peers and against what the machine can do, in interleaved rounds.

    python benchmarks/loader.py atlas.h5ad --peer_python annbatch=/path/to/python --rounds 5
    python benchmarks/loader.py atlas.h5ad --against a89df50 --batches 512
    python benchmarks/loader.py atlas.h5ad --s3 --rounds 3 --seconds 5
    python benchmarks/loader.py atlas.h5ad --cold --shuffled shuffled.zarr --rounds 5

Every contestant runs in a process of its own, one after the other, `--rounds` times; medians and ranges go to
`benchmarks/results/loader_NAME.json`. Rates are given by the clock and per second of processor time: on a machine that does other
work as well, the second is what can be compared. With `--against` the one peer is the code of another commit of this project, and how many
times its figures ours are is said round by round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, in_process, machine, peak_mib, ratios, summary, trees, with_code_of, write_result
from flags import Flags
from loader_cold import cold_epochs
from loader_peers import N_BINS, mean_entropy, rate
from loader_remote import object_store

from sedd.binning import Binning

BINNED = Binning("identity", N_BINS, None, np.arange(N_BINS))  # as the peers get it: larger counts share the last


def measure(options: dict[str, Any], form: str, seconds: float) -> dict[str, float]:
    """Cells per second of a loader, after as long a stretch to warm up."""
    from sedd.io.loader import CellLoader

    with CellLoader(
        split="all", binning=BINNED, labels=["cell_type"], pin_memory=False, **options
    ) as loader:

        def sizes() -> Iterator[int]:
            for epoch in itertools.count():
                loader.set_epoch(epoch)
                yield from (len(batch.cell) for batch in (loader.as_csr() if form == "csr" else loader))

        return rate(sizes(), seconds)


def limits(store: str, seconds: float) -> dict[str, dict[str, float]]:
    """What two threads do of each part of the work alone, and of all of it one after the other."""
    from sedd.io.loading.rows import RowReader
    from sedd.io.store import CellStore
    from sedd.kernels.mask import random_mask
    from sedd.kernels.tokens import RowFiller

    cells = CellStore(store)
    reader = RowReader(cells)
    filler = RowFiller(
        cells.n_vars, genes=None, binning=BINNED, max_count=cells.max_value
    )
    n = 4096
    numbers = np.arange(min(n, cells.n_obs))
    rows = reader.read(numbers)
    out = [np.empty((512, cells.n_vars), np.uint8) for _ in range(2)]
    masked = [np.empty((512, cells.n_vars), bool) for _ in range(2)]
    half = np.full(512, 0.5)

    def decode(thread: int) -> int:
        return len(reader.read(numbers).starts)

    def scatter(thread: int) -> int:
        for low in range(0, numbers.size - 511, 512):
            part = slice(low, low + 512)
            filler.fill(rows.indices, rows.data, rows.starts[part], rows.stops[part], out[thread])
        return numbers.size // 512 * 512

    def mask(thread: int) -> int:
        for low in range(0, numbers.size - 511, 512):
            random_mask(0, 0, numbers[low : low + 512], cells.n_vars, half, out=masked[thread])
        return numbers.size // 512 * 512

    def on_two_threads(work: Callable[[int], int]) -> dict[str, float]:
        def until(thread: int, stop: float) -> int:
            done = 0
            while time.perf_counter() < stop:
                done += work(thread)
            return done

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, range(2)))
            began, cpu = time.perf_counter(), time.process_time()
            done = sum(pool.map(lambda thread: until(thread, began + seconds), range(2)))
            return {"wall": done / (time.perf_counter() - began), "per_cpu_second": done / (time.process_time() - cpu)}

    result = {f"limit {work.__name__}": on_two_threads(work) for work in (decode, scatter, mask)}

    def together(parts: list[str]) -> dict[str, float]:
        return {
            unit: 1 / sum(1 / result[f"limit {part}"][unit] for part in parts) for unit in ("wall", "per_cpu_second")
        }

    result["limit tokens"] = together(["decode", "scatter"])
    result["limit masked"] = together(["decode", "scatter", "mask"])
    return result


def contest(store: str, batches: list[int], seconds: float, panel: int) -> dict[str, Any]:
    """Every form and batch size of the loader, once."""
    from sedd.io.loader import CellLoader
    from sedd.io.store import CellStore

    began = time.perf_counter()
    with CellLoader(store, split="all", binning=BINNED, labels=["cell_type"], batch_size=64) as loader:
        next(iter(loader))
        result: dict[str, Any] = {"first_batch_seconds": time.perf_counter() - began}
    genes = list(CellStore(store).var_names[:: max(1, CellStore(store).n_vars // panel)][:panel])
    forms: dict[str, dict[str, Any]] = {
        "tokens": {"mask": None},
        "masked": {},
        "float32": {"mask": None, "dtype": "float32"},
        "csr": {"mask": None, "dtype": "float32"},
        "panel": {"mask": None, "genes": genes},
    }
    for mode in ("window", "full"):
        for batch in batches:
            for form, options in forms.items():
                if mode == "window" and form in ("float32", "panel") and batch != 512:
                    continue
                given = {"store": store, "batch_size": batch, "shuffle": mode, **options}
                result[f"{form}/{batch} {mode}"] = measure(given, form, seconds)
    result.update(limits(store, seconds))
    result["rss_mib"] = peak_mib()
    return result


def first_epoch_of_gzip(h5ad: Path) -> dict[str, float]:
    """Seconds from a gzipped h5ad to the end of the first epoch, conversion counted."""
    from sedd.io.convert import convert
    from sedd.io.loader import CellLoader

    with tempfile.TemporaryDirectory(dir=h5ad.parent) as folder:
        began = time.perf_counter()
        store = convert(h5ad, f"{folder}/store.zarr", progress=False)
        assert store is not None
        converted = time.perf_counter() - began
        with CellLoader(
            store.path, split="all", binning=BINNED, batch_size=512, pin_memory=False
        ) as loader:
            cells = sum(len(batch.cell) for batch in loader)
        seconds = time.perf_counter() - began
    return {"conversion_seconds": converted, "seconds": seconds, "cells_a_second": cells / seconds}


def figure(record: dict[str, Any], path: Path, batch: int = 512) -> None:
    """Draw the rates at one batch size, peers beside each other and the machine's limit above."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    forms = {"tokens": "tokens", "masked": "tokens + mask", "float32": "float32", "csr": "CSR"}
    rates, own = record["rates"], record["rates"]["sedd"]
    bars = {f"sedd, {mode}": {form: own[f"{form}/{batch} {mode}"] for form in forms} for mode in ("full", "window")}
    bars |= {
        name: {form: value.get(f"{form}/{batch}") for form in forms} for name, value in rates.items() if name != "sedd"
    }
    fig, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    width = 0.8 / len(bars)
    for k, (name, values) in enumerate(bars.items()):
        there = [n for n, form in enumerate(forms) if values[form] is not None]
        at = np.array(there) + (k - (len(bars) - 1) / 2) * width
        walls = [values[form]["wall"] for form in forms if values[form] is not None]
        middle = np.array([wall["median"] for wall in walls]) / 1e3
        low, high = np.array([wall["range"] for wall in walls]).T / 1e3
        axis.bar(at, middle, width * 0.92, label=name)
        axis.errorbar(at, middle, np.maximum(0, [middle - low, high - middle]), fmt="none", ecolor="0.3", lw=1)
    for k, form in enumerate(("tokens", "masked")):
        limit = own[f"limit {form}"]["wall"]["median"] / 1e3
        axis.hlines(limit, k - 0.45, k + 0.45, colors="black", linestyles="dashed", lw=1)
    axis.set_xticks(range(len(forms)), list(forms.values()))
    axis.set_yscale("log")
    axis.set_ylabel("thousand cells a second")
    axis.set_title(
        f"Batches of {batch} of {record['data']['file']}, 2 cores; dashed: decode + scatter (+ mask) alone", fontsize=10
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, ncols=2)
    fig.savefig(path, dpi=150)


def windowed(store: str, seconds: float) -> dict[str, Any]:
    """Rates of a windowed shuffle at batches of 512, and the memory they took."""
    rates: dict[str, Any] = {
        form: measure({"store": store, "batch_size": 512, "shuffle": "window", **options}, form, seconds)
        for form, options in (("tokens", {"mask": None}), ("masked", {}))
    }
    return {**rates, "rss_mib": peak_mib()}


def shuffle_quality(store: str, batch: int = 64, n_batches: int = 2000) -> dict[str, float]:
    """Mean label entropy (bits) of batches, of the plan alone, for both ways of shuffling and for true random draws.

    "window, one of 8 ranks" is what one rank adds to steps of eight times the batch.
    """
    from sedd.io.loading.selection import encode_label
    from sedd.io.plan import EpochOrder
    from sedd.io.store import CellStore

    codes, _ = encode_label(CellStore(store), "cell_type")

    def entropy(ranks: np.ndarray) -> float:
        return mean_entropy(iter(codes[ranks].reshape(-1, batch)), batch, n_batches)

    take, of_a_rank = (min(codes.size // batch // ranks, n_batches) * batch for ranks in (1, 8))
    orders = {mode: EpochOrder(codes.size, 0, 0, mode) for mode in ("window", "full")}
    result = {mode: entropy(order.ranks(np.arange(take))) for mode, order in orders.items()}
    result["window, one of 8 ranks"] = entropy(orders["window"].ranks(np.arange(0, 8 * of_a_rank, 8)))
    result["random"] = entropy(np.random.default_rng(0).permutation(codes.size)[:take])
    return result


def rank_bytes(store: str, world: int = 8) -> list[int]:
    """Bytes that each of `world` ranks reads in one epoch of a windowed shuffle."""
    from sedd.io.loader import CellLoader

    read = []
    for rank in range(world):
        with CellLoader(
            store, batch_size=512, mask=None, shuffle="window", rank=rank, world_size=world, split="all"
        ) as one:
            for _ in one:
                pass
            read.append(one.bytes_read)
    return read


def against(own: list[str], args: argparse.Namespace) -> None:
    """Have the code that is here and that of another commit compete by turns, and write how the two compare."""
    rounds: list[dict[str, Any]] = []
    with trees(args.against) as codes:
        for number in range(args.rounds):
            order = list(codes)[:: 1 if number % 2 else -1]
            found = {which: in_process(own, env=with_code_of(codes[which])) for which in order}
            rounds.append({**found, "ratio": ratios(found["now"], found[args.against])})
            print(f"round {number + 1}", file=sys.stderr)
    output = args.output or RESULTS / f"loader_{args.h5ad.stem}_against.json"
    about = {"against": args.against, "machine": machine(), "data": {"file": args.h5ad.name, "rounds": args.rounds, "seconds": args.seconds}}
    write_result(output, about | {"rates": summary(rounds)})
    print(output)


def main() -> None:
    """Run the contest."""
    parser = Flags(__doc__)
    parser.add_argument("h5ad", type=Path)
    parser.add_argument("--store", type=Path, help="the h5ad converted by sedd; made beside it when missing")
    parser.add_argument("--peer_python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--batches", default="64,512,4096")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--panel", help="genes of the panel that is also read", type=int, default=2000)
    parser.add_argument("--gzip", type=Path, help="the same h5ad, gzipped")
    parser.add_argument("--large", type=Path, help="a store of more cells, to compare rates with")
    parser.add_argument("--s3", action="store_true", help="measure over S3 alone, of servers on this machine; needs moto, and nginx for more")
    parser.add_argument("--cold", action="store_true", help="measure from a cold page cache alone, beside the disk")
    parser.add_argument("--shuffled", type=Path, help="the same cells in a store made with --shuffle, for --cold")
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--output", type=Path, help="by default results/loader_NAME.json")
    parser.add_argument("--contest", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--windowed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    store = args.store or args.h5ad.with_suffix(".zarr")
    if args.contest:
        batches = [int(size) for size in args.batches.split(",")]
        print(json.dumps(contest(str(store), batches, args.seconds, args.panel)))
        return
    if args.windowed:
        print(json.dumps(windowed(str(store), args.seconds)))
        return
    if not store.exists():
        from sedd.io.convert import convert

        convert(str(args.h5ad), str(store))
    if args.s3:
        output = args.output or RESULTS / f"loader_{args.h5ad.stem}_s3.json"
        about = {"machine": machine(), "data": {"file": args.h5ad.name, "seconds": args.seconds}}
        object_store(str(store), args.seconds, args.rounds, lambda found: write_result(output, about | {"servers": found}))
        print(output)
        return
    if args.cold:
        output = args.output or RESULTS / f"loader_{args.h5ad.stem}_cold.json"
        about = {"machine": machine(), "data": {"file": args.h5ad.name, "rounds": args.rounds}}
        write_result(output, about | {"stores": {one.name: cold_epochs(str(one), args.rounds) for one in filter(None, (store, args.shuffled))}})
        print(output)
        return
    here = Path(__file__).resolve()
    common = ["--batches", args.batches, "--seconds", str(args.seconds)]
    commands = {"sedd": [sys.executable, str(here), str(args.h5ad), "--store", str(store), "--contest", *common]}
    if args.against:
        against(commands["sedd"], args)
        return
    for text in args.peer_python:
        peer, python = text.split("=", 1)
        script = str(here.with_name("loader_peers.py"))
        commands[peer] = [python, script, peer, str(args.h5ad), str(store.parent), *common]
        if peer != "annbatch":  # the slower ones at one size, tiledbsoma-ml in one form: it takes half a minute
            commands[peer] += ["--batches", "512", "--forms", "csr" if peer == "soma" else "csr,tokens"]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(args.rounds):
        for name, command in commands.items():
            rounds[name].append(in_process(command))
            print(f"round {number + 1}: {name}", file=sys.stderr)
    by_store: dict[str, list[dict[str, Any]]] = {one.name: [] for one in (store, args.large) if one is not None}
    for _ in range(args.rounds):
        for one in filter(None, (store, args.large)):
            own = [
                sys.executable,
                str(here),
                str(args.h5ad),
                "--store",
                str(one),
                "--windowed",
                "--seconds",
                str(args.seconds),
            ]
            by_store[one.name].append(in_process(own))
    record = {
        "machine": machine(),
        "data": {"file": args.h5ad.name, "rounds": args.rounds, "seconds": args.seconds},
        "rates": {name: summary(values) for name, values in rounds.items()},
        "label_entropy_bits": {
            one.name: {str(batch): shuffle_quality(str(one), batch) for batch in (64, 512)}
            for one in filter(None, (store, args.large))
        },
        "window_by_store": {name: summary(values) for name, values in by_store.items()},
        "first_epoch_of_gzip": None if args.gzip is None else first_epoch_of_gzip(args.gzip),
        "bytes_read_by_8_ranks": rank_bytes(str(store)),
        "bytes_of_the_store": sum(
            f.stat().st_size for n in ("data", "indices") for f in (store / "X" / n / "c").iterdir()
        ),
    }
    output = args.output or RESULTS / f"loader_{args.h5ad.stem}.json"
    write_result(output, record)
    if args.figure is not None:
        figure(record, args.figure)
    print(output)


if __name__ == "__main__":
    main()
