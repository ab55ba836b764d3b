"""A conversion that is killed at any of its changes is resumed to the bytes of one that was not; an old store is never lost."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing as mp
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from tests.io import launch
from tests.io.h5ads import counts, write

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that begin with everything imported, so that a kill hits the conversion and not an import."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.io.victim"])
    return context


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two inputs, the second by columns and with another order of genes; each with a layer of counts, one of real values, and raw."""
    folder, paths = tmp_path_factory.mktemp("source"), []
    for number, kind in enumerate((sparse.csr_matrix, sparse.csc_matrix)):
        genes = [f"gene{k}" for k in (range(60) if not number else range(59, -1, -1))]
        matrix = counts(300, 60, largest=700, seed=number)
        layers = {
            "spliced": kind(counts(300, 60, seed=5 + number)),
            "scaled": kind(counts(300, 60, seed=7 + number) * np.float32(0.3)),
        }
        path = write(folder / f"{number}.h5ad", kind(matrix), genes=genes, layers=layers)
        whole = ad.read_h5ad(path)
        whole.raw = whole
        whole.write_h5ad(path)
        paths.append(path)
    return paths


def files_of(path: str) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*")) if file.is_file()}


def run(processes: Any, source: str | list[str], output: str, **options: Any) -> str:
    """Convert in a process; what it told."""
    here, there = processes.Pipe()
    process = processes.Process(target=launch.run_and_tell, args=(source, output, options, there))
    process.start()
    told = str(here.recv())
    process.join()
    return told


def changes_of(
    processes: Any, source: str | list[str], output: str, die_at: int | None = None, **options: Any
) -> tuple[list[str], int | None]:
    """Convert in a process that may die just before one of its changes; the changes, and its exit status."""
    here, there = processes.Pipe()
    process = processes.Process(target=launch.run_and_die, args=(source, output, options, die_at, there))
    process.start()
    there.close()
    changes = []
    with contextlib.suppress(EOFError):
        while True:
            changes.append(here.recv())
    process.join()
    return changes, process.exitcode


STAGES = {"spill/": "spill", "shards/": "shard", "layer-": "layer", "store": "publish"}

KINDS: dict[str, tuple[slice, dict[str, Any]]] = {
    "one": (slice(1), {}),
    "shuffled": (slice(1), {"shuffle": True}),
    "layers": (slice(1), {"keep_layers": ["spliced", "scaled"]}),
    "all": (slice(2), {"keep_layers": ["spliced", "scaled"], "shuffle": True}),
    "raw": (slice(2), {"raw": True}),
}
"""Which inputs, and with what options."""


def stage(changes: list[str]) -> str:
    """What a conversion that has made these changes is about to do."""
    if "os.rename .partial/store" in changes[:-1]:
        return "clean up"
    path = changes[-1].partition(".partial/")[2]
    return next((name for start, name in STAGES.items() if path.startswith(start)), "plan")


def places_of(changes: list[str]) -> dict[str, list[int]]:
    """The numbers of the changes in each stage."""
    places: dict[str, list[int]] = {}
    for number in range(len(changes)):
        places.setdefault(stage(changes[: number + 1]), []).append(number)
    return places


@pytest.mark.parametrize("kind", ["one", pytest.param("shuffled", marks=pytest.mark.slow)])
def test_a_killed_conversion_resumes_to_the_same_bytes(
    kind: str, processes: Any, sources: list[str], tmp_path: Path
) -> None:
    check_kills(processes, sources, tmp_path, kind, 3)


@pytest.mark.slow
def test_a_conversion_that_is_killed_after_a_layer_was_moved_resumes(
    processes: Any, sources: list[str], tmp_path: Path
) -> None:
    output, (taken, options) = str(tmp_path / "a.zarr"), KINDS["layers"]
    changes, status = changes_of(processes, sources[taken], output, **options)
    assert status == 0
    expected = files_of(output)
    moved = [
        number
        for number, change in enumerate(changes)
        if change.startswith("os.rename .partial/layer-") and change.endswith(".zarr/X")
    ]
    assert len(moved) == 2
    last = next(number for number, change in enumerate(changes) if change == "os.rename .partial/store")
    for at in (moved[0] + 1, moved[1], moved[1] + 1, last):
        shutil.rmtree(output)
        assert changes_of(processes, sources[taken], output, at, **options)[1] == -signal.SIGKILL
        assert not Path(output).exists()
        assert run(processes, sources[taken], output, resume=True, **options) == "done"
        assert files_of(output) == expected
        assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", ["layers", "raw", "all"])
