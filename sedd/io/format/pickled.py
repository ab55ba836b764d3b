"""What a checkpoint says of itself, checked before torch is let near it.

`torch.load(weights_only=True)` runs no program of the file, but it believes the file's own list of contents: a storage that is said to be longer
than its bytes is read past their end, a tensor that repeats one number takes the memory of all, and `bytearray(2**40)` is made as asked.
So the list, which is a pickle of a few kinds of steps, is gone through here first, with stand-ins for everything that it may name.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4, "ShortStorage": 2,
    "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1,
}  # fmt: skip
"""Kinds of storages and the bytes of one of their numbers."""
_STEPS = {
    "PROTO", "STOP", "GLOBAL", "REDUCE", "BINPERSID", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
}  # fmt: skip
"""What `torch.save` writes of tensors, numbers, strings, None, lists and dicts."""


class _Storage(NamedTuple):
    size: int  # numbers in it


def check_contents(path: Path) -> None:
    """Check that the contents of a checkpoint are tensors and plain data, and no more than the file holds.

    Raises
    ------
    pickle.UnpicklingError
        If something else is named, whose making could run a program.
    ValueError
        If it is damaged: what the list says is not what is there.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        lists = [one for one in members if one.filename.split("/")[1:] == ["data.pkl"]]
        if len(lists) != 1 or len({one.filename for one in members}) < len(members):
            raise ValueError("it does not hold one list of contents")
        if any(one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size for one in members):
            raise ValueError("parts of it are compressed, which those of a checkpoint are not")
        folder = lists[0].filename.removesuffix("data.pkl")
        sizes = {one.filename.removeprefix(f"{folder}data/"): one.file_size for one in members}
        listed = archive.read(lists[0])
    for step, argument, _ in pickletools.genops(listed):
        if step.name not in _STEPS:
            raise pickle.UnpicklingError(f"the step {step.name}")
        if step.name == "LONG_BINPUT" and int(argument or 0) > len(listed):  # the reader would make room for as many
            raise ValueError("its list of contents is numbered beyond its length")
    _Reader(io.BytesIO(listed), sizes).load()


class _Reader(pickle.Unpickler):
    """Goes through a list of contents without making any of them."""

    def __init__(self, file: io.BytesIO, sizes: dict[str, int]) -> None:
        super().__init__(file)
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for what is named."""
        if module == "torch" and name in _BYTES:
            return name
        found: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _check_tensor, ("collections", "OrderedDict"): dict,
        }  # fmt: skip
        if (module, name) not in found:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        """Return a storage, which must be as long as its bytes."""
        word, kind, key, _, size = reference
        if word != "storage" or size * _BYTES[kind] != self._sizes[key]:
            raise ValueError(f"storage {str(key)[:20]} is said to have {size} numbers, and has {self._sizes.get(key)} bytes")
        return _Storage(size)


def _check_tensor(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> None:
    if offset < 0 or len(shape) != len(strides) or min((*shape, *strides), default=0) < 0:
        _wrong(shape)
    if math.prod(shape) and (
        math.prod(shape) > storage.size or offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) >= storage.size
    ):
        _wrong(shape)


def _wrong(shape: tuple[int, ...]) -> NoReturn:
    raise ValueError(f"a tensor of shape {str(shape)[:60]} is larger than its numbers")
