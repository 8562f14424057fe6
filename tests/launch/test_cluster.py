"""Each process of a job learns which part of the packing is its own."""

import pytest

from launch.cluster import cores, part
from shards.claims import Part

JOBS = {
    "nothing": ({}, Part(0, 1)),
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_ARRAY_TASK_ID": "1"}, Part(3, 8)),
    "array": (
        {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "5"},
        Part(4, 5),
    ),
    "array by twos": (
        {
            "SLURM_ARRAY_TASK_ID": "4",
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_COUNT": "4",
            "SLURM_ARRAY_TASK_STEP": "2",
        },
        Part(2, 4),
    ),
    "array with gaps": (
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"},
        Part(8, 9),
    ),
    "srun": ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, Part(2, 4)),
    "sbatch alone": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Part(0, 1)),
}


@pytest.mark.parametrize("job", JOBS)
def test_the_part_is_what_the_launcher_says(job: str) -> None:
    environment, expected = JOBS[job]
    assert part(environment) == expected


def test_cores_are_shared_by_the_processes_of_a_host() -> None:
    assert cores({"LOCAL_WORLD_SIZE": "1000"}) == 1
    assert cores({}) >= 1
