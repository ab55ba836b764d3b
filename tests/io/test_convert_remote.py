"""Inputs and outputs on object storage, on a local S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sedd.errors import UserError
from sedd.io.convert import convert
from sedd.io.store import CellStore, describe
from sedd.io.verify import verify
from tests.io.h5ads import counts, write

pytestmark = [
    pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """URL of an empty bucket on a server of our own."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}",
        "TMPDIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", None)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"cells-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(f"s3://{name}")
    yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_store_is_made_from_and_on_object_storage(bucket: str, tmp_path: Path) -> None:
    import s3fs

    local = write(tmp_path / "a.h5ad", counts(), compression="gzip")
    s3fs.S3FileSystem().put(local, f"{bucket}/a.h5ad")
    store = convert(f"{bucket}/a.h5ad", f"{bucket}/a.zarr", shuffle=True, progress=False)
    assert store is not None
    assert isinstance(store, CellStore)
    np.testing.assert_array_equal(store.cell_stats()["total"].sum(), counts().sum())
    indptr, _, data = store.read_rows(0, 70)
    assert indptr[-1] == data.size == store.nnz
    assert verify(f"{bucket}/a.zarr", against=f"{bucket}/a.h5ad")["changed"] == []
    assert describe(f"{bucket}/a.zarr")["cells"] == 70
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        convert(f"{bucket}/a.h5ad", f"{bucket}/a.zarr", progress=False)
    convert(local, f"{bucket}/a.zarr", overwrite=True, progress=False)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.h5ad"]


def test_a_remote_file_that_is_not_there_is_named(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.h5ad"):
        convert(f"{bucket}/none.h5ad", tmp_path / "a.zarr", progress=False)
