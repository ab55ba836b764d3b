"""The command in surroundings that a laptop has not: no UTF-8, closed streams, a reader that goes away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import pytest
from conftest import TINY_FLAGS, make_counts

from sedd.io.verify import verify

NO_UTF8 = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def sedd(words: str, folder: Path, **surroundings: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command by a shell, whose redirections may follow it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "", **surroundings}
    command = ["bash", "-c", f"'{sys.executable}' -m sedd {words}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surroundings")
    cells = make_counts(20)
    cells.obs["类型"] = cells.obs.pop("donor")
    cells.var_names = [f"génÉ{k}" for k in range(60)]
    cells.write_h5ad(folder / "β.h5ad")
    return folder


def test_a_terminal_without_a_letter_shows_its_number(folder: Path) -> None:
    done = sedd("info β.h5ad", folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"\\u7c7b" in done.stdout and not done.stderr


def test_columns_that_are_not_ascii_are_stored_where_names_of_files_are_not_utf8(folder: Path) -> None:
    done = sedd("convert β.h5ad β.zarr", folder, **NO_UTF8)
    assert done.returncode == 0, done.stderr.decode()
    assert list(ad.read_zarr(folder / "β.zarr").obs) == ["cell_type", "depth", "类型"]


def test_closed_streams_are_none_of_the_files_that_are_written(folder: Path) -> None:
    assert sedd("convert β.h5ad closed.zarr <&- >&- 2>&-", folder).returncode == 0
    verify(folder / "closed.zarr", against=str(folder / "β.h5ad"), progress=False)


@pytest.mark.parametrize(("words", "unbuffered", "status"), [("--help", "1", 141), ("info β.h5ad", "1", 141), ("info β.h5ad", "", 0)])
def test_a_reader_that_goes_away_hears_no_error(folder: Path, words: str, unbuffered: str, status: int) -> None:
    """What ended before it was noticed is done; the rest has the status of a command that such a pipe killed."""
    done = sedd(f"{words} 2>said | true; echo ${{PIPESTATUS[0]}}", folder, PYTHONUNBUFFERED=unbuffered)
    assert done.stdout == b"%d\n" % status and (folder / "said").read_bytes() == b""


def test_a_run_whose_reader_goes_away_is_not_done(folder: Path) -> None:
    flags = " ".join([*TINY_FLAGS, "--num_epochs", "50", "--condition", "cell_type"])
    done = sedd(f"train --data_path β.h5ad --checkpoint_dir run {flags} 2>&1 | true; echo ${{PIPESTATUS[0]}}", folder)
    assert done.stdout == b"141\n"
    assert not (folder / "run" / "final.pt").exists()


def test_it_starts_once_where_its_encoding_cannot_be_chosen(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-m", "sedd", "--version"], env={**os.environ, **NO_UTF8}, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
