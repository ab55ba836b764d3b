"""Memory that is used again once nobody looks at it.

A batch of 512 cells of 20,000 genes is 10 MB; asking the system for that much anew costs more page faults than filling it
costs work. A slab is lent as a NumPy array and comes back when the last array or tensor that looks into it is gone, so a
consumer may hold a batch for as long as it likes and nothing it holds is ever overwritten.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping

import numpy as np
import torch

_ALIGNED = 64  # bytes: where an array may begin


class Slabs:
    """A pool of memory.

    Parameters
    ----------
    keep : int
        Slabs that are kept when they come back.
    """

    def __init__(self, *, keep: int = 8) -> None:
        # The end of a loan may come at any moment in any thread, so no lock may be needed: a deque's operations are atomic, and
        # `_free` forgets the oldest slab itself when it is full. Nor may Python code run there: a Ctrl-C that arrives while
        # it does would be lost. So a loan that ends only puts its weak reference on `_ended`, and `_find` looks there.
        self._free: deque[np.ndarray] = deque(maxlen=keep)
        self._ended: deque[weakref.ref[np.ndarray]] = deque()
        self._lent: dict[int, tuple[weakref.ref[np.ndarray], np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array of undefined content."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        if size == 0:
            return np.empty(shape, dtype)
        slab = self._find(size)
        lent = slab[:size]
        loan_of = weakref.ref(lent, self._ended.append)
        self._lent[id(loan_of)] = (loan_of, slab)  # arrays have no hash
        # NumPy makes a view of a view refer to the owner of the memory, past `lent`; through a memoryview every array and
        # tensor made from the result keeps `lent` itself alive, whose end is the end of the loan.
        loan = np.frombuffer(memoryview(lent), np.uint8)  # type: ignore[arg-type]
        return loan.view(dtype).reshape(shape)

    def _find(self, size: int) -> np.ndarray:
        for _ in range(len(self._ended)):
            try:
                ended = self._ended.popleft()
            except IndexError:  # another thread was quicker
                break
            self._free.append(self._lent.pop(id(ended))[1])
        for _ in range(len(self._free)):
            try:
                slab = self._free.pop()  # the last to come back: some of it may still be in the processor's cache
            except IndexError:
                break
            if size <= slab.size <= 4 * size + (1 << 16):
                return slab
            self._free.appendleft(slab)
        return np.empty(size + size // 8, np.uint8)  # room for a batch that has a few more non-zeros


def pinned_block(fields: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return page-locked memory for several arrays, which one copy brings to a GPU, and the arrays in it.

    It is a tensor of torch's allocator, and so are its parts: it is given out again only when nobody holds it and the copies that were made
    of it are done, as far as torch knows of them; whoever copies without waiting should hold it until then all the same.

    Parameters
    ----------
    fields
        Of each array its shape and type.

    Returns
    -------
    block : (n,) uint8
    parts
        By name, of undefined content.
    """
    sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in fields.items()}
    starts = np.cumsum([0, *(-(-size // _ALIGNED) * _ALIGNED for size in sizes.values())]).tolist()
    block = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    parts = {}
    for start, (name, (shape, dtype)) in zip(starts, fields.items(), strict=False):
        parts[name] = block[start : start + sizes[name]].view(torch.from_numpy(np.empty(0, dtype)).dtype).view(shape)
    return block, parts
