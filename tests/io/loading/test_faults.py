from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sedd.io.loader import CellLoader
from sedd.io.loading.pipeline import Pipeline
from tests.io.stores import N_OBS, small_store


def copy_store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_store(), tmp_path / "copy.zarr"))


def shards(store: Path) -> list[Path]:
    return [file for name in ("data", "indices") for file in (store / "X" / name / "c").iterdir()]


def remove(store: Path) -> None:
    shutil.rmtree(store)


def truncate(store: Path) -> None:
    for shard in shards(store):
        os.truncate(shard, 64)


def corrupt(store: Path) -> None:
    for shard in shards(store):
        raw = bytearray(shard.read_bytes())
        for at in range(0, len(raw), 50):
            raw[at] ^= 255
        shard.write_bytes(raw)


@pytest.mark.parametrize("damage", [remove, truncate, corrupt])
@pytest.mark.parametrize("mode", ["window", "full"])
@pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")
def test_a_store_damaged_during_an_epoch_ends_in_one_error(tmp_path: Path, damage: object, mode: str) -> None:
    store = copy_store(tmp_path)
    assert callable(damage)
    # A budget below the store, so that not all of it is in memory when the damage is done.
    with CellLoader(store, shuffle=mode, batch_size=8, memory_budget=500_000, n_bins=800, threads=1) as loader:
        batches = iter(loader)
        next(batches)
        damage(store)
        began = time.perf_counter()
        with pytest.raises(ValueError, match="missing|truncated|checksum|index is wrong") as caught:
            list(batches)
        assert time.perf_counter() - began < 5
        assert "\n" not in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sedd-")]


def test_an_exception_in_a_thread_reaches_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a thread failed")

    for name in ("_make_dense", "_cells_at"):
        with monkeypatch.context() as patch, CellLoader(small_store()) as loader:
            patch.setattr(Pipeline, name, broken)
            with pytest.raises(RuntimeError, match="a thread failed"):
                next(iter(loader))


def test_a_failing_noise_function_is_reported_and_the_loader_lives_on() -> None:
    calls = itertools.count()

    def noise(t: object) -> object:
        if next(calls) == 0:
            raise ZeroDivisionError("noise")
        return t

    with CellLoader(small_store(), noise=noise, threads=1) as loader:
        with pytest.raises(ZeroDivisionError):
            list(loader)
        assert sum(len(batch) for batch in loader) == 2700


def test_ctrl_c_in_an_epoch_ends_the_process_promptly() -> None:
    code = f"""
import signal, sys, time
from sedd.io.loader import CellLoader
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background deaf to Ctrl-C
loader = CellLoader({str(small_store())!r}, batch_size=4)
for epoch in range(10**6):
    loader.set_epoch(epoch)
    for i, batch in enumerate(loader):
        if epoch == 0 and i == 3:
            print("running", flush=True)
        time.sleep(0.001)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert "KeyboardInterrupt" in errors


def test_no_interrupt_is_lost_in_an_epoch() -> None:
    """An exception that a signal raises within a finaliser is printed and forgotten: none may have Python code to run."""
    fired = False

    def interrupt(*_: object) -> None:
        nonlocal fired
        fired = True
        raise KeyboardInterrupt

    def read_until_interrupted(loader: CellLoader, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        while not fired:
            for _ in loader:
                if fired:
                    break

    before = signal.signal(signal.SIGVTALRM, interrupt)
    rng = np.random.default_rng(0)
    try:
        with CellLoader(str(small_store()), batch_size=4) as loader:
            list(loader)
            for _ in range(300):
                fired = False
                with pytest.raises(KeyboardInterrupt):
                    read_until_interrupted(loader, float(rng.uniform(5e-4, 2e-2)))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_a_consumer_that_stops_early_leaves_nothing_running() -> None:
    with CellLoader(small_store(), batch_size=10) as loader:
        for _ in range(5):
            batches = iter(loader)
            next(batches)
            batches.close()  # type: ignore[attr-defined]
        assert sum(len(batch) for batch in loader) == 2700
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sedd-")]


def test_two_loaders_and_two_iterators_on_one_store_do_not_mix() -> None:
    with CellLoader(small_store(), batch_size=50) as one, CellLoader(small_store(), batch_size=50, seed=1) as two:
        want = [[batch.cell.numpy() for batch in loader] for loader in (one, two)]
        for a, b, first, second in zip(one, two, *want, strict=True):
            np.testing.assert_array_equal(a.cell.numpy(), first)
            np.testing.assert_array_equal(b.cell.numpy(), second)
        for a, b, first in zip(one, iter(one), want[0], strict=True):
            np.testing.assert_array_equal(a.cell.numpy(), first)
            np.testing.assert_array_equal(b.cell.numpy(), first)


def test_a_fork_after_the_first_batch_gives_the_same_cells() -> None:
    with CellLoader(small_store(), batch_size=500) as loader:
        want = [int(batch.cell.sum()) for batch in loader]
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(sender, repr([int(batch.cell.sum()) for batch in loader]).encode())
            os._exit(0)
        os.close(sender)
        with os.fdopen(receiver) as stream:
            assert stream.read() == repr(want)
        assert os.waitpid(child, 0)[1] == 0
        assert [int(batch.cell.sum()) for batch in loader] == want


def test_two_hundred_loaders_leave_no_thread_and_no_file_open() -> None:
    def cycle() -> None:
        with CellLoader(small_store(), batch_size=64) as loader:
            next(iter(loader))

    cycle()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        cycle()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= files


def test_a_batch_larger_than_the_split_is_one_short_batch() -> None:
    with CellLoader(small_store(), batch_size=10_000) as loader:
        assert [len(batch) for batch in loader] == [2700]
    with CellLoader(small_store(), batch_size=10_000, drop_last=True) as loader:
        assert list(loader) == []
        assert len(loader) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": 5_000, "shuffle": "window"}, "too small for batches of 32 cells; expected 1 MiB or more"),
        ({"memory_budget": "lots"}, "expected one such as 1GiB"),
        ({"memory_budget": 0}, "expected one such as 1GiB"),
        ({"genes": ["gene1", "CD3E"]}, r"1 of 2 genes are not in the store \(first: 'CD3E'"),
        ({"labels": ["celltype"]}, "no label 'celltype' in obs; it has cell_type, donor"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"split": [0, N_OBS]}, "has 3000 cells"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"mask": "all"}, "unknown mask"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"dtype": "float16"}, "unknown dtype"),
        ({"shuffle": "some"}, "unknown shuffle"),
        ({"binning": "thermometer"}, "unknown binning"),
        ({"binning": "counts", "target_sum": 1e4}, "not normalised"),
        ({"weights": np.ones(3)}, "expected one for each of the store's 3000 cells"),
        ({"weights": {"cell_type": {"B cell": 1}}}, "weights name 'B cell'"),
        ({"weights": -np.ones(N_OBS)}, "not negative"),
        ({"limit_cells": 0}, "limit_cells is 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught, CellLoader(small_store(), **options) as loader:
        next(iter(loader))
    assert "\n" not in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sedd-")]


def test_an_epoch_before_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch is -1"):
        CellLoader(small_store()).set_epoch(-1)


def test_a_split_without_cells_has_no_batches() -> None:
    with CellLoader(small_store(), split=[]) as loader:
        assert list(loader) == []
