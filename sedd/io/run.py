"""Run the tasks of a conversion on Dask: on threads here, or on a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import dask
import dask.threaded
from dask.callbacks import Callback
from tqdm import tqdm

from sedd.errors import UserError


class Sequel(NamedTuple):
    """A task that runs as soon as some of the others are done: `task(*arguments)` after those numbered `after`."""

    task: Callable[..., Any]
    arguments: tuple[Any, ...]
    after: Sequence[int]


class TaskRunner:
    """Calls tasks, several at once, with a bar.

    Parameters
    ----------
    workers : threads; None for one a core
    scheduler : address of a Dask scheduler; None uses the cluster of the active client if there is one, else threads
    progress : show a bar
    """

    def __init__(self, *, workers: int | None, scheduler: str | None, progress: bool) -> None:
        self.progress = progress
        self._scheduler = scheduler
        self._client = _client(scheduler)
        if self._client is not None:
            workers = workers or sum(self._client.nthreads().values())
        self.workers = max(1, workers or len(os.sched_getaffinity(0)))

    def run(
        self, task: Callable[..., Any], arguments: list[tuple[Any, ...]], sizes: Sequence[float], *, title: str,
        sequels: Sequence[Sequel] = (),
    ) -> list[Any]:  # fmt: skip
        """`[task(*args) for args in arguments]`; `sequels` follow some of them, without results.

        Parameters
        ----------
        sizes : cells that each task moves the bar on by
        title : of the bar
        """
        if not arguments and not sequels:
            return []
        with tqdm(
            total=round(sum(sizes)), desc=title, unit=" cells", unit_scale=True, disable=not self.progress, leave=False
        ) as bar:
            run = self._on_cluster if self._client else self._on_threads
            return run(task, arguments, sizes, sequels, bar)[: len(arguments)]

    def _on_threads(
        self, task: Callable[..., Any], arguments: list[tuple[Any, ...]], sizes: Sequence[float], sequels: Sequence[Sequel], bar: Any
    ) -> list[Any]:
        names = [f"{task.__name__}-{k}" for k in range(len(arguments))]
        steps = dict(zip(names, sizes, strict=True))
        delayed = dask.delayed(task, pure=False)
        tasks = [delayed(*args, dask_key_name=name) for name, args in zip(names, arguments, strict=True)]
        late = dask.delayed(_after, pure=False)
        tasks += [late(s.task, s.arguments, [tasks[k] for k in s.after]) for s in sequels]
        with Callback(posttask=lambda key, *_: bar.update(steps.get(key, 0))):
            # "threads" in place of the function would have dask import distributed, to look for a cluster.
            return list(dask.compute(*tasks, scheduler=dask.threaded.get, num_workers=self.workers, optimize_graph=False))

    def _on_cluster(
        self, task: Callable[..., Any], arguments: list[tuple[Any, ...]], sizes: Sequence[float], sequels: Sequence[Sequel], bar: Any
    ) -> list[Any]:
        from distributed import KilledWorker, as_completed

        futures = [self._client.submit(task, *args, pure=False) for args in arguments]
        steps = dict(zip(futures, sizes, strict=True))
        futures += [
            self._client.submit(_after, s.task, s.arguments, [futures[k] for k in s.after], pure=False) for s in sequels
        ]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(steps.get(future, 0))
            return [future.result() for future in futures]
        except KilledWorker as error:
            raise OSError(f"Dask workers died again and again on the same task: {error}") from error
        finally:
            self._client.cancel(futures)

    def close(self) -> None:
        """Let go of the cluster, if it was given by address."""
        if self._client is not None and self._scheduler is not None:
            self._client.close()
            self._client = None


def _after(task: Callable[..., Any], arguments: tuple[Any, ...], _: list[Any]) -> Any:
    return task(*arguments)


def _client(scheduler: str | None) -> Any:
    if scheduler is None and "distributed" not in sys.modules:
        return None  # who has a client has imported it; doing that here would take longer than a small conversion
    from distributed import Client, get_client

    if scheduler is None:
        try:
            return get_client()
        except ValueError:
            return None
    try:
        return Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise UserError(f"{scheduler}: no Dask scheduler answers there ({error}). Start one with `dask scheduler`.") from error
