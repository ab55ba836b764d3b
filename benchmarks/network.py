r"""What the network and its law of counts cost and what their cells are like, beside another commit of this project.

    python benchmarks/network.py --against a89df50                      rates on one thread, cells per second of processor time
    python benchmarks/network.py --against a89df50 --what marks --data data/pbmc3k.h5ad other.h5ad --epochs 5 20 --scvi PYTHON
    python benchmarks/network.py --against a89df50 --what time --epochs 10                seconds of one thread to a bound on validation cells

Each side is run by its own code in processes of its own, in turn; of the other commit a work tree is made. Only what users call is
called, so that any two commits compare. A rate is that of the whole call less that of a small one, so start-up,
compilation and what `denoise` learns of its first 1,000 cells are not in it; training contains its validation. The marks, of cells that the model did not see: the share of counts
above the largest training count of their gene, percentiles over genes of the variance of generated cells over that of training
cells, the mean of hidden genes that are rare (training mean below .01) over their true mean, and MMD2. Anchors are the held-out
cells themselves. The time is that of the processor from the start of the command to the end of the first epoch whose bound on validation
cells is at most `--target`. Adds to `benchmarks/results/network.json`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flags import Flags

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]


SETTINGS = {  # of the quick run; named one by one, since the other commit has another file of them, and another rate in it
    **{"batch_size": 16, "ema_decay": 0.995, "warmup_steps": 50, "num_threads": 1, "num_bins": 128},
    **{"hidden_dim": 128, "num_layers": 3, "num_heads": 4, "num_latents": 1, "log_with": "none"},
}


def train(data: str, directory: str, *flags: str) -> float:
    """Train as the quick run does and return the processor's seconds."""
    import sedd
    from sedd.cli import main

    quick = (Path(sedd.__file__).parent.parent / "configs" / "quick.yaml").read_text()
    rate = re.search(r"^learning_rate: (\S+)", quick, re.MULTILINE)
    settings = {**SETTINGS, "learning_rate": rate and rate[1]}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    words += ["--data_path", data, "--checkpoint_dir", directory, "--cache_dir", str(Path(directory).parent), "--overwrite"]
    began = time.process_time()
    if main(["train", *words, *flags]):
        raise SystemExit(f"training on {data} failed")
    return time.process_time() - began


def rates(data: str, directory: str) -> Record:
    """Cells per second of one thread, for each thing that is done with a model."""
    import anndata as ad
    import torch

    import sedd

    torch.set_num_threads(1)
    adata = ad.read_h5ad(data)
    n_train = round(0.9 * adata.n_obs)
    found: Record = {}
    for batch in (16, 128):
        flags = ["--batch_size", str(batch), "--num_epochs"]
        seconds = [train(data, directory, *flags, n) for n in ("1", "1", "4")]
        found[f"training, batches of {batch}"] = 3 * n_train / (seconds[2] - seconds[1])

    def rate(task: Any, few: int, many: int) -> float:
        seconds = []
        for n in (few, few, many):
            began = time.process_time()
            task(n)
            seconds.append(time.process_time() - began)
        return (many - few) / (seconds[2] - seconds[1])

    quiet = {"progress": False}
    found["impute, 15 % hidden"] = rate(lambda n: sedd.impute(directory, adata[:n].copy(), hide=0.15, **quiet), 256, 2560)
    found["denoise"] = rate(lambda n: sedd.denoise(directory, adata[:n].copy(), **quiet), 1000, 1500)
    if "folds" in inspect.signature(sedd.denoise).parameters:
        fast = {"rounds": 1, "folds": 2, **quiet}
        found["denoise, one round of two folds"] = rate(lambda n: sedd.denoise(directory, adata[:n].copy(), **fast), 1000, 2600)
    found["impute, the zeros"] = rate(lambda n: sedd.impute(directory, adata[:n].copy(), **quiet), 50, 450)
    many = ad.concat([adata] * 6, index_unique="-")
    found["embed"] = rate(lambda n: sedd.embed(directory, many[:n].copy(), **quiet), 256, 16000)
    found["generate, 128 steps"] = rate(lambda n: sedd.generate(directory, n, num_steps=128, **quiet), 128, 640)
    found["generate, 32 steps"] = rate(lambda n: sedd.generate(directory, n, num_steps=32, **quiet), 128, 1152)
    found["generate, 16 steps"] = rate(lambda n: sedd.generate(directory, n, num_steps=16, **quiet), 128, 1152)
    return found


