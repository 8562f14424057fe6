"""Tasks in worker processes that end with their parent, whatever ends it. Light to import."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from configs.errors import UserError

Result = TypeVar("Result")


class Crew:
    """Worker processes, started at the first task or before, and kept for the next ones."""

    def __init__(self, workers: int) -> None:
        """
        Args:
            workers: processes; 0 is one a core, and one is this process itself.
        """
        self._workers = workers or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the workers: at once after an error."""
        if self._pool is None:
            return
        if kind is not None:
            for worker in set(multiprocessing.active_children()) - self._others:
                worker.terminate()
        self._pool.shutdown(cancel_futures=True)

    def start(self, *modules: str) -> None:
        """Let the workers start and import `modules` while this process does something else."""
        if self._workers == 1 or self._pool is not None:
            return
        # Forked from a process that has imported all this once, and has no threads whose locks a fork copies.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", *modules])
        self._pool = ProcessPoolExecutor(self._workers, context, initializer=_end_with_parent)
        with _ctrl_c_held_back():
            for _ in range(self._workers):
                self._pool.submit(importlib.import_module, __name__)  # a worker starts for a task, not before

    def in_order(
        self, function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]]
    ) -> Generator[Result]:
        """`function(*task)` of each task, in order; tasks are drawn only a few ahead, so memory stays flat.

        Args:
            function: importable by name from a module that is cheap to import: workers start with it.
            tasks: arguments of each call.

        Raises:
            UserError: if a worker was killed from outside.
        """
        if self._workers == 1:
            yield from (function(*task) for task in tasks)
            return
        self.start(function.__module__)
        assert self._pool is not None
        ahead: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                ahead.append(self._pool.submit(function, *task))
                if len(ahead) > 2 * self._workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; run again with fewer workers"
            ) from None


def in_order(
    function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], workers: int
) -> Generator[Result]:
    """`Crew.in_order` by workers of its own.

    Close the generator (`contextlib.closing`) to end the workers at once, as any error does.
    """
    with Crew(workers) as crew:
        yield from crew.in_order(function, tasks)


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends, and never reach processes that start in it.

    Else it ends them amid imports, or this process before it knows them, and they show where they were.
    """
    resource_tracker.ensure_running()  # or it starts later, and lets Ctrl-C through to the others
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: an orphan would wait for tasks for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for a fork server of others
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
