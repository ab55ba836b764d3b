"""Run the tasks of a conversion: on threads here, or on a Dask cluster."""

from __future__ import annotations

import gc
import math
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sedd.errors import UserError

if TYPE_CHECKING:
    from dask_jobqueue import SLURMCluster

SWITCH = 2e-4
"""Seconds that a thread of Python may keep the others waiting while tasks run; they need the interpreter often and for little."""

PROGRAM = 1 << 30
"""Bytes that a worker of SLURM may take beside its share of the memory budget."""


class AbandonedError(Exception):
    """Nobody waits for this task any more: another of its conversion has failed, or the user interrupted it."""


_HERE = threading.local()


def check_abandoned() -> None:
    """End this task if nobody waits for it any more; to be called now and then."""
    stop = getattr(_HERE, "stop", None)
    if stop is not None and stop.is_set():
        raise AbandonedError


def _enter(stop: threading.Event) -> None:
    _HERE.stop = stop


class TaskRunner:
    """Calls tasks, several at once, with a bar.

    Parameters
    ----------
    workers : threads; None for one a core
    scheduler : address of a Dask scheduler; None uses the cluster of the active client if there is one, else threads
    slurm_workers : have SLURM start this many workers, on which the tasks run; 0 for none
    budget : bytes that all workers together may hold
    progress : show a bar
    """

    def __init__(
        self, *, workers: int | None, scheduler: str | None, progress: bool, slurm_workers: int = 0, budget: int = 1 << 30
    ) -> None:
        self.progress, self.scheduler = progress, scheduler
        self._slurm_workers, self._budget = slurm_workers, budget
        self._jobs: SLURMCluster | None = None
        self._client: Any = None if slurm_workers else _client(scheduler)
        if self._client is not None:
            workers = workers or sum(self._client.nthreads().values())
        self.workers = slurm_workers or max(1, workers or len(os.sched_getaffinity(0)))

    def _start_jobs(self) -> None:
        """Ask SLURM for workers, now that there is something for them to do."""
        self._jobs = start_workers(self._slurm_workers, self._budget)
        self.scheduler = self._jobs.scheduler_address
        self._client = _client(self.scheduler)
        if self.progress:
            print(f"asked SLURM for {self._slurm_workers} workers; `squeue --me` shows them", file=sys.stderr)

    def run(
        self, task: Callable[..., Any], arguments: list[tuple[Any, ...]], sizes: Sequence[float], *, title: str,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Any]:  # fmt: skip
        """`[task(*args) for args in arguments]`; the first that fails raises its error here.

        Parameters
        ----------
        sizes : cells that each task moves the bar on by
        title : of the bar
        meanwhile : called in this thread while the tasks run
        """
        if self._slurm_workers and self._jobs is None:
            self._start_jobs()
        with self._bar(sum(sizes), title) as move, _quiet_libraries():
            call = self._on_cluster if self._client else self._on_threads
            return call(task, arguments, sizes, move, meanwhile or _nothing)

    @contextmanager
    def _bar(self, total: float, title: str) -> Iterator[Callable[[float], None]]:
        if not self.progress or not total:
            yield lambda _: None
            return
        from tqdm.auto import tqdm

        lock = threading.Lock()
        with tqdm(total=round(total), desc=title, unit=" cells", unit_scale=True, leave=False) as bar:

            def move(size: float) -> None:
                with lock:
                    bar.update(size)

            yield move

    def _on_threads(
        self, task: Callable[..., Any], arguments: list[tuple[Any, ...]], sizes: Sequence[float], move: Callable[[float], None],
        meanwhile: Callable[[], None],
    ) -> list[Any]:  # fmt: skip
        stop = threading.Event()
        futures: list[Future[Any]] = []

        def done(future: Future[Any], size: float) -> None:
            if future.cancelled() or future.exception() is None:
                move(size)
                return
            for other in futures:  # those under way continue: an earlier one may be the first that fails
                other.cancel()

        with _alert_python(), ThreadPoolExecutor(self.workers, initializer=_enter, initargs=(stop,)) as pool:
            try:
                for args, size in zip(arguments, sizes, strict=True):
                    futures.append(pool.submit(task, *args))
                    futures[-1].add_done_callback(lambda future, size=size: done(future, size))  # type: ignore[misc]
                meanwhile()
                return [future.result() for future in futures]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _on_cluster(
        self, task: Callable[..., Any], arguments: list[tuple[Any, ...]], sizes: Sequence[float], move: Callable[[float], None],
        meanwhile: Callable[[], None],
    ) -> list[Any]:  # fmt: skip
        from distributed import KilledWorker, as_completed

        futures = [self._client.submit(task, *args, pure=False) for args in arguments]
        steps = dict(zip(futures, sizes, strict=True))
        try:
            meanwhile()
            for future in as_completed(futures):
                future.result()
                move(steps[future])
            return [future.result() for future in futures]
        except KilledWorker as error:
            raise OSError(f"Dask workers died again and again on the same task: {error}") from error
        finally:
            self._client.cancel(futures)

    def close(self) -> None:
        """Let go of the cluster, if it was given by address; end the workers that SLURM started."""
        if self._client is not None and self.scheduler is not None:
            self._client.close()
            self._client = None
        if self._jobs is not None:
            self._jobs.close()
            self._jobs = None


