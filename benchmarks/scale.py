"""What each step of a whole run costs as cells grow: seconds, processor seconds, peak memory and bytes.

    python benchmarks/atlas.py atlas.h5ad --cells 50000
    python benchmarks/scale.py atlas.h5ad --work FOLDER                          # 100 thousand and 1 million cells
    python benchmarks/scale.py atlas.h5ad --work FOLDER --sizes 10000000         # 10 million, which take 24 GB in FOLDER

Sizes that were measured before stay in the result.

The cells are those of one file, linked in FOLDER under so many names, so that no large source is needed.. What is measured of a
size runs in three processes: the conversion; a loader with one label, to its first batch; and the `small` model of 2,000 genes, from its
start over 200 steps to validation and a checkpoint. A store is deleted when it was measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import h5py
from common import RESULTS, Stopwatch, in_process, machine, peak_mib, write_result
from flags import Flags

SIZES = [100_000, 1_000_000]
STEPS, WARM_UP, BATCH = 200, 10, 128


class Costs:
    """What the steps of a process cost, in their order; memory is the peak up to the end of each."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def of(self, name: str, work: Any) -> Any:
        """Do `work` and note what it cost."""
        with Stopwatch() as watch:
            result = work()
        self.found[name] = {"seconds": round(watch.wall, 2), "cpu_seconds": round(watch.cpu, 2), "peak_mib": peak_mib()}
        return result


