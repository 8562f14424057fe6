"""Weights & Biases in a thread of its own: whatever the network does, those who log never wait for it."""

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

PATIENCE = 60
"""Seconds that the end of a stage waits for what is still to be sent; the rest stays on disk."""
REACHED = 30
"""Seconds that a run may take to begin online; then it is logged offline."""
BROKEN_OFF = 20
"""Seconds that a stage waits for W&B after an error or when told to end: torchrun kills after 30."""

Call = Callable[[Any], None]


class Window:
    """Takes calls on a W&B run and makes them in order, behind the caller's back."""

    def __init__(self, start: Callable[[], Any]) -> None:
        """
        Args:
            start: begins the W&B run.
        """
        self._start = start
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._told = False
        self._thread = threading.Thread(target=self._work, name="moleprint-wandb", daemon=True)
        self._thread.start()

    def do(self, call: Call) -> None:
        """Make a call on the run, some time."""
        self._calls.put(call)

    def close(self, failed: bool) -> None:
        """Make all calls, end the run; where that takes too long, say that not all is sent, and leave it."""
        self.do(lambda run: run.finish(exit_code=int(failed)))
        self._calls.put(None)
        self._thread.join(BROKEN_OFF if failed else PATIENCE + REACHED)
        if self._thread.is_alive():
            self._say("not all could be sent in time")
            self._told = True

    def _work(self) -> None:
        try:
            run = self._start()
        except Exception as error:  # whatever W&B's client raises: training goes on without it
            if not self._told:
                self._say(f"cannot be started ({_reason(error)})")
            return
        while call := self._calls.get():
            try:
                call(run)
            except Exception as error:
                if not self._told:  # once: the next calls are likely to fail alike
                    self._say(_reason(error))
                self._told = True

    @staticmethod
    def _say(what: str) -> None:
        print(f"W&B: {what}; metrics.jsonl is complete, `wandb sync` sends what is on disk", file=sys.stderr)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
