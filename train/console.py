"""What training says on the console: one tidy line an interval, with the time that is left."""

import sys
import time
from collections.abc import Mapping

INTERVAL = 10.0
"""Seconds between two lines at least; an epoch's last is always shown."""


class Console:
    """Rank 0's lines."""

    def __init__(self, *, steps: int, epochs: int, start: int, active: bool) -> None:
        """
        Args:
            steps: of an epoch.
            epochs: at most.
            start: the step that this process goes on from.
            active: whether it prints.
        """
        self._steps, self._total, self._active = steps, steps * epochs, active
        self._first = (start, time.monotonic())
        self._shown = -INTERVAL

    def seconds_left(self, step: int) -> float:
        """To the last epoch's end, validation counted in, by this process's speed so far."""
        done, since = step - self._first[0], time.monotonic() - self._first[1]
        return round((self._total - step) * since / max(1, done), 1)

    def say(self, line: str) -> None:
        """Print a line, whatever the time."""
        if self._active:
            print(line, file=sys.stderr, flush=True)

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Print the figures of a step, if it is time to."""
        now, ended = time.monotonic(), step % self._steps == 0
        if now - self._shown < INTERVAL and not ended:
            return
        self._shown = now
        epoch = (step - 1) // self._steps + 1
        self.say(
            f"epoch {epoch:>3}/{self._total // self._steps}  step {step:>6,}/{self._total:,}"
            f"  loss {figures.get('loss', float('nan')):.3f}  {figures['images_per_second']:>7,.0f} images/s"
            f"  waiting {figures['data_wait']:>3.0%}  {clock(figures['seconds_left'])} left"
        )


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS, or M:SS."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
