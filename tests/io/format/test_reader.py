from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from sedd.errors import SeddWarning
from sedd.io.format.codec import available
from sedd.io.format.reader import ChunkReader
from sedd.io.loading.rows import RowReader, WholeStore
from sedd.io.store import CellStore
from tests.io.stores import N_OBS, counts, small_store


def read_all(reader: ChunkReader) -> np.ndarray:
    out = np.full(reader.n_chunks * reader.chunk, 99, reader.dtype)
    chunks = np.arange(reader.n_chunks)
    reader.read(chunks, out, chunks * reader.chunk)
    return out[: reader.size]


CODECS = {
    "lz4": [BloscCodec(typesize=2, cname="lz4", shuffle="shuffle"), Crc32cCodec()],
    "blosc-zstd": [BloscCodec(typesize=2, cname="zstd", shuffle="bitshuffle"), Crc32cCodec()],
    "zstd": [ZstdCodec(level=1), Crc32cCodec()],
    "unchecked": [ZstdCodec(level=1)],
    "none": [Crc32cCodec()],
}


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "float32"])
def test_direct_reads_equal_zarr_python(tmp_path: Path, codec: str, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, 10_000).astype(dtype)
    values[3000:4000] = 0  # chunks of nothing but the fill value are not stored
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=values.shape, chunks=(256,), shards=(2048,), dtype=dtype, compressors=CODECS[codec]
    )
    array[:] = values
    reader = ChunkReader(array, name="a")
    assert reader.direct
    np.testing.assert_array_equal(read_all(reader), array[:])
    chosen = np.array([0, 1, 7, 8, 12, 30])
    out = np.empty(chosen.size * 256, dtype)
    reader.read(chosen, out, np.arange(chosen.size) * 256)
    np.testing.assert_array_equal(out, np.concatenate([values[c * 256 : (c + 1) * 256] for c in chosen]))
    general = ChunkReader(array, name="a", direct=False)
    np.testing.assert_array_equal(read_all(general), values)


@pytest.mark.parametrize("other", ["gzip", "unsharded"])
def test_what_is_not_known_is_left_to_zarr_python(tmp_path: Path, other: str) -> None:
    values = np.arange(5000, dtype=np.uint16)
    layout: dict = {"compressors": [GzipCodec()], "shards": (2048,)} if other == "gzip" else {}
    array = zarr.create_array(tmp_path / "a.zarr", shape=values.shape, chunks=(256,), dtype="uint16", **layout)
    array[:] = values
    reader = ChunkReader(array, name="a")
    assert not reader.direct
    np.testing.assert_array_equal(read_all(reader), values)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("kind", [RowReader, WholeStore])
def test_rows_are_those_of_the_matrix_in_any_order(kind: type[RowReader], direct: bool) -> None:
    reader = kind(CellStore(small_store()), direct=direct)
    assert reader.direct == direct
    cells = np.array([11, 7, N_OBS - 1, 0, 2999, 11, 1500, *range(600, 700)])
    for rows in (reader.read(cells), reader.read(cells).compact(), reader.read(cells)):
        for i, cell in enumerate(cells):
            dense = np.zeros(counts().shape[1], int)
            part = slice(rows.starts[i], rows.stops[i])
            dense[rows.indices[part]] = rows.data[part]
            np.testing.assert_array_equal(dense, counts()[cell])
    assert reader.read(np.empty(0, np.int64)).starts.size == 0


def test_the_whole_store_is_read_once() -> None:
    reader = WholeStore(CellStore(small_store()))
    reader.read(np.arange(N_OBS))
    once = reader.bytes_read
    reader.read(np.random.default_rng(0).permutation(N_OBS))
    assert reader.bytes_read == once
    shards = sum(f.stat().st_size for name in ("data", "indices") for f in (small_store() / "X" / name / "c").iterdir())
    assert 0.9 * shards < once <= shards


def copy_store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_store(), tmp_path / "copy.zarr"))


def test_a_flipped_byte_is_reported_with_file_and_chunk(tmp_path: Path) -> None:
    store = copy_store(tmp_path)
    shard = store / "X" / "data" / "c" / "0"
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match=r"X/data: chunk 0 in shard .*c/0: the checksum is wrong; run `sedd verify`"):
        RowReader(CellStore(store)).read(np.arange(5))
    with pytest.raises(ValueError, match="cannot be read"):
        RowReader(CellStore(store), direct=False).read(np.arange(5))


def test_a_damaged_index_a_truncated_and_a_missing_shard_are_reported(tmp_path: Path) -> None:
    store = copy_store(tmp_path)
    shard = store / "X" / "indices" / "c" / "0"
    raw = bytearray(shard.read_bytes())
    shard.write_bytes(raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
    with pytest.raises(ValueError, match="checksum of its index"):
        RowReader(CellStore(store)).read(np.arange(5))
    shard.write_bytes(raw[:1000])
    with pytest.raises(ValueError, match="truncated|index is wrong"):
        RowReader(CellStore(store)).read(np.arange(5))
    reader = RowReader(CellStore(copy_store(tmp_path / "again")))
    reader.read(np.arange(5))  # with the index in memory, a shard that is cut off later
    shard = tmp_path / "again" / "copy.zarr" / "X" / "data" / "c" / "0"
    os.truncate(shard, 50)
    with pytest.raises(ValueError, match="truncated"):
        reader.read(np.arange(5))
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard .* is missing; run `sedd verify`"):
        reader.read(np.arange(5))


def test_a_reader_leaves_no_file_open() -> None:
    reader = RowReader(CellStore(small_store()))
    reader.read(np.arange(100))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        reader.read(np.arange(100))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_slow_path_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_: object) -> None:
        raise OSError("no such library")

    available.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", hidden)
    try:
        with pytest.warns(SeddWarning, match="several times slower.*no such library"):
            assert not available()
        assert not available()  # the second time without a warning, which would be an error
    finally:
        available.cache_clear()
