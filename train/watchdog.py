"""A rank that hangs ends them all, named, instead of leaving the others to wait for it."""

import os
import sys
import threading
import time
from typing import Any

from configs.errors import RESUMABLE

INTERVAL = 10.0
"""Seconds between two looks at whether a rank moves; fewer where the timeout is short."""
END = 16 * INTERVAL
"""Seconds, more than it takes from a timeout until all ranks are told, and have ended."""
_KEY, _ASKED = "moleprint/beat", "moleprint/asked"


class Watchdog:
    """Tells the other ranks through the store how far this one is, and ends it when nothing moves.

    Once the rank's own main thread has got no further for `timeout` seconds, it asks how far the others are.
    Those that no longer say anything are stopped, swapped out or gone; else those that have not come to where
    the others wait are the ones that hang. It names them and ends the process: a collective cannot be left.
    """

    def __init__(self, store: Any, *, rank: int, size: int, timeout: float) -> None:
        """
        Args:
            store: torch.distributed's, over a connection of its own, as the main thread may wait in it.
            timeout: seconds.
        """
        self._store, self._rank, self._size, self._timeout = store.clone(), rank, size, timeout
        self._interval = min(INTERVAL, timeout / 4)
        self._passed, self._where = 0, ""
        self._ended = threading.Event()
        # Two threads: what is written to a store on a host that is gone may wait for ever.
        for work in (self._tell, self._watch):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def beat(self, where: str) -> None:
        """Called by every rank alike, after every step and some of what leads to the first. The first call
        begins the watch: what is before it, such as staging a large shard set, may take long on all hosts.

        Args:
            where: what was just done, such as `step 7`.
        """
        self._passed, self._where = self._passed + 1, where

    def arrive(self) -> None:
        """Called by every rank alike, before it waits for the others; DDP's own waits are not counted."""
        if self._passed:
            self._passed += 1

    def close(self) -> None:
        """End the watch."""
        self._ended.set()

    def _tell(self) -> None:
        beats = 0
        while not self._ended.wait(self._interval):
            beats += 1
            try:
                self._store.set(f"{_KEY}/{self._rank}", f"{beats} {self._passed} {self._where}")
            except RuntimeError:  # the store has ended with the rank that held it
                return

    def _watch(self) -> None:
        seen, since = 0, time.monotonic()
        while not self._ended.wait(self._interval):
            if self._passed != seen or not seen:
                seen, since = self._passed, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                self._end()

    def _end(self) -> None:
        # Asked in a thread of its own: a store on a host that is gone may never answer.
        said = threading.Event()
        asking = threading.Thread(target=self._ask, args=(said,), daemon=True)
        asking.start()
        if not said.wait(6 * self._interval):
            self._say_gone()
        asking.join(6 * self._interval)
        os._exit(RESUMABLE)

    def _ask(self, said: threading.Event) -> None:
        """Find out who hangs; the first that does says so. Then wait for the others to find out too: they
        would call this rank lost, and without torchrun rank 0 holds the store that they ask."""
        try:
            guilty, what = self._guilty()
            if self._store.add(_ASKED, 1) == 1:
                self._say(guilty, what)
            said.set()
            while self._rank in {0, *guilty} and self._store.add(_ASKED, 0) < self._size:
                time.sleep(self._interval / 4)
        except RuntimeError:
            if not said.is_set():
                self._say_gone()
            said.set()

    def _say_gone(self) -> None:
        if self._rank == 1:
            self._say([0], "or its host, which holds the ranks' store, is gone")

    def _say(self, guilty: list[int], what: str) -> None:
        names = ", ".join(map(str, guilty))
        print(
            f"error: no step for {self._timeout:g} s (train.timeout): rank {names} {what}; all ranks end, "
            "the same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )

    def _guilty(self) -> tuple[list[int], str]:
        """The ranks that hang, and what is known of them; a RuntimeError where the store is gone."""
        before = [self._read(rank)[0] for rank in range(self._size)]
        time.sleep(3 * self._interval)
        now = [self._read(rank) for rank in range(self._size)]
        silent = [rank for rank, (beat, _, _) in enumerate(now) if beat == before[rank]]
        if silent:
            return silent, "is stopped, or its host is gone"
        fewest = min(passed for _, passed, _ in now)
        slow = [rank for rank, (_, passed, _) in enumerate(now) if passed == fewest]
        return slow, f"hangs after {now[slow[0]][2]}"

    def _read(self, rank: int) -> tuple[int, int, str]:
        """(beats, passed, where) of a rank; nothing before its first word."""
        key = f"{_KEY}/{rank}"
        if not self._store.check([key]):
            return 0, 0, "its start"
        beats, passed, where = self._store.get(key).decode().split(" ", 2)
        return int(beats), int(passed), where or "its start"
