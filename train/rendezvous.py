"""A store of one start of the ranks: torchrun keeps its own over restarts, with what was said before."""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

_POLL = 0.02  # seconds


@contextlib.contextmanager
def fresh(store: Any, *, rank: int, size: int, timeout: timedelta) -> Iterator[Any]:
    """A part of `store` that no earlier start has written to; the ranks meet in it within the block.

    A rank that read where another listened before the restart would try to reach it there. The number of the
    restart does not help, as the hosts count theirs apart. So rank 0 makes up a name, and gives it to every
    rank that asks, with the word that it asked by: an old answer, or one to an old question, is not taken.

    Raises:
        TimeoutError: if rank 0 does not answer in time.
    """
    if rank:
        yield PrefixStore(_ask(store, rank, timeout), store)
        return
    name, met = f"moleprint/{uuid.uuid4().hex}", threading.Event()
    answering = threading.Thread(target=_answer, args=(store.clone(), name, size, met), daemon=True)
    answering.start()
    try:
        yield PrefixStore(name, store)
    finally:
        met.set()
        answering.join()


def _ask(store: Any, rank: int, timeout: timedelta) -> str:
    word, answer = uuid.uuid4().hex, f"moleprint/answer/{rank}"
    store.set(f"moleprint/ask/{rank}", word)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if store.check([answer]):
            asked, name = store.get(answer).decode().split(" ")
            if asked == word:
                return str(name)
        time.sleep(_POLL)
    raise TimeoutError(f"rank 0 did not answer within {timeout}")


def _answer(store: Any, name: str, size: int, met: threading.Event) -> None:
    answered: dict[int, bytes] = {}
    while not met.wait(_POLL):
        for rank in range(1, size):
            ask = f"moleprint/ask/{rank}"
            word = store.get(ask) if store.check([ask]) else None
            if word is not None and answered.get(rank) != word:
                store.set(f"moleprint/answer/{rank}", f"{word.decode()} {name}")
                answered[rank] = word
