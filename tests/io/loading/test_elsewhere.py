"""The loader on a Dask cluster and on an object store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from sedd.io.loader import CellLoader
from tests.io.stores import small_store


@pytest.fixture
def client() -> Iterator[object]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        distributed.Client(cluster) as made,
    ):
        yield made


@pytest.mark.parametrize("mode", ["full", "window"])
def test_a_dask_cluster_reads_windows_to_the_same_batches_byte_for_byte(client: object, mode: str) -> None:
    options = {"batch_size": 200, "labels": ["cell_type"], "shuffle": mode}
    with CellLoader(small_store(), **options) as here, CellLoader(small_store(), client=client, **options) as there:
        for one, other in zip(here, there, strict=True):
            for name in ("tokens", "masked", "t", "cell", "library"):
                assert torch.equal(getattr(one, name), getattr(other, name))


READ_S3 = """
import sys
import s3fs
from sedd.io.loader import CellLoader

s3fs.S3FileSystem().mkdir("atlases")
s3fs.S3FileSystem().put(sys.argv[1], "atlases/small.zarr", recursive=True)
with CellLoader(sys.argv[1], batch_size=200) as here, CellLoader("s3://atlases/small.zarr", batch_size=200) as there:
    pairs = list(zip(here, there, strict=True))
assert len(pairs) == len(here)
assert all(a.tokens.equal(b.tokens) and a.masked.equal(b.masked) and a.cell.equal(b.cell) for a, b in pairs)
print("the same")
"""


@pytest.mark.slow
def test_a_store_on_s3_gives_the_same_batches() -> None:
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    try:  # in a process of its own: the S3 client leaves its sessions to the garbage collector
        done = subprocess.run(
            [sys.executable, "-c", READ_S3, str(small_store())],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=200,
        )
    finally:
        server.stop()
    assert done.stdout == "the same\n", done.stderr
