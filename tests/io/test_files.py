"""Sizes as people write them; files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedd.errors import UserError
from sedd.io.files import new_file, sync_tree, write_json
from sedd.options import parse_bytes

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
         "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip


@given(st.integers(1, 999), st.integers(0, 99), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " ", "  "]), st.booleans())
def test_a_size_is_its_number_times_its_unit(whole: int, hundredths: int, unit: str, gap: str, lower: bool) -> None:
    number = f"{whole}.{hundredths:02d}"
    text = f" {number}{gap}{unit} "
    assert parse_bytes(text.lower() if lower else text) == int(float(number) * UNITS[unit])
    assert parse_bytes(f"{whole}{gap}{unit}") == whole * UNITS[unit]


def test_plain_numbers_are_bytes() -> None:
    assert parse_bytes(4096) == parse_bytes("4096") == parse_bytes("4.096e3") == 4096


@pytest.mark.parametrize("text", ["", "lots", "GiB", "0", "-1GB", "1.2.3MB", "1ib", "1 PB", "nan", "inf", "1e400", "9e9TiB", 0, -5])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(UserError, match="expected one such as 1GiB"):
        parse_bytes(text)


def _fill(file: BinaryIO) -> None:
    file.write(b"two")
    raise OSError(errno.ENOSPC, "disk full")


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_appears_when_it_is_complete_and_a_failure_leaves_the_old_one(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "a b.bin"
    with new_file(path, sync=sync) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(OSError, match="full"), new_file(path, sync=sync) as file:
        _fill(file)
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["a b.bin"]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with new_file(path) as first, new_file(path) as second:
        first.write(b"1" * 1000)
        second.write(b"2" * 10)
    assert path.read_bytes() in (b"1" * 1000, b"2" * 10)
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}


def test_two_hosts_with_one_process_number_do_not_share_a_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "a"
    with ExitStack() as stack:
        for host in ("node1", "node2", "node2"):
            monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
            stack.enter_context(new_file(path)).write(host.encode())
        names = sorted(item.name for item in tmp_path.iterdir())
        assert [name[: len(".a.node1-7-")] for name in names] == [".a.node1-7-", ".a.node2-7-", ".a.node2-7-"]
        assert all(name.endswith(".part") for name in names)
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"node1"  # the last to be finished


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "\U0001f9ec" * 63])
def test_a_name_of_any_length_is_written(tmp_path: Path, name: str) -> None:
    with new_file(tmp_path / name) as file:
        file.write(b"1")
    assert [item.name for item in tmp_path.iterdir()] == [name]


def test_an_error_has_the_number_and_the_name_that_the_user_knows(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing, new_file(tmp_path / "none" / "a"):
        pass
    assert missing.value.filename == str(tmp_path / "none" / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large") as full, new_file(tmp_path / "a") as file:
            file.write(b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert full.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_every_file_and_folder_is_synced_and_a_failure_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(40):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "file").write_bytes(b"x")
    synced, really = set[int](), os.fsync

    def fsync(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        really(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    sync_tree(str(tmp_path))
    assert synced == {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))}
    last = (tmp_path / "39" / "file").stat().st_ino

    def fails(fd: int) -> None:
        if os.fstat(fd).st_ino == last:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        sync_tree(str(tmp_path))