def time_to(data: str, directory: str, target: float, epochs: int, seed: int) -> Record:
    """Seconds of the processor, of a whole command, until the bound on the validation cells is at most `target`."""
    from tqdm import tqdm

    found: list[tuple[float, float]] = []

    def note(line: str, **_: object) -> None:
        bound = re.search(r"^epoch .*validation ([\d.]+)", line)
        if bound:
            found.append((time.process_time(), float(bound[1])))

    tqdm.write = note  # type: ignore[assignment]
    train(data, directory, "--num_epochs", str(epochs), "--seed", str(seed))
    reached = [k for k, (_, bound) in enumerate(found) if bound <= target]
    first = reached[0] if reached else None
    best = min(found, key=lambda one: one[1])
    return {
        **{"target": target, "seconds": None if first is None else found[first][0], "epochs": None if first is None else first + 1},
        **{"best bound": best[1], "seconds to the best": best[0]},
    }


def marks(data: str, directory: str, epochs: int, seed: int, exchange: str | None) -> Record:
    """What cells made by a model trained for some epochs are like, and how well hidden rare genes are met.

    Of the code that is here `exchange` becomes a file of what it was asked, for another method.
    """
    import anndata as ad

    import sedd

    flags = ["--num_epochs", str(epochs), "--seed", str(seed)]
    seconds = train(data, directory, *flags)
    adata = ad.read_h5ad(data)
    imputed = sedd.impute(directory, adata, cells="val", hide=0.15, progress=False)
    whole = adata[:, imputed.var_names].to_df()
    held_out = whole.index.isin(imputed.obs_names)
    real, trained = whole[held_out].to_numpy(), whole[~held_out].to_numpy()
    made = np.asarray(sedd.generate(directory, 500, seed=seed, progress=False).to_df())
    hidden = np.asarray(imputed.to_df("sedd_hidden")).astype(bool)
    if exchange:
        np.savez(exchange, trained=trained, real=real, hidden=hidden, seed=seed)
    record = {"seconds to train": round(seconds, 1), **marks_of(made, np.asarray(imputed.to_df()), hidden, real, trained, seed)}
    record["nats per held-out cell"] = json.loads((Path(directory) / "history.json").read_text())[-1]["val_nelbo"]
    return record


def marks_of(made: np.ndarray, mean: np.ndarray, hidden: np.ndarray, real: np.ndarray, trained: np.ndarray, seed: int) -> Record:
    """Return the marks of cells that were made and of means of hidden genes, all (cells, genes)."""
    from sedd.metrics import generation_table

    top, of_gene, usual = trained.max(0), trained.mean(0), trained.var(0)
    seen = (trained > 0).sum(0) >= 3
    asked = hidden & (of_gene < 0.01)
    table = generation_table(*(sparse_of(x) for x in (made, real, trained)), seed=seed)["mmd2"]
    record: Record = {}
    for name, cells in (("generated", made), ("held out", real)):
        ratio = (cells.var(0) / np.maximum(usual, 1e-12))[seen]
        record[name] = {
            "counts above the largest seen": float((cells * (cells > top)).sum() / cells.sum()),
            "variance ratio, 95th percentile": float(np.percentile(ratio, 95)),
            "variance ratio, 99th percentile": float(np.percentile(ratio, 99)),
        }
    record["rare genes, predicted over true"] = float(mean[asked].sum() / max(real[asked].sum(), 1))
    record["mmd2"] = {"sedd": table["sedd"], **table["baselines"]}
    return record


