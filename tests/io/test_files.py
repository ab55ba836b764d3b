"""Files that appear whole or not at all, and sizes as people write them."""

from __future__ import annotations

import os
import resource
import signal
import socket
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sedd.errors import UserError
from sedd.io.convert import convert
from sedd.io.files import move_into_place, new_file, parse_bytes

FACTORS = {prefix: 1000**k for k, prefix in enumerate(("", "k", "m", "g", "t"))}
FACTORS |= {f"{prefix}i": 1024**k for k, prefix in enumerate(("", "k", "m", "g", "t")) if prefix}

numbers = st.one_of(
    st.integers(1, 1 << 60).map(str),
    st.decimals(1, 10**6, places=3).map(str),
    st.builds("{}e{}".format, st.integers(1, 999), st.integers(0, 12)),
)


@given(numbers, st.sampled_from(sorted(FACTORS)), st.booleans(), st.sampled_from(["", " ", "  "]), st.booleans())
def test_a_size_is_read_as_people_write_it(number: str, unit: str, b: bool, space: str, upper: bool) -> None:
    text = f"{space}{number}{space}{unit}{'b' if b else ''}{space}"
    assert parse_bytes(text.upper() if upper else text) == int(Decimal(number) * FACTORS[unit])


@given(st.integers(1, 1 << 62))
def test_a_number_is_bytes(number: int) -> None:
    assert parse_bytes(number) == number


@pytest.mark.parametrize(
    "text", ["lots", "", "b", "GiB", "5i", "5ib", "5 pounds", "5mm", "inf", "nan", "1e999999999", "1..5g", "1GiB2"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a size; expected a size such as 2GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [0, -1, "-5MB", "0GiB", "0.4", "1e-30g"])
def test_a_size_is_more_than_nothing(size: str | int) -> None:
    with pytest.raises(UserError, match="more than nothing"):
        parse_bytes(size)


@given(st.integers(1, (64 << 20) - 1))
def test_a_conversion_needs_64_mib(size: int) -> None:
    assert parse_bytes(size) == size
    with pytest.raises(UserError, match="at least 64MiB"):
        convert("none.h5ad", "none.zarr", memory_budget=size)


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with new_file(path, sync=True) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert sorted(item.suffix for item in tmp_path.iterdir()) == ["", ".part"]
    assert path.read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    (tmp_path / "b").touch()
    assert path.stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no"), KeyboardInterrupt()])
def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail() -> None:
        with new_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


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
        assert len(names) == 3
        assert [name.split(".")[2:4] for name in names] == [["node1", "7"], ["node2", "7"], ["node2", "7"]]
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
        with pytest.raises(OSError, match="File too large"), new_file(tmp_path / "a") as file:
            file.write(b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_moved_over_another_or_the_other_stays(tmp_path: Path) -> None:
    for name in ("made", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(FileNotFoundError):
        move_into_place(tmp_path / "none", tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "there"
    move_into_place(tmp_path / "made", tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "made"
    assert [item.name for item in tmp_path.iterdir()] == ["there"]
