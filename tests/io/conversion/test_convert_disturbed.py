"""A conversion that is killed, interrupted, starved or raced never leaves half a store."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from sedd.cli import main
from sedd.errors import UserError
from sedd.io.conversion import publish, shard, spill
from sedd.io.conversion.inputs import load_plan
from sedd.io.convert import convert, ensure_store
from sedd.io.store import CellStore
from sedd.io.verify import verify
from tests.io import launch
from tests.io.conversion.test_convert_killed import processes
from tests.io.h5ads import counts, write

__all__ = ["processes"]

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("source") / "a.h5ad", counts(600, 60, largest=700))


def run(processes: Any, source: str, output: str, **options: Any) -> str:
    """Convert in a process; what it told."""
    here, there = processes.Pipe()
    process = processes.Process(target=launch.run_and_tell, args=(source, output, options, there))
    process.start()
    told = str(here.recv())
    process.join()
    return told


SMALL = {
    "sedd.io.format.shards": {"CHUNK": 256, "LEAST_SHARD": 512},
    "sedd.io.conversion.publish": {"CHUNK": 256},
    "sedd.io.conversion.shard": {"CHUNK": 256},
    "sedd.io.conversion.planning": {"LARGEST_BLOCK": 500},
}


def in_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert in many small shards and blocks."""
    for module in SMALL:
        importlib.import_module(module)  # all of them first: one that is imported later would keep the small size
    for module, sizes in SMALL.items():
        for name, size in sizes.items():
            monkeypatch.setattr(f"{module}.{name}", size)


@pytest.mark.parametrize("shuffle", [False, True])
def test_resume_reads_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: bool) -> None:
    in_small_shards(monkeypatch)
    source = write(tmp_path / "a.h5ad", counts(200, 60))
    name = "spill_span" if shuffle else "make_shard"
    module = spill if shuffle else shard
    real = getattr(module, name)
    seen: list[int] = []

    def task(folder: str, number: int) -> None:
        if number == 3 and len(seen) < 5:
            seen.append(number)
            raise OSError(28, "No space left on device")
        seen.append(number)
        real(folder, number)

    task.__name__ = name
    monkeypatch.setattr(module, name, task)
    with pytest.raises(UserError, match=r"No space left.*--resume"):
        convert(source, tmp_path / "a.zarr", shuffle=shuffle, workers=1, progress=False)
    before, seen[:] = set(seen) - {3}, [-1] * 5
    convert(source, tmp_path / "a.zarr", shuffle=shuffle, workers=1, resume=True, progress=False)
    assert not before & set(seen)
    verify(tmp_path / "a.zarr", against=source)


def test_an_unfinished_conversion_is_not_resumed_with_other_settings_or_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.h5ad", counts())
    output = tmp_path / "a.zarr"

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("sedd.io.conversion.publish.build", fail)
    with pytest.raises(UserError, match=r"Input/output error"):
        convert(source, output, progress=False)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"unfinished.*--resume.*--overwrite"):
        convert(source, output, progress=False)
    with pytest.raises(UserError, match=r"settings differ.*--overwrite"):
        convert(source, output, resume=True, codec="none", progress=False)
    write(tmp_path / "a.h5ad", counts(seed=2))
    with pytest.raises(UserError, match=r"input changed.*--overwrite"):
        convert(source, output, resume=True, progress=False)
    assert Path(f"{output}.partial/shards").exists()
    plan = Path(f"{output}.partial/plan.json")
    plan.write_text(plan.read_text().replace('"n_obs"', '"cells"'))
    with pytest.raises(UserError, match=r"another version.*--overwrite"):
        convert(source, output, resume=True, progress=False)
    convert(source, output, overwrite=True, progress=False)
    verify(output, against=source)


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.h5ad", counts())
    real = shard.make_shard

    def task(folder: str, number: int) -> None:
        real(folder, number)
        os.utime(source, ns=(1, 1))

    task.__name__ = "make_shard"
    monkeypatch.setattr(shard, "make_shard", task)
    with pytest.raises(UserError, match="changed while it was converted"):
        convert(source, tmp_path / "a.zarr", progress=False)
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5ad"]


