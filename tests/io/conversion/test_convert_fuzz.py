"""A damaged h5ad never crashes, hangs, or passes with other numbers.

HDF5 keeps no checksum of what is not compressed, so a flipped bit in a plain dataset may give another valid count; in a gzipped
one, zlib's own checksum tells. The files here are gzipped, and what is compared is the matrix.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.io.h5ads import counts, write

SCRIPT = """
import random, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import numpy as np
from sedd.errors import UserError
from sedd.io.convert import convert
from sedd.io.verify import verify
from sedd.io.store import CellStore
from tests.io.h5ads import counts
source, folder, first, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
whole, expected = source.read_bytes(), counts(30, 20)
for number in range(first, last):
    rng = random.Random(number)
    damaged = bytearray(whole)
    if number % 5 == 0:
        del damaged[rng.randrange(len(damaged)):]
    else:
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    path, output = folder / f"{number}.h5ad", folder / f"{number}.zarr"
    path.write_bytes(damaged)
    try:
        store = convert(path, output, progress=False, workers=1)
    except UserError as error:
        assert "\\n" not in str(error), (number, error)
        print(number, "refused")
    else:
        indptr, indices, data = store.read_rows(0, store.n_obs)
        same = (store.n_obs, store.n_vars) == expected.shape and all(
            np.array_equal(a, b) for a, b in ((indptr, expected.indptr), (indices, expected.indices), (data, expected.data)))
        print(number, "same" if same else "DIFFERENT")
    sys.stdout.flush()
    path.unlink()
"""


def fuzz(tmp_path: Path, n: int) -> None:
    """Damage a small file `n` times; a process does fifty, so that a crash costs little and is seen."""
    source = write(tmp_path / "source.h5ad", counts(30, 20), compression="gzip")
    script = tmp_path / "fuzz.py"
    script.write_text(SCRIPT)
    told = []
    for first in range(0, n, 50):
        done = subprocess.run(
            [sys.executable, str(script), source, str(tmp_path), str(first), str(min(n, first + 50))],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        told += done.stdout.splitlines()
        assert done.returncode == 0, (done.stdout[-200:], done.stderr[-2000:])
    assert len(told) == n
    assert not [line for line in told if line.endswith("DIFFERENT")]
    assert any(line.endswith("refused") for line in told)


def test_damaged_files_are_refused_or_read_right(tmp_path: Path) -> None:
    fuzz(tmp_path, 15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_damaged_files_are_refused_or_read_right(tmp_path: Path) -> None:
    fuzz(tmp_path, 200)
