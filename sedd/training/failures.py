"""What can stop a run, and what its user can do about it: a loss that is no number, no memory, a full disk, a dead process."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import traceback
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from sedd import checkpoint
from sedd.config import TrainConfig
from sedd.io.loading.batch import Batch

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# gloo and NCCL say in words only that the other end of a connection is gone.
_PEER_LOST = ("closed by peer", "reset by peer", "broken pipe", "gloo/transport", "remote process exited")


@contextlib.contextmanager
def explained(
    config: TrainConfig, step: Callable[[], int], largest_batch: Callable[[], int | None]
) -> Iterator[None]:
    """Context that turns failures of the machine into errors which say what to do.

    Parameters
    ----------
    config
        Of the run.
    step
        Asked for the step at which it happened.
    largest_batch
        Asked, when memory ran out and what the step held of it is free again, for the batch size that fits; None: none.

    Raises
    ------
    MemoryError
        When memory ran out, with the settings that make the same steps in less of it.
    OSError
        When the disk is full, with the checkpoint that is left.
    ConnectionError
        When another process of the run has ended.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            _let_go(error)
            raise MemoryError(_memory_advice(config, step(), largest_batch())) from None
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            full = OSError(_disk_advice(config, error))
            full.errno = error.errno
            raise full from error
        if _is_lost_peer(error):
            raise ConnectionError(
                f"another process of this run ended during step {step()}; its message or the launcher's says why. "
                f"{_left(config)} Continue with --resume auto."
            ) from error
        raise


def check_finite(value: float, found: str) -> None:
    """Stop before a number that is none reaches a checkpoint.

    Raises
    ------
    FloatingPointError
        If `value` is not finite; its message starts with `found`.
    """
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {found}; nothing was saved since the last checkpoint, which is whole. Continue with --resume auto and "
            "a lower --learning_rate."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is memory that failed: on the CPU torch says so in the words of a RuntimeError only."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error).lower() for w in words)


def _is_lost_peer(error: BaseException) -> bool:
    lost = isinstance(error, dist.DistError) or any(words in str(error).lower() for words in _PEER_LOST)
    return lost and dist.is_initialized()


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of a failed step hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory_advice(config: TrainConfig, step: int, fits: int | None) -> str:
    happened = f"out of memory at step {step} with --batch_size {config.batch_size}. {_left(config)}"
    if fits is None:
        return (
            f"{happened} Not even fewer cells a step fit: use --mixed_precision bf16, fewer --genes or --num_bins, a smaller "
            "--model, or divide the weights among GPUs (configs/accelerate/fsdp.yaml)."
        )
    steps = config.optim.gradient_accumulation_steps * (config.batch_size // fits)
    return (
        f"{happened} Continue with --resume auto --batch_size {fits} --gradient_accumulation_steps {steps}: that fits, and "
        "makes the same steps."
    )


def _disk_advice(config: TrainConfig, error: OSError) -> str:
    return (
        f"{config.run.checkpoint_dir}: no room left for what was being saved ({error.strerror}). {_left(config)} Free some "
        "space or lower --keep_checkpoints, then continue with --resume auto."
    )


def _left(config: TrainConfig) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged checkpoint is passed over again, aloud, when the run continues
        path = checkpoint.find_newest(config.run.checkpoint_dir)
    return "No checkpoint was made yet." if path is None else f"The last whole checkpoint is {path}."


def largest_batch(batch: Batch, trial: Callable[[Batch], None]) -> int | None:
    """Return the most cells of `batch` that fit and divide it, so that whole numbers of them make up the same step; None: not one.

    Parameters
    ----------
    batch
        One that does not fit.
    trial
        Does with a batch what a step needs memory for.
    """
    for size in (n for n in range(len(batch) // 2, 0, -1) if len(batch) % n == 0):
        try:
            trial(head(batch, size))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return size
    return None


def head(batch: Batch, n: int) -> Batch:
    """Return the first cells of a batch."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    cut = {name: value[:n] for name, value in values.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **cut, labels={name: codes[:n] for name, codes in batch.labels.items()})