def test_ctrl_c_leaves_what_resume_needs_and_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.h5ad", counts())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sedd.io.conversion.publish.build", interrupt)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        convert(source, tmp_path / "a.zarr", progress=False)
    monkeypatch.undo()
    assert not (tmp_path / "a.zarr").exists()
    with pytest.raises(UserError, match="--resume"):
        CellStore(tmp_path / "a.zarr")
    convert(source, tmp_path / "a.zarr", resume=True, progress=False)


@pytest.mark.parametrize("append", [False, True])
def test_an_error_that_nobody_foresaw_says_what_is_kept_and_how_to_resume(
    append: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write(tmp_path / "a.h5ad", counts()), str(tmp_path / "a.zarr")
    words = ["convert", source, output]
    if append:
        assert main(words) == 0
        words = ["convert", write(tmp_path / "b.h5ad", counts(seed=1)), output, "--append"]

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("sedd.io.conversion.append.Append._build" if append else "sedd.io.conversion.publish.build", fail)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "error: MemoryError. " in said and f"What is done so far is in {output}.partial: resume with --" in said
    monkeypatch.undo()
    assert main([*words, "--resume"]) == 0
    assert not os.path.exists(f"{output}.partial")


def test_a_store_that_is_made_for_a_run_is_resumed_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.h5ad", counts())

    def fail(*_: Any) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("sedd.io.conversion.publish.build", fail)
    with pytest.raises(RuntimeError, match="unforeseen") as held:
        ensure_store(source, progress=False)
    assert held.value.__notes__ == [f"What is done so far is in {tmp_path}/a.sedd.zarr.partial: resume by the same command, or delete it."]
    monkeypatch.undo()
    assert ensure_store(source, progress=False).n_obs == 70


def test_a_second_writer_is_told_and_the_first_undisturbed(processes: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", counts(600, 60, largest=700))
    output = str(tmp_path / "a.zarr")
    pipes = [processes.Pipe() for _ in range(3)]
    running = [processes.Process(target=launch.run_and_tell, args=(source, output, {}, there)) for _, there in pipes]
    for process in running:
        process.start()
    told = sorted(str(here.recv()) for here, _ in pipes)
    for process in running:
        process.join()
    assert told[-1] == "done"
    assert all("another process is writing it" in line or "exists already" in line for line in told[:-1])
    verify(output, against=source)


def test_processes_that_ensure_one_store_share_the_work(processes: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", counts())
    running = [processes.Process(target=ensure_store, args=(source,), kwargs={"progress": False}) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.h5ad", "a.sedd.zarr"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB; skips where none may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


def test_a_full_disk_is_one_clear_error(small_disk: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", counts(2000, 300))
    with pytest.raises(UserError, match=r"No space left on device.*--resume"):
        convert(source, small_disk / "a.zarr", progress=False)
    assert [item.name for item in small_disk.iterdir()] == ["a.zarr.partial"]
    assert not list(small_disk.rglob("*.part"))


def test_a_file_size_limit_is_one_clear_error(tmp_path: Path) -> None:
    """The same for where no file system can be mounted: the system refuses to let a file grow."""
    source = write(tmp_path / "a.h5ad", counts(2000, 300))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(UserError, match=r"File too large.*--resume"):
            convert(source, tmp_path / "a.zarr", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "a.zarr").exists()
    convert(source, tmp_path / "a.zarr", resume=True, progress=False)
    verify(tmp_path / "a.zarr", against=source)


def test_a_file_size_limit_met_by_a_layer_keeps_what_is_done(tmp_path: Path) -> None:
    matrix = counts(4000, 300, density=0.01)
    source = write(tmp_path / "a.h5ad", matrix, layers={"large": counts(4000, 300, density=0.6)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, limits[1]))
        with pytest.raises(UserError, match=r"a\.zarr: cannot be written \(File too large\).*a\.zarr\.partial.*--resume"):
            convert(source, tmp_path / "a.zarr", keep_layers=["large"], progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "a.zarr").exists()
    assert list((tmp_path / "a.zarr.partial" / "shards").glob("*.npz"))
    store = convert(source, tmp_path / "a.zarr", keep_layers=["large"], resume=True, progress=False)
    assert (ad.read_zarr(store.path).layers["large"] != ad.read_h5ad(source).layers["large"]).nnz == 0
    verify(store.path, against=source)


def test_an_existing_output_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", counts())
    convert(source, tmp_path / "a.zarr", progress=False)
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        convert(source, tmp_path / "a.zarr", progress=False)
    other = write(tmp_path / "b.h5ad", counts(seed=5))
    convert(other, tmp_path / "a.zarr", overwrite=True, progress=False)
    verify(tmp_path / "a.zarr", against=other)


@pytest.mark.parametrize("there", ["folder", "file", "link", "dangling link", "foreign .partial", "another name"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_what_a_user_made_is_never_replaced_by_a_store(there: str, options: dict[str, bool], tmp_path: Path) -> None:
    source = write(tmp_path / "a.h5ad", counts())
    store, precious = tmp_path / "store.zarr", tmp_path / "precious.zarr"
    convert(source, store, progress=False)
    said = "not a Zarr store"
    if there == "folder":
        precious.mkdir()
        (precious / "thesis.txt").write_text("mine")
    elif there == "file":
        precious.write_text("mine")
    elif there.endswith("link"):
        precious.symlink_to(store if there == "link" else tmp_path / "nowhere")
        said = "is a link to .*, so it is not replaced"
    elif there == "foreign .partial":
        (tmp_path / "precious.zarr.partial").mkdir()
        (tmp_path / "precious.zarr.partial" / "thesis.txt").write_text("mine")
        said = "is a folder with thesis.txt, which sedd did not make"
    else:
        precious, said = tmp_path / "b.h5ad", "ends in .zarr. Name the output last"
    if "overwrite" not in options and there not in ("another name", "foreign .partial"):
        said = "exists already. Pass --overwrite"
    other = write(tmp_path / "b.h5ad", counts(seed=5))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, os.listdir(tmp_path)
    with pytest.raises(UserError, match=said):
        convert(other, precious, progress=False, **options)
    assert before == ({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}, os.listdir(tmp_path))


def test_a_task_of_an_abandoned_plan_makes_nothing_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = write(tmp_path / "a.h5ad", counts(seed=1)), write(tmp_path / "b.h5ad", counts(seed=2))
    folder = f"{tmp_path / 'o.zarr'}.partial"
    stragglers: list[Any] = []
    real = publish.build

    def fail(*_: Any) -> None:
        stragglers.append(load_plan(folder))
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(publish, "build", fail)
        with pytest.raises(UserError, match="Input/output error"):
            convert(first, tmp_path / "o.zarr", shuffle=True, progress=False)

    def build_late(*args: Any) -> None:
        with monkeypatch.context() as patch:  # tasks that began under the first plan, and end now
            for module in (spill, shard):
                patch.setattr(module, "load_plan", lambda _: stragglers[0])
            for task in (spill.spill_span, shard.make_shard):
                with contextlib.suppress(OSError):
                    task(folder, 0)
        real(*args)

    monkeypatch.setattr(publish, "build", build_late)
    convert(second, tmp_path / "o.zarr", shuffle=True, overwrite=True, progress=False)
    verify(tmp_path / "o.zarr", against=second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad", "o.zarr"]


@pytest.mark.slow
def test_a_worker_of_a_cluster_may_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    in_small_shards(monkeypatch)
    small = SMALL

    class InSmallShards(distributed.WorkerPlugin):  # type: ignore[name-defined,misc]
        def setup(self, worker: object) -> None:
            for module, sizes in small.items():
                for name, size in sizes.items():
                    setattr(importlib.import_module(module), name, size)

    source = write(tmp_path / "a.h5ad", counts(300, 60))
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", processes=True
    ) as cluster:
        marker = tmp_path / "died"
        with distributed.Client(cluster) as client:
            client.register_plugin(InSmallShards())  # also for the worker that takes the place of the dead one
            client.submit(die_once, str(marker), pure=False).result()
        store = convert(source, tmp_path / "a.zarr", scheduler=cluster.scheduler_address, progress=False)
    np.testing.assert_array_equal(store.cell_stats()["total"], np.asarray(counts(300, 60).sum(axis=1)).reshape(-1))
    verify(store.path, against=source)


def die_once(marker: str) -> None:
    """Take the worker down with us, the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
