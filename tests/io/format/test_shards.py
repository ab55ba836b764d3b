"""Shards and counts made in portions are those made at once."""

from __future__ import annotations

import io
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import zarr

from sedd.io.conversion import publish, shard
from sedd.io.convert import convert
from sedd.io.format import shards
from sedd.io.format.shards import CHUNK, CODECS, Encoder, Pen, create_vector, read_shard, shard_length
from sedd.io.format.tally import Tallier, tally
from tests.io.h5ads import counts
from tests.io.h5ads import write as write_h5ad

pytestmark = pytest.mark.filterwarnings("ignore::sedd.errors.SeddWarning")


@pytest.mark.parametrize("codec", ["lz4", "none"])
def test_a_shard_written_in_portions_is_the_one_written_at_once(tmp_path: Path, codec: str) -> None:
    values = np.random.default_rng(0).integers(0, 9, 5 * shards.CHUNK + 77).astype(np.uint16)
    files = []
    for cuts in ([], [3], [10, 11, 12], [shards.CHUNK, shards.CHUNK + 1], [shards.CHUNK - 1, 4 * shards.CHUNK + 5]):
        file = io.BytesIO()
        pen = Pen(file, Encoder("data", values.dtype, codec), 8)
        for portion in np.split(values, cuts):
            pen.write(portion)
        pen.finish()
        files.append(file.getvalue())
    assert len(set(files)) == 1
    (tmp_path / "shard").write_bytes(files[0])
    read = list(read_shard(str(tmp_path / "shard"), Encoder("data", values.dtype, codec), 8, values.size, chunks=2))
    np.testing.assert_array_equal(np.concatenate(read), values)


@pytest.mark.parametrize("real", [False, True])
def test_cells_counted_in_runs_are_those_counted_at_once(real: bool) -> None:
    matrix = counts(50, 30, largest=200, seed=3)
    indptr, indices = matrix.indptr.astype(np.int64), matrix.indices.astype(np.uint16)
    values = matrix.data.astype(np.float32 if real else np.uint16)
    whole = tally(indptr, indices, values, 30)
    parts = Tallier(50, 30, real=real)
    for at in range(0, values.size, 7):
        assert parts.add(indptr, at, indices[at : at + 7], values[at : at + 7])
    for name, expected, own in zip(whole._fields, whole, parts.result(), strict=True):
        np.testing.assert_array_equal(np.sort(own) if name == "keys" else own, np.sort(expected) if name == "keys" else expected, name)


def test_disorder_is_seen_within_and_between_runs() -> None:
    bounds, values = np.array([0, 4, 6]), np.ones(6, np.uint8)
    good, bad = np.array([1, 3, 5, 9, 0, 2], np.uint16), np.array([1, 3, 3, 9, 0, 2], np.uint16)
    for cut in range(1, 6):
        for indices, ordered in ((good, True), (bad, False)):
            counter = Tallier(2, 10)
            seen = [counter.add(bounds, at, indices[at:to], values[at:to]) for at, to in ((0, cut), (cut, 6))]
            assert all(seen) == ordered
    counter = Tallier(2, 10)
    counter.follow(3)
    assert not counter.add(bounds, 2, bad[2:], values[2:])


def test_shards_made_before_a_large_count_was_met_are_widened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shards, publish, shard):
        monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(shards, "LEAST_SHARD", 512)
    monkeypatch.setattr("sedd.io.conversion.planning.SAMPLE", 100)
    widened = []
    real = publish.widen_shard
    monkeypatch.setattr(publish, "widen_shard", lambda *args: (widened.append(args[1]), real(*args)))
    matrix = counts(600, 60).tolil()
    matrix[590, 3] = 70_000
    path = write_h5ad(tmp_path / "a.h5ad", matrix.tocsr())
    store = convert(path, tmp_path / "a.zarr", workers=1, progress=False)
    assert len(widened) > 3
    assert store.dtype == np.uint32
    np.testing.assert_array_equal(ad.read_zarr(store.path).X.toarray(), matrix.toarray())


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4"])
@pytest.mark.parametrize("name", ["data", "indices"])
def test_a_chunk_is_what_zarr_makes_of_it(codec: str, dtype: str, name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.poisson(2, 3 * CHUNK - 5).astype(dtype)
    values[:CHUNK] = rng.integers(0, 250, CHUNK)
    encoder = Encoder(name, np.dtype(dtype), codec)
    array = create_vector(zarr.open_group(tmp_path, mode="w", zarr_format=3), name, values.size, values.dtype, codec)
    array[:] = values
    shard = (tmp_path / name / "c" / "0").read_bytes()
    with (tmp_path / "own").open("w+b") as file:
        pen = Pen(file, encoder, shard_length(values.size) // CHUNK)
        for part in np.split(values, [7, CHUNK, 2 * CHUNK + 1]):
            pen.write(part)
        pen.finish()
    own = (tmp_path / "own").read_bytes()
    tail = 3 * 16 + 4
    assert sorted(_chunks(own, tail)) == sorted(_chunks(shard, tail))  # zarr may write them in another order
    np.testing.assert_array_equal(np.concatenate(list(read_shard(str(tmp_path / "own"), encoder, 3, values.size, chunks=2))), values)


def _chunks(shard: bytes, tail: int) -> list[bytes]:
    index = np.frombuffer(shard[-tail:-4], "<u8").reshape(-1, 2).astype(int)
    return [shard[at : at + size] for at, size in index]
