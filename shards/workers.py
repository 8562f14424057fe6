"""Tasks in worker processes that end with their parent, whatever ends it. Light to import."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from configs.errors import UserError

Result = TypeVar("Result")


def in_order(
    function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], workers: int
) -> Generator[Result]:
    """`function(*task)` of each task, in order; tasks are drawn only a few ahead, so memory stays flat.

    Close the generator (`contextlib.closing`) to end the workers at once, as any error does.

    Args:
        function: importable by name from a module that is cheap to import: workers start with it.
        tasks: arguments of each call.
        workers: processes; 0 is one a core, and one is this process itself.

    Raises:
        UserError: if a worker was killed from outside.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        yield from (function(*task) for task in tasks)
        return
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that the caller's threads hold
    pool = ProcessPoolExecutor(workers, spawn, initializer=_end_with_parent)
    ahead: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            ahead.append(pool.submit(function, *task))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run again with fewer workers"
        ) from None
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: an orphan would wait for tasks for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