def marks_of_scvi(python: str, exchange: str) -> Record:
    """Return the marks of scVI on the same cells, hidden entries and seed."""
    answers = f"{exchange}.answers.npz"
    subprocess.run([python, Path(__file__).with_name("network_scvi.py"), exchange, answers], check=True, capture_output=True)
    with np.load(exchange) as task, np.load(answers) as found:
        given = [task[name] for name in ("hidden", "real", "trained")]
        record = marks_of(found["made"].astype(np.float64), found["mean"], *given, int(task["seed"]))
        record["mmd2"]["scVI"] = record["mmd2"].pop("sedd")
        return {"seconds to train": float(found["seconds"]), "version": str(found["version"]), **record}


def sparse_of(cells: np.ndarray) -> Any:
    """Return cells as CSR."""
    from scipy import sparse

    return sparse.csr_matrix(cells)


@contextmanager
def codes(commit: str | None) -> Iterator[dict[str, Path]]:
    """Folders of the code that is here and of another commit's."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"here": ROOT}
        if commit:
            found[commit] = Path(folder) / "tree"
            subprocess.run(["git", "worktree", "add", "--detach", "-q", found[commit], commit], cwd=ROOT, check=True)
        try:
            yield found
        finally:
            if commit:
                subprocess.run(["git", "worktree", "remove", "--force", found[commit]], cwd=ROOT, check=True)


def main() -> None:
    """Run both sides in turn and write what was found."""
    parser = Flags(__doc__)
    parser.add_argument("--what", help="what is measured", choices=("rates", "marks", "time"), default="rates")
    parser.add_argument("--target", type=float, default=640.0, help="nats per cell, of --what time")
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "data" / "pbmc3k.h5ad")])
    parser.add_argument("--epochs", nargs="+", type=int, default=[5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "network.json")
    parser.add_argument("--scvi", help="the Python of an environment with scvi-tools, whose marks are taken too")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--exchange", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            directory = str(Path(folder) / "run")
            of = {
                "rates": lambda: rates(args.data[0], directory),
                "marks": lambda: marks(args.data[0], directory, args.epochs[0], args.seed, args.exchange),
                "time": lambda: time_to(args.data[0], directory, args.target, args.epochs[0], args.seed),
            }[args.what]()
        print(json.dumps(of))
        return
    # Not above: the other commit's code runs this file too, and knows nothing of what is beside it here.
    from common import in_process, machine, with_record, write_result

    with codes(args.against) as sides, tempfile.TemporaryDirectory() as folder:
        exchange = str(Path(folder) / "cells.npz")
        for data in args.data:
            for epochs in [0] if args.what == "rates" else args.epochs:
                found: dict[str, list[Record]] = {name: [] for name in sides}
                for _ in range(args.repeats if args.what == "rates" else 1):
                    for name, code in sides.items():
                        words = [sys.executable, __file__, "--side", name, "--what", args.what, "--data", data]
                        words += ["--epochs", str(epochs), "--seed", str(args.seed), "--target", str(args.target)]
                        words += ["--exchange", exchange] if name == "here" else []
                        os.environ.update(PYTHONPATH=f"{code}{os.pathsep}{Path(__file__).parent}", OMP_NUM_THREADS="1")
                        found[name].append(in_process(words))
                        print(data, epochs, name, found[name][-1], flush=True)
                record = {"what": args.what, "data": Path(data).name, "epochs": epochs, "seed": args.seed, "machine": machine()}
                if args.what == "rates":
                    record["cells a second"] = {
                        name: {key: float(np.median([one[key] for one in rounds])) for key in rounds[0]} for name, rounds in found.items()
                    }
                else:
                    record["found"] = {name: rounds[0] for name, rounds in found.items()}
                    if args.what == "marks" and args.scvi:
                        record["found"]["scVI"] = marks_of_scvi(args.scvi, exchange)
                        print(data, "scVI", record["found"]["scVI"], flush=True)
                write_result(args.output, with_record(args.output, record, ("what", "data", "epochs", "seed")))


if __name__ == "__main__":
    main()
