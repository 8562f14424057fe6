"""A background thread that makes items ahead of their use, in order, from any position on.

Two queues and no lock: an exception may come between any two steps of the caller's thread (Ctrl-C), and
would leave a lock taken.
"""

import threading
import time
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


class _Order(NamedTuple):
    turn: int
    position: int


class _Made(NamedTuple, Generic[Item]):
    order: _Order
    item: Item | None
    error: BaseException | None


class Ahead(Generic[Item]):
    """Items in order, up to `depth` of them ready before they are asked for.

        get(position) ── orders ──► thread: make(position) yields item, item, … ── ready (depth) ──► get

    A position that is not the next begins a new turn: what was made for an earlier one is dropped. The thread
    begins with `start`, makes nothing before the first `get`, and ends with `close`.
    """

    def __init__(self, make: Callable[[int], Generator[Item]], depth: int) -> None:
        """
        Args:
            make: yields the items from a position on, without end. Only the thread calls it, so that what it
                holds needs no locks.
        """
        self._make, self._depth = make, depth
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._ready: SimpleQueue[_Made[Item] | None] = SimpleQueue()
        self._turn = 0
        self._next: int | None = None  # position that `get` gives next in this turn; None: no turn is on
        self._closed = False
        # A daemon, lest the interpreter wait at its end for a thread that waits for orders.
        self._thread = threading.Thread(target=self._run, name="moleprint-loader", daemon=True)

    def start(self) -> None:
        """Begin, once there is what calls `close`: only that ends the thread."""
        self._thread.start()

    def get(self, position: int) -> Item:
        """The item of a position; waits for it, and can be interrupted then.

        Raises what making it raised, after the items before it; asked again, it is tried again.

        Raises:
            ValueError: if this is closed, also while it waits.
        """
        begun, self._next = self._next == position, None  # whatever ends this early ends the turn
        if not begun:
            self._turn += 1
            for number in range(self._depth):
                self._orders.put(_Order(self._turn, position + number))
        order = _Order(self._turn, position)
        made, ready = None, self._ready  # this very queue is the one that `close` wakes
        while made is None or made.order != order:
            if self._closed:
                raise ValueError("closed: no more batches; make a new loader")
            made = ready.get()
        if made.error is not None:
            try:
                raise made.error
            finally:
                del made  # kept, it would hold all that the error passes through on its way out
        self._orders.put(_Order(self._turn, position + self._depth))
        self._next = position + 1
        return made.item  # type: ignore[return-value]  # made without an error

    def close(self) -> None:
        """End the thread and wait until it has; ready items are dropped. Closing twice is no error."""
        self._closed = True
        self._turn += 1
        self._orders.put(None)
        self._ready.put(None)  # a `get` may wait
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
            while self._thread in threading.enumerate():  # `join` waits no more once interrupted
                time.sleep(0.01)
        self._ready = SimpleQueue()

    def _run(self) -> None:
        turn, items = 0, None
        while order := self._orders.get():
            if order.turn != self._turn:
                continue
            try:
                if order.turn != turn:
                    turn = order.turn
                    if items is not None:
                        items.close()
                    items = self._make(order.position)
                if items is not None:
                    self._ready.put(_Made(order, next(items), None))
            except BaseException as error:  # `get` raises it
                items = None
                self._ready.put(_Made(order, None, error))
        if items is not None:
            items.close()
