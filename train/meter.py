"""The mean of a run's figures between two lines of its log, how fast it is, how long it waits for data."""

import time
from collections.abc import Iterator

import torch

from pipeline.loader import Batch


class Meter:
    """Collects on the device, so that only reading it makes the host wait."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._sums: dict[str, torch.Tensor] = {}
        self._steps, self._images, self._waited, self._since = 0, 0, 0.0, time.perf_counter()

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, the time until each is there counted."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def add(self, images: int, figures: dict[str, torch.Tensor]) -> None:
        """Count a step: its images over all ranks, and scalars on the device."""
        self._steps += 1
        self._images += images
        self._sums = {name: self._sums.get(name, 0) + value for name, value in figures.items()}

    def read(self) -> dict[str, float]:
        """Means since the last reading, `images_per_second` of all ranks, `data_wait` of this one (0..1)."""
        figures = {name: float(value) / self._steps for name, value in self._sums.items()}
        seconds = time.perf_counter() - self._since  # after the device has caught up
        figures |= {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        self.reset()
        return figures


def gpu_memory(device: torch.device) -> dict[str, float]:
    """`gpu_memory`: GiB that torch has held at most, of `gpu_memory_total` of the GPU; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    held = torch.cuda.max_memory_reserved(device)
    return {"gpu_memory": held / 2**30, "gpu_memory_total": torch.cuda.mem_get_info(device)[1] / 2**30}