@contextmanager
def _alert_python() -> Iterator[None]:
    """Have Python hand its lock over quickly, and not look for cycles of garbage: imports make many objects and tasks no cycles."""
    interval, collecting = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(SWITCH)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        if collecting:
            gc.enable()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep libraries silent about tables that are written meanwhile, and leave the filters of warnings as they were.

    numba sets and restores the filters of the whole process while it compiles, in the thread of a task, so that filters set in
    this thread in the meantime are lost or stay. Set around the tasks they do neither.
    """
    with warnings.catch_warnings():
        # By place, not by name: numba issues again what it caught meanwhile, and then knows the file alone.
        warnings.filterwarnings("ignore", module=r"(.*\W)?(anndata|zarr|pandas)(\W|$)")
        yield


def _nothing() -> None:
    pass


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


def start_workers(n: int, budget: int) -> SLURMCluster:
    """Ask SLURM for `n` workers of one core; those that have come are used while the others wait in the queue.

    What a cluster asks of every job, an account or a partition, is set as Dask has it: `jobqueue.slurm.account` in its
    configuration, or `DASK_JOBQUEUE__SLURM__ACCOUNT` in the environment. Closing the cluster cancels its jobs.

    Parameters
    ----------
    n : workers
    budget : bytes that all of them together may hold

    Raises
    ------
    UserError
        If there is no SLURM here, or no dask-jobqueue, or SLURM would not take such a job.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm_workers: there is no sbatch here. Run it where SLURM is, or leave it out to use this machine's cores.")
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise UserError("--slurm_workers needs dask-jobqueue: pip install 'sedd[slurm]'.") from None
    memory = math.ceil(budget / n) + PROGRAM
    cluster = SLURMCluster(
        cores=1,
        processes=1,
        memory=f"{memory}B",
        python=sys.executable,
        worker_extra_args=["--no-dashboard", "--memory-limit", "0"],  # tasks keep to the budget; Dask would kill at a guess
        scheduler_options={"dashboard": False},
    )
    # Asked first: Dask submits the jobs elsewhere, and would wait for ever for those that were refused.
    asked = subprocess.run(["sbatch", "--test-only"], input=cluster.job_script(), capture_output=True, text=True)
    if asked.returncode:
        cluster.close()
        said = asked.stderr.strip().removeprefix("sbatch: error: ").splitlines()
        raise UserError(
            f"--slurm_workers: SLURM would not take a worker ({said[0] if said else 'it gave no reason'}). Set what it "
            "asks for by DASK_JOBQUEUE__SLURM__ACCOUNT, __QUEUE (the partition) or __WALLTIME, or lower --memory_budget."
        )
    cluster.scale(jobs=n)
    return cluster
