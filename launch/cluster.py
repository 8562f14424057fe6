"""Which of several processes or nodes this is, as torchrun, srun or a SLURM array says."""

import os
from collections.abc import Mapping

from shards.claims import ALONE, Part


def part(environment: Mapping[str, str] = os.environ) -> Part:
    """This process's part of the packing: alone unless it was started as one of several."""

    def number(name: str, default: int) -> int:
        return int(environment.get(name, default))

    if "RANK" in environment:
        return Part(number("RANK", 0), number("WORLD_SIZE", 1))
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        place = (number("SLURM_ARRAY_TASK_ID", 0) - first) // step
        size = max(number("SLURM_ARRAY_TASK_COUNT", 1), place + 1)
        return Part(place, size)
    if "SLURM_STEP_ID" in environment:  # under srun; in a batch script alone there is one process
        return Part(number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1))
    return ALONE


def first_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this may be the first node of a job: not one that SLURM counts as another."""
    return environment.get("SLURM_NODEID", "0") == "0"


def cores(environment: Mapping[str, str] = os.environ) -> int:
    """Cores for this process: those it may run on, shared with the others that torchrun started here."""
    return max(1, len(os.sched_getaffinity(0)) // int(environment.get("LOCAL_WORLD_SIZE", 1)))