def test_many_kills_resume_to_the_same_bytes(kind: str, processes: Any, sources: list[str], tmp_path: Path) -> None:
    check_kills(processes, sources, tmp_path, kind, 50 if kind == "all" else 12)


def check_kills(processes: Any, sources: list[str], folder: Path, kind: str, n: int) -> None:
    """Kill -9 conversions at their changes, every stage in turn; each must have died at work, and resume to the same bytes."""
    output, (taken, options) = str(folder / "a.zarr"), KINDS[kind]
    changes, status = changes_of(processes, sources[taken], output, **options)
    assert status == 0
    expected = files_of(output)
    shutil.rmtree(output)
    places = places_of(changes)
    wanted = {"plan", "shard", "publish", "clean up"} | ({"spill"} if kind not in ("one", "layers") else set())
    assert places.keys() == wanted | ({"layer"} if "keep_layers" in options else set())
    rng = random.Random(0)
    fell = []
    for _, numbers in zip(range(n), itertools.cycle(places.values()), strict=False):
        made, status = changes_of(processes, sources[taken], output, rng.choice(numbers), **options)
        assert status == -signal.SIGKILL
        fell.append(stage(made))
        if Path(f"{output}.partial/plan.json").exists() and not Path(output).exists():
            assert "pass --resume" in run(processes, sources[taken], output, **options).lower()
        assert run(processes, sources[taken], output, resume=True, **options) == "done"
        assert files_of(output) == expected
        assert not Path(f"{output}.partial").exists()
        shutil.rmtree(output)
    print("killed before:", dict(Counter(fell)))  # threads take turns as they like, so a kill can fall beside its stage
    assert len(set(fell)) >= min(n, len(places)) - 1


@pytest.mark.parametrize("then", [{"overwrite": True}, pytest.param({"resume": True}, marks=pytest.mark.slow), pytest.param({}, marks=pytest.mark.slow)])
def test_a_store_that_was_moved_aside_when_its_conversion_was_killed_is_put_back(
    then: dict[str, Any], processes: Any, sources: list[str], tmp_path: Path
) -> None:
    output = str(tmp_path / "a.zarr")
    assert run(processes, sources[0], output) == "done"
    old = files_of(output)
    changes, _ = changes_of(processes, sources[1], output, overwrite=True, exchange=False)
    new = files_of(output)
    shutil.rmtree(output)
    assert run(processes, sources[0], output) == "done"
    between = changes.index("os.rename .partial/store")
    assert changes[between - 1] == "os.rename "  # the old store
    assert changes_of(processes, sources[1], output, between, overwrite=True, exchange=False)[1] == -signal.SIGKILL
    assert not Path(output).exists()
    if "overwrite" in then:  # the next one may be killed as well
        half = next(number for number, change in enumerate(changes) if ".partial/shards/" in change)
        assert changes_of(processes, sources[1], output, half, **then, exchange=False)[1] == -signal.SIGKILL
        assert files_of(output) == old
    told = run(processes, sources[1], output, **then)
    assert files_of(output) == (new if "overwrite" in then else old)
    assert told == "done" if "overwrite" in then else "exists already. Pass --overwrite" in told
    assert run(processes, sources[1], output, resume=True, overwrite=True, exchange=False) == "done"
    assert files_of(output) == new
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_half_written_files_of_a_killed_conversion_are_removed_by_the_next(
    processes: Any, sources: list[str], tmp_path: Path
) -> None:
    output, folder = str(tmp_path / "a.zarr"), tmp_path / "a.zarr.partial"
    changes, _ = changes_of(processes, sources[0], output)
    shutil.rmtree(output)
    left: set[Path] = set()
    for half, change in enumerate(changes):
        if change.startswith("os.rename .partial/shards/") and change.endswith(".part"):
            # Workers take turns, not always the same ones: another change may be the one of this number now.
            assert changes_of(processes, sources[0], output, half)[1] == -signal.SIGKILL
            if left := set(folder.rglob("*.part")):
                break
            shutil.rmtree(folder)
    assert left
    # One that begins and is stopped at once, before it writes anything else.
    with contextlib.suppress(EOFError):
        changes, status = changes_of(processes, sources[0], output, 2 + len(left), resume=True)
        assert status == -signal.SIGKILL
    assert not left & set(folder.rglob("*.part"))
