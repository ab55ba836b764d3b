"""What the network costs: training cells/s, peak memory and model FLOPs utilisation, by size, genes and attention.

    python benchmarks/model.py
    python benchmarks/model.py --sizes small --genes 2000 20000 --attention latent --device cuda --compile

Each case runs in a process of its own, on a GPU if there is one, and is added to `benchmarks/results/model_DEVICE.json` in
place of the case it repeats. A step is the forward pass on random cells half of whose genes are masked, its gradient and
AdamW. Utilisation is the arithmetic that the model needs over the time it took, as a share of what a large matrix product
reaches here in the same precision; exponentials, normalisation and anything recomputed count as time, not as work.
Cases whose step needs more than `--max_tflop` are not run; the file says so.

The summary holds the ratios that matter: time per cell and gene at 20,000 genes over that at 2,000, which is 1 for a cost
linear in the genes, and how many times more cells/s the latents train than full attention of the same size.
"""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, matmul_flops, peak_mib, with_record, write_result
from flags import Flags

from sedd.binning import UNBOUNDED
from sedd.model import SEDDTransformer, SEDDTransformerLarge, SEDDTransformerMedium, SEDDTransformerSmall

SIZES: dict[str, type[SEDDTransformer]] = {
    "small": SEDDTransformerSmall,
    "medium": SEDDTransformerMedium,
    "large": SEDDTransformerLarge,
}
Record = dict[str, Any]


def clock(device: torch.device) -> float:
    """Seconds per thread: on a CPU that others use as well, the processor's time is what the work took."""
    return time.perf_counter() if device.type == "cuda" else time.process_time() / torch.get_num_threads()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Record, settings: Record) -> Record:
    """Train for some steps and time them; runs in a process of its own, whose memory is the case's."""
    torch.set_num_threads(settings["threads"])
    device = torch.device(settings["device"])
    low = device.type == "cuda"
    torch.manual_seed(0)
    model = SIZES[case["size"]](
        case["genes"], UNBOUNDED, attention=case["attention"], num_latents=case["num_latents"]
    ).to(device)
    record: Record = {**case, "parameters": sum(p.numel() for p in model.parameters())}
    record["gflop_per_cell"] = round(model.flops(case["genes"], case["genes"] // 2) / 1e9, 3)
    batch = 1 if case["attention"] == "full" and not low else settings["batch_size"]
    if model.flops(case["genes"], case["genes"] // 2) * batch > settings["max_tflop"] * 1e12:
        return {**record, "skipped": f"a step needs more than {settings['max_tflop']} TFLOP"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    network = model.compiled(device, graphs=low) if settings["compile"] else model
    clean = torch.randint(0, 3, (batch, case["genes"]), device=device)
    tokens = clean.masked_fill(torch.rand(clean.shape, device=device) < 0.5, model.mask_token)
    sigma = torch.full((batch,), 0.693, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            loss = -network(tokens, sigma, targets=clean).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    synchronize(device)
    steps, wall, began = 0, time.perf_counter(), clock(device)
    while steps < 2 or time.perf_counter() - wall < settings["seconds"]:
        step()
        synchronize(device)
        steps += 1
    wall, seconds = time.perf_counter() - wall, clock(device) - began
    peak = torch.cuda.max_memory_allocated(device) if low else peak_mib() << 20
    reached = model.flops(case["genes"], case["genes"] // 2) * batch * steps / seconds
    return {
        **record,
        "batch_size": batch,
        "cells_per_s": round(batch * steps / seconds, 3),
        "cells_per_s_wall": round(batch * steps / wall, 3),
        "us_per_cell_and_gene": round(seconds / (batch * steps * case["genes"]) * 1e6, 4),
        "peak_memory_mib": round(peak / 2**20, 1),
        "flops_utilisation": round(reached / matmul_flops(device.type, torch.bfloat16 if low else torch.float32, lambda: clock(device)), 4),
    }


def summary(records: list[Record]) -> Record:
    """The ratios, for each size."""
    speed = {(r["size"], r["genes"], r["attention"]): r.get("cells_per_s") for r in records}
    found: Record = {}
    for size in SIZES:
        few, many = speed.get((size, 2000, "latent")), speed.get((size, 20000, "latent"))
        full = speed.get((size, 2000, "full"))
        ratios = {
            "latent_cost_per_gene_20000_over_2000": few / (10 * many) if few and many else None,
            "latent_over_full_cells_per_s_at_2000": few / full if few and full else None,
        }
        found[size] = {name: None if value is None else round(value, 2) for name, value in ratios.items()}
    return found


def save(path: Path, record: Record, settings: Record) -> None:
    """Put a case into the file in place of the one it repeats."""
    records = with_record(path, record, ("size", "genes", "attention"), within="records")
    content = {
        "machine": machine(("torch",), torch.device(settings["device"]).type),
        "settings": settings,
        "summary": summary(records),
        "records": sorted(records, key=lambda r: (r["attention"], list(SIZES).index(r["size"]), r["genes"])),
    }
    write_result(path, content)


def main() -> None:
    """Run the benchmark."""
    parser = Flags(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--genes", type=int, nargs="+", default=[500, 2000, 8000, 20000])
    parser.add_argument("--attention", nargs="+", choices=("latent", "full"), default=["latent", "full"])
    parser.add_argument("--num_latents", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=16, help="cells per step; full attention on a CPU takes 1")
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each case for")
    parser.add_argument("--max_tflop", help="run no case whose step needs more TFLOP than this", type=float, default=2.0 if not torch.cuda.is_available() else 1e6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in ("device", "threads", "compile", "batch_size", "seconds")}
    settings["max_tflop"] = args.max_tflop
    kind = torch.device(args.device).type
    output = args.output or Path(__file__).parent / "results" / f"model_{kind}.json"
    context = multiprocessing.get_context("spawn")
    for attention in args.attention:
        for size in args.sizes:
            for genes in args.genes:
                case = {"size": size, "genes": genes, "attention": attention, "num_latents": args.num_latents}
                with context.Pool(1) as pool:
                    record = pool.apply(measure, (case, settings))
                print(record, flush=True)
                save(output, record, settings)


if __name__ == "__main__":
    main()
