"""A background thread that makes items ahead of their use, in order, from any position on."""

import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Items in order, up to `depth` of them ready before they are asked for.

        get() ◄── ready (depth) ◄── thread: make(position) ── yields item, item, …
        seek(position) empties `ready` and lets the thread begin anew

    The thread starts with the first `get` and ends with `close`. What it raises comes out of `get`, once,
    after the items before it; then it tries that item again.
    """

    def __init__(self, make: Callable[[int], Generator[Item]], depth: int, start: int = 0) -> None:
        """
        Args:
            make: yields the items from a position on, without end. Only the thread calls it, so that what it
                holds needs no locks.
            start: position of the first item.
        """
        self._make, self._depth = make, depth
        self._next = start  # position of what `get` gives next
        self._changed = threading.Condition()
        self._ready: deque[Item] = deque()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._turn = 0  # counts seeks: what was made for an earlier one is dropped
        self._closed = False

    def get(self) -> Item:
        """The next item; waits for it, and can be interrupted then. Raises what making it raised."""
        with self._changed:
            if self._thread is None and not self._closed:
                # A daemon, lest the interpreter wait at its end for a thread that waits for room.
                self._thread = threading.Thread(target=self._run, name="moleprint-loader", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            if self._closed:
                raise ValueError("closed: no more batches; make a new loader")
            if self._ready:
                item = self._ready.popleft()
                self._next += 1
                self._changed.notify_all()
                return item
            # Kept, it would hold all that it passes through on its way out, and so would the thread.
            error, self._error = self._error, None
            self._changed.notify_all()
        assert error is not None
        try:
            raise error
        finally:
            del error

    def seek(self, position: int) -> None:
        """Go on from another position, after an error too; returns at once."""
        with self._changed:
            self._next, self._error = position, None
            self._turn += 1
            self._ready.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread and wait until it has; ready items are dropped. Closing twice is no error."""
        with self._changed:
            self._closed = True
            self._turn += 1
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._error = None  # it holds on to all that was in hand

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._error is None)
                if self._closed:
                    return
                start, turn = self._next, self._turn
            try:
                self._fill(start, turn)
            except BaseException as error:  # `get` raises it
                with self._changed:
                    if turn == self._turn:
                        self._error = error
                        self._changed.notify_all()

    def _fill(self, start: int, turn: int) -> None:
        """Make items until a seek or the end."""
        with closing(self._make(start)) as items:
            for item in items:
                with self._changed:
                    if turn == self._turn:
                        self._ready.append(item)
                        self._changed.notify_all()
                    del item  # or the thread would hold one more batch while it waits
                    self._changed.wait_for(lambda: turn != self._turn or len(self._ready) < self._depth)
                    if turn != self._turn:
                        return
        raise AssertionError("the items came to an end")
