"""Conversion against its peers: seconds, processor seconds, peak memory, bytes and files on disk.

    python benchmarks/atlas.py atlas.h5ad --cells 120000
    python benchmarks/convert.py atlas.h5ad --work /tmp/work --peer_python /path/to/venv/bin/python
    python benchmarks/convert.py atlas.h5ad --work /tmp/work --append more.h5ad
    python benchmarks/convert.py atlas.h5ad --work /tmp/work --against a89df50

Every contender runs in a process of its own, all of them once per round, so that a noisy machine is noisy for all; only the
ratios within a run mean something. With `--append` there are two contenders: the cells of another file appended to a store of the
first, and both files converted anew. With `--against` the peer is the code of another commit of this project, and how many times its figures
ours are is said round by round. `--peer_python` is an interpreter that has annbatch (it needs Python 3.12), which is never
installed beside sedd. Results go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import RESULTS, machine, ratios, summary, trees, with_code_of, write_result
from flags import Flags

ANNDATA = """
import sys, warnings
warnings.simplefilter("ignore")
import anndata
anndata.settings.zarr_write_format = 3
anndata.read_h5ad(sys.argv[1]).write_zarr(sys.argv[2])
"""

COPY = """
import sys, warnings
warnings.simplefilter("ignore")
import h5py, zarr
from sedd.io.format.shards import CHUNK, create_vector, shard_length
with h5py.File(sys.argv[1]) as h5:
    group = zarr.open_group(sys.argv[2], mode="w", zarr_format=3)
    for name in ("data", "indices", "indptr"):
        source = h5["X"][name]
        target = create_vector(group, name, source.shape[0], source.dtype, "lz4")
        step = shard_length(source.shape[0])
        for k in range(0, source.shape[0], step):
            target[k : k + step] = source[k : k + step]
"""

ANNBATCH = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import anndata, zarr
from annbatch import DatasetCollection
anndata.settings.zarr_write_format = 3
DatasetCollection(zarr.open_group(sys.argv[2], mode="w", zarr_format=3)).add_adatas([sys.argv[1]], shuffle=True)
"""

SEDD = {"sedd": [], "sedd, shuffled": ["--shuffle"]}
"""The command that users type, and its flags."""

PEERS = {
    "anndata read_h5ad + write_zarr": ANNDATA,
    "zarr-python copy of the arrays": COPY,
    "annbatch, shuffled": ANNBATCH,
}


APPEND, ANEW = "sedd, appended", "sedd, both anew"


def command(name: str, source: str, output: Path, args: argparse.Namespace) -> list[str]:
    """What to run for one contender."""
    if name in (APPEND, ANEW):
        inputs = [args.append] if name == APPEND else [source, args.append]
        flags = ["--append"] if name == APPEND else []
        return [sys.executable, "-m", "sedd", "convert", *inputs, str(output), "--memory_budget", args.budget, *flags]
    if name in SEDD:
        return [sys.executable, "-m", "sedd", "convert", source, str(output), "--memory_budget", args.budget, *SEDD[name]]
    return [args.peer_python if name.startswith("annbatch") else sys.executable, "-c", PEERS[name], source, str(output)]


def run_once(words: list[str], output: Path, kept: Path | None = None, tree: Path | None = None) -> dict[str, float]:
    """Run one contender, with the code of `tree`; what it cost. Its output is there before if there is one that is `kept`."""
    if output.exists():
        shutil.rmtree(output)
    if kept is not None:
        shutil.copytree(kept, output)
    os.sync()
    start = time.perf_counter()
    pid = os.posix_spawn(words[0], words, os.environ if tree is None else with_code_of(tree))
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"a contender failed with status {status}")
    files = [file for file in output.rglob("*") if file.is_file()]
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        "written_mb": usage.ru_oublock * 512 / 1e6,
        "disk_mb": sum(file.stat().st_size for file in files) / 1e6,
        "files": len(files),
    }


def against(args: argparse.Namespace) -> None:
    """Convert by turns with the code that is here and with that of another commit, and write how the two compare."""
    rounds: list[dict[str, Any]] = []
    with trees(args.against) as codes:
        for number in range(args.rounds + 1):  # the first fills caches
            found: dict[str, Any] = {which: {} for which in codes}
            for name in SEDD:
                for which in list(codes)[:: 1 if number % 2 else -1]:
                    output = Path(args.work) / "out.zarr"
                    found[which][name] = run_once(command(name, args.source, output, args), output, tree=codes[which])
                    shutil.rmtree(output)
            found["ratio"] = ratios(found["now"], found[args.against])
            rounds.append(found)
            print({name: {key: round(value, 2) for key, value in one.items()} for name, one in found["ratio"].items()}, flush=True)
    output = Path(args.output or RESULTS / f"convert_{Path(args.source).stem}_against.json")
    result = {"source": Path(args.source).name, "against": args.against, "budget": args.budget, "rounds": args.rounds}
    write_result(output, result | {"machine": machine(), "rates": summary(rounds[1:])})
    print(output)


def main() -> None:
    """Run the rounds, print a table and write the JSON."""
    parser = Flags(__doc__)
    parser.add_argument("source", help="the .h5ad to convert")
    parser.add_argument("--work", default=".")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", help="memory budget of sedd", default="1GiB")
    parser.add_argument("--peer_python", default=None)
    parser.add_argument("--only", help="which contestants run", nargs="*", default=[*SEDD, *PEERS])
    parser.add_argument("--append", help="an .h5ad whose cells are appended, in place of all else", default=None)
    parser.add_argument("--against", default=None, help="a commit to compare with")
    parser.add_argument("--output", default=None)
    args = parser.parse_args()
    if args.against:
        against(args)
        return
    kept = Path(args.work) / "kept.zarr"
    if args.append:
        args.only = [APPEND, ANEW]
        run_once(command("sedd", args.source, kept, args), kept)
    names = [name for name in args.only if name != "annbatch, shuffled" or args.peer_python]
    about = machine(("anndata", "dask", "h5py", "numba", "numcodecs", "numpy", "sedd", "zarr"))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            output = Path(args.work) / "out.zarr"
            before = kept if name == APPEND else None
            rounds[name].append(run_once(command(name, args.source, output, args), output, before))
            print(name, {key: round(value, 1) for key, value in rounds[name][-1].items()}, flush=True)
    for path in (Path(args.work) / "out.zarr", kept):
        shutil.rmtree(path, ignore_errors=True)
    medians = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in rounds.items()
    }
    output = Path(args.output or RESULTS / f"{'append' if args.append else 'convert'}_{Path(args.source).stem}.json")
    result = {"source": Path(args.source).name, "source_mb": os.path.getsize(args.source) / 1e6, "budget": args.budget,
              "machine": about, "medians": medians, "rounds": rounds}  # fmt: skip
    write_result(output, result)
    for name, one in medians.items():
        print(f"{name:32s} {one['seconds']:7.1f} s {one['processor_seconds']:7.1f} s cpu {one['peak_mb']:7.0f} MB peak "
              f"{one['disk_mb']:7.0f} MB {one['files']:5.0f} files")  # fmt: skip


if __name__ == "__main__":
    main()
