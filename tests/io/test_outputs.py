"""Who may write an output, and what is never replaced or deleted."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing as mp
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sedd.errors import UserError
from sedd.io import locks
from sedd.io.files import new_file
from sedd.io.outputs import check_replaceable, clear, move_into_place, only_writer, only_writer_in

LEFT = ".best.pt.node1-7-0123abcd.part"


def test_a_folder_is_moved_over_another_or_the_other_stays(tmp_path: Path) -> None:
    for name in ("made", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with only_writer(tmp_path / "there", wait=False):
        with pytest.raises(FileNotFoundError):
            move_into_place(tmp_path / "none", tmp_path / "there")
        assert (tmp_path / "there" / "file").read_text() == "there"
        move_into_place(tmp_path / "made", tmp_path / "there")
        assert (tmp_path / "there" / "file").read_text() == "made"
    assert [item.name for item in tmp_path.iterdir()] == ["there"]


def test_what_was_moved_aside_survives_an_interrupt_and_is_never_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("made", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with only_writer(tmp_path / "there", wait=False), monkeypatch.context() as patch:
        patch.setattr("sedd.io.outputs.exchange", lambda *_: False)
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            move_into_place(tmp_path / "made", tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "there"
    with only_writer(tmp_path / "there", wait=False) as folder:
        os.rename(tmp_path / "there", f"{folder}/replaced")  # and here the process would be killed
        clear(folder)
    with only_writer(tmp_path / "there", wait=False):
        assert (tmp_path / "there" / "file").read_text() == "there"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["made", "there"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_partial_folder_that_is_not_ours_is_left_alone(kind: str, tmp_path: Path) -> None:
    folder, mine = tmp_path / "a.zarr.partial", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    if kind == "folder":
        mine.rename(folder)
    elif kind == "file":
        folder.write_text("mine")
    else:
        folder.symlink_to(mine)
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(UserError, match=f"a.zarr.partial: is a {kind}.*Move it, or choose another output"),
        only_writer(tmp_path / "a.zarr", wait=False),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["lock", "plan.json", "task.json"])
def test_a_partial_folder_that_is_ours_is_known(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a.zarr.partial"
    folder.mkdir()
    for own in (name, "shards.bin"):
        (folder / own).touch()
    with only_writer(tmp_path / "a.zarr", wait=False):
        clear(str(folder))
    assert not list(tmp_path.iterdir())


def test_half_written_files_of_the_dead_are_removed_and_no_others(tmp_path: Path) -> None:
    others = [".best.pt.part", ".best.pt.node1-7-0123abcd.part.old", "best.pt", ".best.pt.node1-x-0123abcd.part"]
    for name in (*others, LEFT):
        (tmp_path / name).touch()
    with only_writer_in(tmp_path), new_file(tmp_path / "next.pt") as file:
        file.write(b"1")
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([*others, "next.pt"])


@pytest.mark.parametrize("kind", ["file", "store"])
def test_links_and_what_is_of_another_kind_are_not_replaced(kind: Any, tmp_path: Path) -> None:
    file, folder, store, empty = (tmp_path / name for name in ("file", "folder", "store", "empty"))
    file.write_text("mine")
    for path in (folder, store, empty):
        path.mkdir()
    (folder / "thesis.txt").write_text("mine")
    (store / "zarr.json").write_text("{}")
    for target in (file, folder, store, tmp_path / "nowhere"):
        link = tmp_path / f"link_to_{target.name}"
        link.symlink_to(target)
        with pytest.raises(UserError, match=f"is a link to .*{target.name}, so it is not replaced. Name that"):
            check_replaceable(link, kind)
    good = {file, tmp_path / "none"} if kind == "file" else {store, empty, tmp_path / "none"}
    for path in (file, folder, store, empty, tmp_path / "none"):
        if path in good:
            check_replaceable(path, kind)
        else:
            with pytest.raises(
                UserError, match=f"is not a {'file' if kind == 'file' else 'Zarr store'}, so it is not replaced"
            ):
                check_replaceable(path, kind)


# -- where flock does not work ---------------------------------------------------------------------------------------


@pytest.fixture(params=locks.UNSUPPORTED)
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks, and owners whose hearts beat fast; also for processes forked from this one."""

    def refuse(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    monkeypatch.setattr(locks, "SILENCE", 1.0)


def hold(output: str, pipe: Any) -> None:
    """Hold the right to write `output` until told to let go."""
    try:
        with only_writer(output, wait=False):
            pipe.send("held")
            pipe.recv()
    except UserError as error:
        pipe.send(str(error))


def holder(output: Path) -> tuple[Any, Any]:
    """A process that holds the right to write `output`."""
    context = mp.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(str(output), there))
    process.start()
    assert here.poll(20)
    return process, here


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of a fork beside threads
def test_without_flock_one_writes_and_the_living_are_told_from_the_dead(no_flock: None, tmp_path: Path) -> None:
    output = tmp_path / "a.zarr"
    process, pipe = holder(output)
    assert pipe.recv() == "held"
    for _ in range(2):
        with (
            pytest.raises(UserError, match=rf"another process is writing it \(\S+ process {process.pid}\)"),
            only_writer(output, wait=False),
        ):
            pass
    pipe.send("go")
    process.join()
    assert list(tmp_path.iterdir()) == []

    process, pipe = holder(output)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "a.zarr.partial" / "lock.held").exists()
    start = time.monotonic()
    with only_writer(output, wait=False) as folder:
        assert 1 <= time.monotonic() - start < 10
        assert sorted(os.listdir(folder)) == ["lock", "lock.held"]
        with pytest.raises(UserError, match="another process"), only_writer(output, wait=False):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_without_flock_of_many_that_find_a_dead_owner_one_takes_over(no_flock: None, tmp_path: Path) -> None:
    output = tmp_path / "a.zarr"
    process, _ = holder(output)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    context = mp.get_context("fork")
    running = []
    for _ in range(6):
        here, there = context.Pipe()
        running.append((context.Process(target=hold, args=(str(output), there)), here))
        running[-1][0].start()
    told = []
    for _, here in running:
        assert here.poll(30)
        told.append(here.recv())
    assert sum(text == "held" for text in told) == 1
    assert all("another process is writing it" in text for text in told if text != "held")
    for (one, here), text in zip(running, told, strict=True):
        if text == "held":
            here.send("go")
        one.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_without_flock_who_waits_goes_on_when_the_other_is_done(no_flock: None, tmp_path: Path) -> None:
    process, pipe = holder(tmp_path / "a.zarr")
    context = mp.get_context("fork")
    context.Process(target=lambda: (time.sleep(1), pipe.send("go")), daemon=True).start()
    with only_writer(tmp_path / "a.zarr", wait=True):
        process.join(10)
        assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match=r"a: cannot be locked \(Input/output error\)"),
        only_writer(tmp_path / "a", wait=False),
    ):
        pass
