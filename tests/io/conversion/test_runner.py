"""Tasks on threads beside the work of the thread that waits for them."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import pytest

from sedd.errors import UserError
from sedd.io.conversion.runner import TaskRunner
from sedd.io.convert import convert
from tests.io.h5ads import counts, write


def test_warnings_are_as_they_were_though_a_task_compiles_meanwhile() -> None:
    compiles, resume, left = threading.Event(), threading.Event(), threading.Event()

    def compiling() -> None:  # as numba does, in the thread of a task
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            compiles.set()
            assert resume.wait(30)
        left.set()

    def tables() -> None:
        assert compiles.wait(30)
        with warnings.catch_warnings():  # entered while the task has its own filters, left after it restored those before
            warnings.simplefilter("ignore")
            resume.set()
            assert left.wait(30)
            warnings.warn_explicit("names repeat", UserWarning, "/usr/lib/site-packages/anndata/utils.py", 295)

    filters = list(warnings.filters)
    TaskRunner(workers=1, scheduler=None, progress=False).run(compiling, [()], [1.0], title="", meanwhile=tables)
    assert list(warnings.filters) == filters
    with pytest.warns(UserWarning, match="seen"):
        warnings.warn("seen", UserWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "there is no sbatch here"), ({"scheduler": "tcp://127.0.0.1:1"}, "leave it or --scheduler out")],
)
def test_workers_of_a_slurm_that_is_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    write(tmp_path / "cells.h5ad", counts())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "cells.h5ad", tmp_path / "cells.zarr", slurm_workers=2, progress=False, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]
