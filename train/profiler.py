"""A torch profiler trace of some steps, to open in Perfetto or chrome://tracing."""

from pathlib import Path
from typing import Any

import torch


class Profiler:
    """Traces the steps `first:last` of a run on each rank; `first` is not among them."""

    def __init__(self, steps: str | None, folder: Path, rank: int) -> None:
        """
        Args:
            steps: `first:last`; None traces nothing.
            folder: run folder; the trace becomes `trace/rank-R-steps-FIRST-LAST.json.gz` in it.
        """
        self._first, self._last = map(int, steps.split(":")) if steps else (-1, -1)
        self._path = folder / "trace" / f"rank-{rank}-steps-{self._first}-{self._last}.json.gz"
        self._profile: Any = None

    def step(self, done: int) -> None:
        """Tell it how many steps are done."""
        if done == self._first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profile.start()
        elif done == self._last:
            self.close()

    def close(self) -> None:
        """Write what was traced, if anything was."""
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
