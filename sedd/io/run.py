"""Run the tasks of a conversion on Dask: on threads here, or on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask
from dask.callbacks import Callback
from tqdm import tqdm


def run_tasks(
    task: Callable[..., Any],
    arguments: list[tuple[Any, ...]],
    sizes: list[int],
    *,
    title: str,
    workers: int,
    scheduler: str | None,
    progress: bool,
) -> None:
    """Call `task(*arguments[i])` for all i, `workers` at once.

    Parameters
    ----------
    sizes : how far the bar moves on when a task ends
    title : of the bar
    scheduler : address of a Dask scheduler; None uses the cluster of the active client if there is one, else threads
    """
    if not arguments:
        return
    with tqdm(total=sum(sizes), desc=title, unit="cells", unit_scale=True, disable=not progress, leave=False) as bar:
        client = _client(scheduler)
        if client is None:
            tasks = [
                dask.delayed(task)(*args, dask_key_name=f"{task.__name__}-{k}") for k, args in enumerate(arguments)
            ]
            steps = {f"{task.__name__}-{k}": size for k, size in enumerate(sizes)}
            with Callback(posttask=lambda key, *_: bar.update(steps.get(key, 0))):
                dask.compute(*tasks, scheduler="threads", num_workers=workers, optimize_graph=False)
            return
        from distributed import as_completed

        futures = {client.submit(task, *args, pure=False): size for args, size in zip(arguments, sizes, strict=True)}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(futures[future])
        finally:
            client.cancel(list(futures))
            if scheduler is not None:
                client.close()


def _client(scheduler: str | None) -> Any:
    from distributed import Client, get_client

    if scheduler is not None:
        return Client(scheduler)
    try:
        return get_client()
    except ValueError:
        return None
