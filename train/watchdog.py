"""A rank that hangs ends them all, named, instead of leaving the others to wait for it."""

import os
import sys
import threading
import time
from typing import Any

from configs.errors import RESUMABLE

_KEY = "moleprint/beat"


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
        self._interval = min(10.0, timeout / 4)
        self._passed, self._where = 0, ""
        self._ended = threading.Event()
        # Two threads: what is written to a store on a host that is gone may wait for ever.
        for work in (self._tell, self._watch):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def beat(self, where: str) -> None:
        """Called by every rank alike, after every step and some of what leads to the first. The first call
        begins the watch: what is before it, such as staging a large shard set, may take its time.

        Args:
            where: what was just done, such as `step 7`.
        """
        self._passed, self._where = self._passed + 1, where

    def arrive(self) -> None:
        """Called by every rank alike, before it waits for the others."""
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
        gone = [0], "or its host, which holds the ranks' store, is gone", self._rank == 1
        found: list[tuple[list[int], str, bool]] = []
        asking = threading.Thread(target=lambda: found.append(self._asked() or gone), daemon=True)
        asking.start()
        asking.join(6 * self._interval)
        guilty, what, first = found[0] if found else gone
        if first:
            names = ", ".join(map(str, guilty))
            print(
                f"error: no step for {self._timeout:g} s (train.timeout): rank {names} {what}; all ranks "
                "end, the same command goes on from the newest checkpoint",
                file=sys.stderr,
                flush=True,
            )
        # The others find out for themselves: not before they have, as they would call this one lost. Without
        # torchrun rank 0 holds the store that they are asking.
        if self._rank in {0, *guilty}:
            time.sleep(6 * self._interval)
        os._exit(RESUMABLE)

    def _asked(self) -> tuple[list[int], str, bool] | None:
        """The ranks that hang, what is known of them, and whether this rank is the first to ask; None where
        the store is gone."""
        try:
            guilty, what = self._guilty()
            return guilty, what, self._store.add(f"{_KEY}/asked", 1) == 1
        except RuntimeError:
            return None

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
