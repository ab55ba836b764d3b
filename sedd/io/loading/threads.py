"""Threads that do what they are given, whose results are waited for without a lock that a Ctrl-C could leave locked.

`concurrent.futures` keeps its state under `threading.Condition`, whose `__enter__` is Python code: a KeyboardInterrupt that
arrives just as it returns leaves the condition locked for good, and the next use of the pool, its end, and the end of the
process wait for it forever. Here the main thread touches only locks and queues that are written in C: a signal is raised
before they are taken, or after they were given back.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Cancelled(Exception):
    """The task was not started, because nobody wants its result any more."""


class Task(Generic[T]):
    """One call, made in another thread."""

    def __init__(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> None:
        self._call: tuple[Callable[..., T], tuple[Any, ...]] | None = (function, arguments)
        self._value: T
        self._error: BaseException | None = None
        self._under_way = threading.Lock()
        self._under_way.acquire()

    def cancel(self) -> None:
        """Do not begin, if it is not too late."""
        self._call = None

    def run(self) -> None:
        """Make the call."""
        call, self._call = self._call, None
        try:
            if call is None:
                raise Cancelled
            self._value = call[0](*call[1])
        except BaseException as error:
            self._error = error
        finally:
            self._under_way.release()
            del (
                self,
                call,
            )  # the error refers to this frame, and through it would keep the task, its arguments and itself

    def wait(self) -> None:
        """Wait for the call."""
        with self._under_way:  # whoever waits gives the lock on to the next
            pass

    def result(self) -> T:
        """Wait for the call; return what it returned or raise what it raised."""
        self.wait()
        if self._error is None:
            return self._value
        try:
            raise self._error
        finally:
            del self  # as above


class Threads:
    """A number of threads that make calls in the order in which they are submitted.

    Parameters
    ----------
    number : int
    name : str
        The threads' names begin with it.
    """

    def __init__(self, number: int, name: str) -> None:
        self._queue: SimpleQueue[Task[Any] | None] = SimpleQueue()
        self._pid = os.getpid()
        self._threads = [
            threading.Thread(target=_work, args=(self._queue,), name=f"{name}-{i}", daemon=True) for i in range(number)
        ]
        for thread in self._threads:
            thread.start()
        weakref.finalize(self, _stop, self._queue, number).atexit = False
        _POOLS.add(self)

    def submit(self, function: Callable[..., T], *arguments: Any) -> Task[T]:
        """Have a call made."""
        task = Task(function, arguments)
        self._queue.put(task)
        return task

    def close(self) -> None:
        """Drop the calls that wait, wait for those that are being made, and end the threads."""
        if self._pid != os.getpid():
            return  # a fork has none of its parent's threads
        while True:
            try:
                task = self._queue.get_nowait()
            except Empty:
                break
            if task is not None:
                task.cancel()
                task.run()  # its outcome, an error too, reaches whoever waits for it
        _stop(self._queue, len(self._threads))
        for thread in self._threads:
            thread.join()


def _work(queue: SimpleQueue[Task[Any] | None]) -> None:
    while True:
        task = queue.get()
        if task is None:
            return
        task.run()
        del task  # or its result would be held until the next one comes


def _stop(queue: SimpleQueue[Task[Any] | None], number: int) -> None:
    for _ in range(number):
        queue.put(None)


_POOLS: weakref.WeakSet[Threads] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End the threads while they can still end: one that runs compiled code after Python is gone may crash the process."""
    for pool in list(_POOLS):
        pool.close()
