"""Inputs and outputs on object storage, on a local S3 server.

The client runs in a process of its own: its sessions are closed when the interpreter ends, which pytest would take for a leak.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.io.h5ads import counts, write
from tests.io.input.formats import WRITERS, cells

SCRIPT = """
import sys, warnings
from pathlib import Path
import s3fs
from sedd.errors import UserError
from sedd.io.convert import convert
from sedd.io.store import CellStore, store_facts
from sedd.io.verify import verify

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
fs = s3fs.S3FileSystem()
fs.mkdir("s3://cells")
fs.put(str(folder / "a.h5ad"), "s3://cells/a.h5ad")

def refusal(*args, **kwargs):
    try:
        convert(*args, progress=False, **kwargs)
    except UserError as error:
        return str(error)

store = convert("s3://cells/a.h5ad", "s3://cells/a.zarr", shuffle=True, progress=False)
assert isinstance(store, CellStore)
indptr, _, data = store.read_rows(0, 70)
assert indptr[-1] == data.size == store.nnz
assert data.sum() == store.cell_stats()["total"].sum()
assert verify("s3://cells/a.zarr", against="s3://cells/a.h5ad")["changed"] == []
assert store_facts("s3://cells/a.zarr")["cells"] == 70
assert "exists already" in refusal("s3://cells/a.h5ad", "s3://cells/a.zarr")
convert(folder / "a.h5ad", "s3://cells/a.zarr", overwrite=True, progress=False)
assert verify("s3://cells/a.zarr", against=folder / "a.h5ad")["cells"] == 70
assert "s3://cells/none.h5ad: there is no such file" in refusal("s3://cells/none.h5ad", folder / "b.zarr")
fs.put(str(folder / "plain.zarr"), "s3://cells/plain.zarr", recursive=True)
store = convert("s3://cells/plain.zarr", folder / "c.zarr", progress=False)
assert verify(store.path, against=folder / "plain.zarr")["cells"] == 70
assert convert("s3://cells/plain.zarr", folder / "c.zarr", resume=True, progress=False).path == store.path
print("done")
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_store_is_made_from_and_on_object_storage(tmp_path: Path) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    pytest.importorskip("s3fs")
    write(tmp_path / "a.h5ad", counts(), compression="gzip")
    WRITERS["zarr v3"](tmp_path / "plain", cells(counts()))
    server.start()
    try:
        _, port = server.get_host_and_port()
        settings = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "TMPDIR": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
    finally:
        server.stop()
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.h5ad", "c.zarr", "plain.zarr"]
