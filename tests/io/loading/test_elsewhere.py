"""The loader on a Dask cluster and on an object store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import fsspec
import numpy as np
import pytest
import torch
import zarr

from sedd.errors import DamagedFileError
from sedd.io.format import object_store, reader
from sedd.io.format.object_store import RemoteFiles
from sedd.io.format.reader import ChunkReader
from sedd.io.loader import CellLoader
from sedd.io.loading import pipeline
from sedd.io.plan import EpochOrder
from sedd.io.store import CellStore
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


class Bucket:
    """Reads what lies in fsspec's memory, as `object_store._Bucket` reads what lies on S3."""

    def tail(self, path: str, size: int) -> tuple[int, bytes]:
        there = fsspec.filesystem("memory").cat_file(path)
        return len(there), there[-size:]

    def read(self, path: str, start: int, stop: int) -> bytes:
        return bytes(fsspec.filesystem("memory").cat_file(path)[start:stop])


@pytest.mark.parametrize("by", ["fsspec", "one request after another, many at once"])
def test_a_window_of_a_remote_store_is_one_read_of_each_array_and_damage_is_told(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    if by != "fsspec":
        monkeypatch.setattr(object_store, "_bucket", lambda files, path: Bucket())
        monkeypatch.setattr(reader, "_SCRATCH", 1)  # so that a read is decoded bit by bit
    memory.put(str(small_store()), "/atlases/small.zarr", recursive=True)
    asked: list[int] = []
    real = RemoteFiles.read
    monkeypatch.setattr(RemoteFiles, "read", lambda self, names, *more: asked.append(len(names)) or real(self, names, *more))
    options = {"batch_size": 200, "shuffle": "window"}
    try:
        with CellLoader(small_store(), **options) as here, CellLoader("memory://atlases/small.zarr", **options) as there:
            for one, other in zip(here, there, strict=True):
                assert one.tokens.equal(other.tokens) and one.masked.equal(other.masked) and one.cell.equal(other.cell)
        array = zarr.open_array("memory://atlases/small.zarr/X/data", mode="r")
        there, here = ChunkReader(array, name="data"), ChunkReader(array, name="data", direct=False)
        assert (there.direct, here.direct) == (True, False)
        asked.clear()
        assert np.array_equal(there.read_range(0, there.size), here.read_range(0, here.size))
        assert there.bytes_read > 0
        assert len(asked) == 1 and asked[0] <= 2  # all chunks as one range of each shard
        apart = np.arange(0, there.n_chunks, 2)  # no two are neighbours: as many ranges
        found = [np.zeros(apart.size * there.chunk, there.dtype) for _ in range(2)]
        for one, out in zip((there, here), found, strict=True):
            one.read(apart, out, np.arange(apart.size) * there.chunk)
        assert np.array_equal(*found) and asked[-1] == apart.size > 2
        path = "/atlases/small.zarr/X/data/c/0"
        whole = memory.cat_file(path)
        for spoilt, said in ((whole[:100], "truncated"), (whole[:-4] + b"abcd", "checksum"), (b"x" * 40 + whole[40:], "checksum|damaged"), (None, "missing")):
            memory.rm_file(path) if spoilt is None else memory.pipe_file(path, spoilt)
            with pytest.raises(DamagedFileError, match=said):
                ChunkReader(array, name="data").read_range(0, 10)
    finally:
        memory.rm("/atlases", recursive=True)


def test_more_threads_than_windows_that_fit_read_each_byte_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpochOrder, "window", 500)
    monkeypatch.setattr(pipeline, "_MIN_RUN", 1)
    store = CellStore(small_store())
    three_windows = 3 * 500 * store.nnz // store.n_obs * sum(store.x_arrays[name].dtype.itemsize for name in ("indices", "data"))
    batches, read = {}, {}
    for threads, memory_budget in ((1, "1GiB"), (6, 3 * three_windows)):
        with CellLoader(store, batch_size=200, shuffle="window", threads=threads, memory_budget=memory_budget) as loader:
            batches[threads] = list(loader)
            read[threads] = loader.bytes_read
    assert read[6] < 1.2 * read[1]  # two threads may both ask for an index
    assert all(a.tokens.equal(b.tokens) and a.cell.equal(b.cell) for a, b in zip(batches[1], batches[6], strict=True))


READ_S3 = """
import sys
if sys.argv[2] != "obstore":
    sys.modules["obstore"] = None
import s3fs
from sedd.io.format import object_store
from sedd.io.loader import CellLoader

s3fs.S3FileSystem().mkdir(sys.argv[2])
s3fs.S3FileSystem().put(sys.argv[1], sys.argv[2] + "/small.zarr", recursive=True)
with CellLoader(sys.argv[1], batch_size=200) as here, CellLoader(f"s3://{sys.argv[2]}/small.zarr", batch_size=200) as there:
    pairs = list(zip(here, there, strict=True))
assert len(pairs) == len(here)
assert all(a.tokens.equal(b.tokens) and a.masked.equal(b.masked) and a.cell.equal(b.cell) for a, b in pairs)
assert object_store._Bucket.started is not None if sys.argv[2] == "obstore" else object_store._Bucket.started is None
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", ["obstore", "s3fs"])
def test_a_store_on_s3_gives_the_same_batches(by: str) -> None:
    if by == "obstore":
        pytest.importorskip("obstore")
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
            [sys.executable, "-c", READ_S3, str(small_store()), by],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=200,
        )
    finally:
        server.stop()
    assert done.stdout == "the same\n", done.stderr
