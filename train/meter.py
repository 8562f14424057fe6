"""The mean of a run's figures between two lines of its log, how fast it is, how long it waits for data."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.loader import Batch


class Meter:
    """Collects on the device, so that only reading it makes the host wait."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._images, self._waited, self._since = 0, 0.0, time.perf_counter()

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, the time until each is there counted."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def add(self, images: int, figures: dict[str, torch.Tensor], good: torch.Tensor) -> None:
        """Count a step: its images over all ranks, and scalars on the device.

        These count if the step is `good`; one that is NaN is a figure that the step does not have.
        """
        self._images += images
        for name, value in figures.items():
            there = good & ~value.isnan()
            self._sums[name] = self._sums.get(name, 0) + torch.where(there, value, 0)
            self._counts[name] = self._counts.get(name, 0) + there

    def read(self) -> dict[str, float]:
        """Means since the last reading, `images_per_second` of all ranks, `data_wait` of this one (0..1).

        A figure that no step had has no mean.
        """
        counts = {name: int(count) for name, count in self._counts.items()}
        figures = {name: float(self._sums[name]) / count for name, count in counts.items() if count}
        seconds = time.perf_counter() - self._since  # after the device has caught up
        figures |= {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        self.reset()
        return figures

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two readings: all but the clock."""
        return {"sums": self._sums, "counts": self._counts}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """From a checkpoint."""
        self._sums, self._counts = (
            {name: value.to(device) for name, value in state[kind].items()} for kind in ("sums", "counts")
        )


def gpu_memory(device: torch.device) -> dict[str, float]:
    """`gpu_memory`: GiB that torch has held at most, of `gpu_memory_total` of the GPU; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    held = torch.cuda.max_memory_reserved(device)
    return {"gpu_memory": held / 2**30, "gpu_memory_total": torch.cuda.mem_get_info(device)[1] / 2**30}
