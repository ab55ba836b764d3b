from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import time
import weakref

import pytest

from sedd.io.loading.threads import Cancelled, Threads


def test_tasks_are_done_in_order_and_errors_reach_whoever_waits() -> None:
    done: list[int] = []
    pool = Threads(1, "pool")
    tasks = [pool.submit(lambda i: done.append(i) or i * i, i) for i in range(50)]
    failing = pool.submit(divmod, 1, 0)
    assert [task.result() for task in tasks] == [i * i for i in range(50)]
    assert done == list(range(50))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.result()
    pool.close()


def test_what_waits_is_dropped_at_the_end_and_what_runs_is_waited_for() -> None:
    begun, go = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        go.wait()
        return "done"

    pool = Threads(1, "pool")
    running, waiting, cancelled = pool.submit(work), pool.submit(work), pool.submit(work)
    cancelled.cancel()
    assert begun.wait(10)
    threading.Timer(0.05, go.set).start()
    pool.close()
    assert running.result() == "done"
    for task in (waiting, cancelled):
        with pytest.raises(Cancelled):
            task.result()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pool")]


def test_an_interrupt_at_any_call_or_return_leaves_nothing_locked() -> None:
    """Python looks for signals when a function is entered and when a call has returned: there one is raised, at each in turn."""
    pool = Threads(1, "pool")
    for at in itertools.count():
        events = itertools.count()

        def interrupt(
            _frame: object, event: str, _argument: object, at: int = at, events: itertools.count = events
        ) -> None:
            if event in ("call", "return", "c_return") and next(events) == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

        try:
            sys.setprofile(interrupt)
            pool.submit(abs, -1).result()
            sys.setprofile(None)
        except KeyboardInterrupt:
            interrupted = True
        else:
            interrupted = False
        results: list[int] = []
        later = threading.Thread(target=lambda into=results: into.append(pool.submit(abs, -2).result()), daemon=True)
        later.start()
        later.join(20)
        assert results == [2]
        if not interrupted:
            break
    assert at >= 8
    pool.close()


def test_a_pool_that_is_dropped_ends_its_threads_and_a_failed_task_holds_nothing() -> None:
    class Argument:
        pass

    def fail(_: object) -> None:
        raise RuntimeError

    pool = Threads(2, "pool")
    argument = Argument()
    gone = weakref.ref(argument)
    task = pool.submit(fail, argument)
    with pytest.raises(RuntimeError):
        task.result()
    gc.collect()
    gc.disable()
    try:
        task = pool.submit(fail, argument)
        with pytest.raises(RuntimeError):
            task.result()
        del task, argument
        deadline = time.monotonic() + 10
        while gone() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gone() is None
    finally:
        gc.enable()
    own = [thread for thread in threading.enumerate() if thread.name.startswith("pool")]
    assert len(own) == 2
    del pool
    for thread in own:
        thread.join(10)
        assert not thread.is_alive()


def test_a_process_ends_although_its_threads_are_busy() -> None:
    code = """
import time
from sedd.io.loading.threads import Threads
pool = Threads(2, "pool")
tasks = [pool.submit(time.sleep, 0.5) for _ in range(1000)]
print("busy", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    assert process.wait(timeout=60) == 0  # all of them would take 250 s
    process.stdout.close()
