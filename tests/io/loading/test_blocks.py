"""A batch for a GPU lies in one block of page-locked memory, which goes over in one copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sedd.io.convert import convert
from sedd.io.loader import CellLoader
from sedd.io.loading import buffers

FIELDS = ("tokens", "masked", "t", "cell", "library", "valid")


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Plain memory in place of page-locked, which torch makes only where there is a GPU; the sizes that were asked for."""
    sizes: list[int] = []
    real = torch.empty

    def empty(size: Any, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        sizes.append(size)
        return real(size, dtype=dtype)

    monkeypatch.setattr(buffers.torch, "empty", empty)
    return sizes


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_block_holds_the_batch_and_is_copied_once(world_size: int, pinned: list[int], tiny_h5ad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = convert(tiny_h5ad, tmp_path / "a.zarr", progress=False)
    given: dict[str, Any] = {"batch_size": 16, "labels": ["cell_type", "donor"], "world_size": world_size}
    with CellLoader(store, pin_memory=True, **given) as there, CellLoader(store, pin_memory=False, **given) as here:
        for batch, plain in zip(there, here, strict=True):
            assert batch.block is not None and plain.block is None
            copied: list[torch.Tensor] = []
            real = torch.Tensor.to

            def to(tensor: torch.Tensor, *args: Any, _real: Any = real, _copied: list[torch.Tensor] = copied, **kwargs: Any) -> torch.Tensor:
                _copied.append(tensor)
                return _real(tensor.clone(), *args, **kwargs)

            with monkeypatch.context() as patched:
                patched.setattr(torch.Tensor, "to", to)
                moved = batch.to(torch.device("cpu"))
            assert [one.data_ptr() for one in copied] == [batch.block.data_ptr()]
            own = batch.block.untyped_storage().data_ptr()
            for name in FIELDS:
                first, second, third = (getattr(one, name) for one in (batch, moved, plain))
                assert (first is None) == (second is None) == (third is None)
                if first is None:
                    continue
                assert first.untyped_storage().data_ptr() == own != second.untyped_storage().data_ptr()
                assert first.dtype == second.dtype == third.dtype
                np.testing.assert_array_equal(first.numpy(), third.numpy())
                np.testing.assert_array_equal(second.numpy(), third.numpy())
            for name in given["labels"]:
                assert torch.equal(moved.labels[name], plain.labels[name])
    assert len(pinned) == len(there)


def test_a_batch_in_plain_memory_is_moved_field_by_field(tiny_h5ad: Path, tmp_path: Path) -> None:
    store = convert(tiny_h5ad, tmp_path / "a.zarr", progress=False)
    with CellLoader(store, batch_size=16, labels=["donor"], mask=None) as loader:
        moved = next(iter(loader)).to(torch.device("meta"))
    assert {moved.tokens.device.type, moved.t.device.type, moved.labels["donor"].device.type} == {"meta"}
    assert moved.masked is None and moved.block is None