def conversion(args: argparse.Namespace) -> dict[str, Any]:
    """Convert the file, named so many times over that it makes `args.cells` cells."""
    from sedd.io.convert import convert

    costs = Costs()
    with h5py.File(args.file) as file:
        n = len(file["X/indptr"]) - 1
    files = [f"{args.store}.{k}.h5ad" for k in range(-(-args.cells // n))]
    for path in files:  # a file may be given once, so each has a name of its own
        os.link(args.file, path)
    settings: dict[str, Any] = {"shuffle": args.shuffle, "memory_budget": "1GiB", "limit_cells": args.cells}
    costs.of("convert", lambda: convert(files, args.store, progress=False, **settings))
    costs.found["convert"]["bytes"] = sum(path.stat().st_size for path in Path(args.store).rglob("*") if path.is_file())
    for path in files:
        os.unlink(path)
    return costs.found


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """Open a loader with one label, and take its first batch."""
    from sedd.io.loader import CellLoader

    costs = Costs()
    costs.of("imports", lambda: None)
    loader = costs.of("open", lambda: CellLoader(args.store, batch_size=BATCH, labels=["cell_type"]))
    batches = iter(loader)
    costs.of("first batch", lambda: next(batches))
    loader.close()
    return costs.found


def training(args: argparse.Namespace) -> dict[str, Any]:
    """Start a run, take steps, validate and save, by the parts that `sedd train` is made of."""
    from sedd import checkpoint
    from sedd.config import DataConfig, OptimConfig, RunConfig, TrainConfig
    from sedd.io.loader import CellLoader
    from sedd.training.learner import Learner
    from sedd.training.parallel import Ranks, make_accelerator
    from sedd.training.run_data import prepare_panel
    from sedd.training.saving import snapshot
    from sedd.training.validation import Validator

    config = TrainConfig(
        data=DataConfig(data_path=args.store), optim=OptimConfig(batch_size=BATCH), run=RunConfig(log_with="none", num_threads=1)
    )
    accelerator, costs = make_accelerator("no"), Costs()
    panel = costs.of("start", lambda: prepare_panel(config, None))
    costs.of("digest of names", lambda: panel.cells_digest)
    learner = Learner(config, panel, accelerator)
    loader = CellLoader(
        panel.store, batch_size=BATCH, split=panel.train_cells, genes=panel.genes, binning=panel.binning, mask=config.model.objective,
        noise=learner.noise.mask_probability,
    )  # fmt: skip
    steps = enumerate(itertools.chain.from_iterable(itertools.repeat(loader)))

    def take(n: int) -> None:
        for number, batch in itertools.islice(steps, n):
            learner.step([batch], step=number, epoch=0).read()

    take(WARM_UP)
    waited = loader.wait_seconds
    costs.of("steps", lambda: take(STEPS))
    own = costs.found["steps"]
    rate = STEPS * BATCH / own["seconds"]
    own |= {"n": STEPS, "cells_per_s": round(rate), "wait_share": round((loader.wait_seconds - waited) / own["seconds"], 4)}
    validator = Validator(config, panel, accelerator, learner.noise, learner.graph)
    with learner.averaged_model() as model:
        sums = costs.of("validation", lambda: validator.run(model, stop=lambda: False))
    found = validator.summary(sums, Ranks(accelerator))
    own = costs.found["validation"]
    own |= {"cells": panel.val_cells.n_cells, "nats": round(found["val_nelbo"], 2), "standard_error": round(found["val_nelbo_se"], 3)}
    own["share_of_an_epoch"] = round(own["seconds"] / (panel.train_cells.n_cells / rate), 4)
    path = Path(args.store).with_suffix(".pt")
    state = {"sedd_format": checkpoint.FORMAT, **learner.state(), **panel.state()}
    costs.of("checkpoint", lambda: checkpoint.save(path, snapshot(state)))
    costs.found["checkpoint"]["bytes"] = path.stat().st_size
    path.unlink()
    loader.close()
    validator.close()
    return costs.found


STAGES = {stage.__name__: stage for stage in (conversion, loading, training)}


def marks(sizes: dict[str, Any]) -> dict[str, Any]:
    """What the largest size is held to, beside what was found; torch, which the benchmark imports and a conversion does not, counts as well."""
    second, largest = sorted(map(int, sizes))[-2:]
    few, many = sizes[str(second)], sizes[str(largest)]
    grown = (many["convert"]["peak_mib"] - few["convert"]["peak_mib"]) * 2**20 / (largest - second)
    opened = (many["open"]["peak_mib"] - many["imports"]["peak_mib"]) * 2**20 / largest
    return {
        "peak of the conversion, MiB: a budget of 1,024, and 400": {"mark": 1424, "found": many["convert"]["peak_mib"]},
        "bytes a cell of the conversion": {"mark": 0, "found": round(grown)},
        "bytes a cell of opening a loader with one label": {"mark": 16, "found": round(opened)},
        "seconds to the start": {"mark": 5, "found": many["start"]["seconds"]},
        "validation's share of an epoch": {"mark": 0.1, "found": many["validation"]["share_of_an_epoch"]},
        "share of the time that 200 steps wait for data": {"mark": 0.01, "found": many["steps"]["wait_share"]},
    }


def main() -> None:
    """Measure every size, each stage in a process of its own."""
    parser = Flags(__doc__)
    parser.add_argument("file", help="an .h5ad with counts in CSR and obs[\"cell_type\"], as benchmarks/atlas.py makes it")
    parser.add_argument("--work", type=Path, required=True, help="where stores are made and deleted")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of cells")
    parser.add_argument("--shuffle", action="store_true", help="stores whose cells are shuffled")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--cells", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(STAGES[args.stage](args)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = json.loads(args.output.read_text())["sizes"] if args.output.exists() else {}
    for cells in args.sizes:
        store = args.work / f"{cells}.zarr"
        sizes[str(cells)] = {}
        for stage in STAGES:
            words = [sys.executable, __file__, args.file, "--work", str(args.work), "--stage", stage, "--cells", str(cells), "--store", str(store)]
            sizes[str(cells)] |= in_process(words + ["--shuffle"] * args.shuffle)
            print(cells, stage, json.dumps(sizes[str(cells)]), flush=True)
        sizes[str(cells)] |= {"machine": machine(), "shuffled": args.shuffle}
        held = {"marks": marks(sizes)} if len(sizes) > 1 else {}
        write_result(args.output, {"genes": 2000, "batch": BATCH, **held, "sizes": sizes})
        shutil.rmtree(store)


if __name__ == "__main__":
    main()
