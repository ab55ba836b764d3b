"""The processes that share a task, as `accelerate launch` starts them. Importing this is cheap; torch comes when it is needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_TIMEOUT = timedelta(hours=24)  # a share can take that much longer than another


@dataclass(frozen=True)
class Processes:
    """How many processes there are, and which of them this is.

    Attributes
    ----------
    index, count
        0 and 1 without a launcher.
    """

    index: int = 0
    count: int = 1
    _state: Any = None

    @classmethod
    def here(cls) -> Processes:
        """Join the other processes of the launcher, if there are any."""
        if launched() == 1:
            return cls()
        import torch
        from accelerate import PartialState

        # Accelerate takes processes without GPUs for single ones unless a setting says that they are meant to use the CPU.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)
        return cls(state.process_index, state.num_processes, state)

    def wait(self) -> None:
        """Go on when all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def share(self, n: int) -> range:
        """Which of n things are this one's: successive ones, so that each process reads its own part of a file."""
        return range(n * self.index // self.count, n * (self.index + 1) // self.count)


def launched() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process speaks for all; known before they have met."""
    return os.environ.get("RANK", "0") == "0"


def default_device() -> str:
    """Return this process's GPU if there is one, else the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
