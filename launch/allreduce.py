"""Entry: how fast the processes of a host sum a tensor over all of them, as each training step does.

torchrun --standalone --nproc-per-node=N -m launch.allreduce FILE
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from shards.files import write_json
from train.distributed import World, world

MEGABYTES = {"cuda": 256, "cpu": 16}
WARM_UP, REPEATS = 3, 10


def bandwidth(here: World) -> float:
    """GB/s: what a rank sends and receives by a ring, 2 (n - 1) / n of the tensor, over the median time."""
    size = MEGABYTES[here.device.type] * 10**6
    tensor = torch.zeros(size // 4, device=here.device)
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if here.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    median = sorted(seconds[WARM_UP:])[REPEATS // 2]
    return 2 * (here.size - 1) / here.size * size / median / 1e9


def main() -> None:
    """Measure; rank 0 writes {"gigabytes_per_second", "ranks", "backend"} to FILE."""
    with world() as here:
        measured = bandwidth(here)
        if here.main:
            about = {"ranks": here.size, "backend": dist.get_backend()}
            write_json(Path(sys.argv[1]), {"gigabytes_per_second": measured, **about})


if __name__ == "__main__":
    main()
