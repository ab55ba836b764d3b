"""Damaged inputs of every format: converted as they are, or one clear error and nothing left behind; never a traceback."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import h5py
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sedd.errors import UserError
from sedd.io.convert import convert
from tests.io.h5ads import counts
from tests.io.input.formats import WRITERS, cells

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning", "ignore::zarr.errors.ZarrUserWarning")

HDF5 = ["h5ad", "10x v3", "10x v2", "h5mu", "loom"]


def converted_or_refused(path: Path, folder: Path) -> str | None:
    """Return what the error says, if it is one."""
    said = None
    try:
        convert(path, folder / "out.zarr", progress=False)
    except UserError as error:
        said = str(error)
    left = [item for item in folder.iterdir() if item.name.startswith("out")]
    assert len(left) == (said is None)
    assert said is None or "\n" not in said
    for item in left:
        shutil.rmtree(item)
    return said


def nodes(root: h5py.Group) -> list[str]:
    found: list[str] = []
    root.visit(found.append)
    return sorted(found)


@pytest.mark.parametrize("kind", ["h5ad", *(pytest.param(kind, marks=pytest.mark.slow) for kind in HDF5[1:])])
def test_each_element_that_is_not_there_is_named_or_not_needed(tmp_path: Path, kind: str) -> None:
    whole = Path(WRITERS[kind](tmp_path / "in", cells(counts(20, 9))))
    with h5py.File(whole) as file:
        names = nodes(file)
    refused = 0
    for name in names:
        path = tmp_path / f"less{whole.suffix}"
        shutil.copy(whole, path)
        with h5py.File(path, "a") as file:
            del file[name]
        said = converted_or_refused(path, tmp_path)
        refused += said is not None
        assert said is None or (str(path) in said and "opy" not in said), name
    assert refused >= 3


@pytest.mark.parametrize("kind", HDF5)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_element_of_another_kind_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = Path(WRITERS[kind](folder / "in", cells(counts(20, 9))))
    choose = random.Random(seed)
    with h5py.File(path, "a") as file:
        name = choose.choice(nodes(file))
        attributes = dict(file[name].attrs)
        del file[name]
        new = choose.choice([3.5, b"text", [1, 2, 3], [[1.5, 2.0]], [b"a"] * 20, None])
        if new is None:
            file.create_group(name)
        else:
            file[name] = new
        if choose.random() < 0.5:
            file[name].attrs.update(attributes)
    converted_or_refused(path, folder)


@pytest.mark.parametrize("kind", HDF5)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_changed_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = Path(WRITERS[kind](folder / "in", cells(counts(20, 9))))
    raw, choose = bytearray(path.read_bytes()), random.Random(seed)
    if choose.random() < 0.3:
        raw = raw[: choose.randrange(len(raw))]
    else:
        for _ in range(choose.randrange(1, 40)):
            raw[choose.randrange(len(raw))] = choose.randrange(256)
    path.write_bytes(raw)
    converted_or_refused(path, folder)


@pytest.mark.parametrize("kind", [pytest.param("zarr v2", marks=pytest.mark.slow), "zarr v3"])
def test_each_array_that_is_not_there_is_named_or_not_needed(tmp_path: Path, kind: str) -> None:
    whole = Path(WRITERS[kind](tmp_path / "in", cells(counts(20, 9))))
    names = [name for name, _ in zarr.open_group(whole, mode="r").members(max_depth=None)]
    refused = 0
    for name in names:
        path = tmp_path / "less.zarr"
        shutil.copytree(whole, path)
        shutil.rmtree(path / name)
        for consolidated in (path / ".zmetadata",):
            consolidated.unlink(missing_ok=True)
        refused += converted_or_refused(path, tmp_path) is not None
        shutil.rmtree(path)
    assert refused >= 3


@pytest.mark.parametrize("kind", ["mtx v3", "mtx v2"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_folder_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int) -> None:
    folder = tmp_path_factory.mktemp("any")
    path = Path(WRITERS[kind](folder / "in", cells(counts(20, 9))))
    choose = random.Random(seed)
    file = choose.choice(sorted((path if path.is_dir() else path.parent).iterdir()))
    raw = bytearray(file.read_bytes())
    action = choose.randrange(4)
    if action == 0:
        file.unlink()
    elif action == 1:
        file.write_bytes(raw[: choose.randrange(len(raw))])
    elif action == 2:
        for _ in range(choose.randrange(1, 20)):
            raw[choose.randrange(len(raw))] = choose.randrange(256)
        file.write_bytes(raw)
    else:
        lines = raw.split(b"\n")
        lines.insert(choose.randrange(len(lines)), choose.choice([b"-1 5 2", b"x y z", b"\t\t", b"1 1 nan"]))
        file.write_bytes(b"\n".join(lines))
    converted_or_refused(path, folder)
