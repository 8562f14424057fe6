"""Nothing ends in a lost run: killed, told to stop, out of room, one rank gone or hanging.

Every fault is tried once; `pytest tests/train/test_faults.py --tries 20` tries it at as many random moments.
"""

import ctypes
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from test_resume import assert_equal_runs, checkpoints, lines
from torch.distributed import TCPStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from configs.errors import RESUMABLE
from configs.load import dump
from pipeline.loader import Batch
from train import encoder, entry
from train.watchdog import Watchdog

PATIENCE, PAUSE = 600, 0.1  # seconds: for whatever the busiest machine takes, and before each step
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train.encoder", "timm"])  # torch and DALI are loaded once for all children


@pytest.fixture
def moment(attempt: int, request: pytest.FixtureRequest) -> random.Random:
    """Random moments of this try, others in the next."""
    return random.Random(f"{request.node.originalname} {attempt}")


def train(config: Path, rank: int = 0, size: int = 1, port: int = 0) -> None:
    """What `torchrun -m train.encoder CONFIG` starts for a rank; its words go beside the configuration."""
    words = os.open(config.with_suffix(f".{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    in_no_hurry()
    if size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)})
    sys.argv = ["encoder", str(config)]
    entry.start(encoder.run)


def in_no_hurry() -> None:
    """For as long as this process lives one thread, as the unbroken run has, and steps that leave time for
    a fault to come."""
    torch.set_num_threads(1)
    mock.patch.object(torch, "set_num_threads").start()
    plain = encoder.Trainer.train_step

    def step(trainer: encoder.Trainer, batch: Batch) -> Any:
        time.sleep(PAUSE)
        return plain(trainer, batch)

    mock.patch.object(encoder.Trainer, "train_step", step).start()


@contextmanager
def started(
    config: Path, size: int = 1, work: Callable[..., None] = train
) -> Iterator[list[ForkServerProcess]]:
    """Ranks that train; all are gone when the block ends."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = [FORKS.Process(target=work, args=(config, rank, size, port)) for rank in range(size)]
    for process in ranks:
        process.start()
    yield ranks
    for process in ranks:
        process.kill()
        process.join()


def ended(ranks: list[ForkServerProcess], seconds: float = PATIENCE) -> list[int | None]:
    """Exit statuses, once all have ended."""
    for process in ranks:
        process.join(seconds)
    return [process.exitcode for process in ranks]


def until(what: Any, ranks: list[ForkServerProcess], seconds: float = PATIENCE) -> bool:
    """Wait for something while all ranks live; whether it came."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        if not all(process.is_alive() for process in ranks):
            return False
        time.sleep(0.01)
    return True


def words(config: Path, rank: int = 0) -> str:
    """All that a rank has said."""
    return config.with_suffix(f".{rank}.txt").read_text()


@pytest.fixture
def config(tiny_experiment: Any, tmp_path: Path) -> Path:
    """The configuration of a short run, a checkpoint after every step."""
    path = tmp_path / "config.yaml"
    path.write_text(
        dump(
            tiny_experiment(
                tmp_path / "run", train={"epochs": 2, "patience": 0, "checkpoint_every": 1, "probe_images": 0}
            )
        )
    )
    return path


def test_killed_at_any_moment_it_ends_as_the_unbroken_one(
    config: Path, trained: Path, moment: random.Random
) -> None:
    folder = config.parent / "run"
    kills = 0
    while True:
        with started(config) as (process,):
            begun = len(checkpoints(folder))
            # From its start on, or from a checkpoint on, of which there is one every step.
            if until(lambda begun=begun: begun == 3 or len(checkpoints(folder)) > begun, [process]):  # type: ignore[misc]
                process.join(moment.uniform(0, 0.6))
            if process.exitcode is None and kills < 3:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            if ended([process]) == [0]:
                break
            assert process.exitcode == -signal.SIGKILL
    assert kills
    assert_equal_runs(folder, trained)
    assert not list(folder.rglob("*.tmp"))


def stuck(written: int, config: Path, *rank: int) -> None:
    """Train, but come no further than half of a checkpoint's bytes once some have been written."""
    plain, left = torch.save, iter(range(written))

    def save(state: Any, file: Any) -> None:
        if next(left, None) is not None:
            plain(state, file)
            return
        whole = io.BytesIO()
        plain(state, whole)
        file.write(whole.getbuffer()[: whole.tell() // 2])
        file.flush()
        config.with_suffix(".half").touch()
        time.sleep(PATIENCE)

    torch.save = save
    train(config, *rank)


def test_killed_while_it_writes_a_checkpoint_it_ends_as_the_unbroken_one(
    config: Path, trained: Path, moment: random.Random
) -> None:
    folder, written = config.parent / "run", moment.randrange(1, 8)
    with started(config, work=partial(stuck, written)) as (process,):
        assert until(config.with_suffix(".half").exists, [process]), words(config)
        os.kill(process.pid, signal.SIGKILL)
        assert ended([process]) == [-signal.SIGKILL]
    assert checkpoints(folder)[-1] == f"step-{written:08d}.pt"
    assert list(folder.glob("checkpoints/.step-*.tmp"))
    with started(config) as (process,):
        assert ended([process]) == [0], words(config)
    assert_equal_runs(folder, trained)
    assert not list(folder.rglob("*.tmp"))


def test_told_to_stop_it_saves_its_step_and_goes_on(
    config: Path, trained: Path, moment: random.Random
) -> None:
    """By one signal, and when it has gone on by the other."""
    folder = config.parent / "run"
    config.write_text(config.read_text().replace("checkpoint_every: 1", "checkpoint_every: 0"))
    before = 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with started(config) as (process,):
            enough = before + moment.randrange(1, 4)
            assert until(
                lambda enough=enough: (folder / "metrics.jsonl").exists() and len(lines(folder)) >= enough,  # type: ignore[misc]
                [process],
            )
            os.kill(process.pid, number)
            assert ended([process]) == [RESUMABLE], words(config)
        step = lines(folder)[-1]["step"]
        assert f"told to stop: step {step} is saved" in words(config)
        assert checkpoints(folder)[-1] == f"step-{step:08d}.pt"
        before = len(lines(folder))
    with started(config) as (process,):
        assert ended([process]) == [0], words(config)
    assert_equal_runs(folder, trained)


@pytest.fixture
def endless(tiny_experiment: Any, tmp_path: Path) -> Path:
    """The configuration of a run that would take for ever."""
    path = tmp_path / "config.yaml"
    settings = {"epochs": 10_000, "patience": 0, "checkpoint_every": 1, "probe_images": 0}
    path.write_text(dump(tiny_experiment(tmp_path / "run", train=settings)))
    return path


def test_all_ranks_stop_at_one_step_when_one_is_told(endless: Path, moment: random.Random) -> None:
    folder = endless.parent / "run"
    with started(endless, 2) as ranks:
        assert until(lambda: checkpoints(folder), ranks)
        time.sleep(moment.uniform(0, 0.5))
        os.kill(ranks[moment.randrange(2)].pid, signal.SIGUSR1)
        assert ended(ranks) == [RESUMABLE] * 2, words(endless) + words(endless, 1)
    step = lines(folder)[-1]["step"]
    assert f"told to stop: step {step} is saved" in words(endless)
    assert checkpoints(folder)[-1] == f"step-{step:08d}.pt"


def test_a_rank_that_is_stopped_ends_all_by_name(endless: Path, moment: random.Random) -> None:
    """Either rank: 0 holds the store that the others speak through, as without torchrun."""
    folder, guilty = endless.parent / "run", moment.randrange(2)
    endless.write_text(endless.read_text().replace("timeout: 1800.0", "timeout: 10"))
    with started(endless, 2) as ranks:
        assert until(lambda: checkpoints(folder), ranks)
        time.sleep(moment.uniform(0, 0.5))
        os.kill(ranks[guilty].pid, signal.SIGSTOP)
        assert ended([ranks[1 - guilty]]) == [RESUMABLE], words(endless, 1 - guilty)
    assert f"no step for 10 s (train.timeout): rank {guilty} " in words(endless, 1 - guilty)


def astray(method: str, config: Path, rank: int, size: int, port: int) -> None:
    """Train; in rank 1 a method of the trainer never returns, the step when three were made."""
    plain = getattr(encoder.Trainer, method)

    def hang(trainer: encoder.Trainer, *arguments: Any) -> Any:
        if method == "train_step" and trainer.progress.step < 3:
            return plain(trainer, *arguments)
        return time.sleep(PATIENCE)

    if rank == 1:
        mock.patch.object(encoder.Trainer, method, hang).start()
    train(config, rank, size, port)


@pytest.mark.parametrize(
    ("method", "last"),
    [
        ("_build", "opening the shard set"),
        ("_distribute", "building the encoder"),
        ("train_step", "step 3"),
        ("save", "step 1"),
    ],
)
def test_a_rank_that_never_comes_to_where_the_others_wait_is_named(
    method: str, last: str, endless: Path
) -> None:
    endless.write_text(endless.read_text().replace("timeout: 1800.0", "timeout: 10"))
    with started(endless, 2, partial(astray, method)) as ranks:
        assert ended(ranks) == [RESUMABLE] * 2, words(endless) + words(endless, 1)
    said = words(endless) + words(endless, 1)
    assert f"no step for 10 s (train.timeout): rank 1 hangs after {last}; all ranks end" in said, said
    assert said.count("no step for") == 1, said


def test_a_rank_that_is_killed_ends_all(endless: Path, moment: random.Random) -> None:
    folder = endless.parent / "run"
    with started(endless, 2) as ranks:
        assert until(lambda: checkpoints(folder), ranks)
        time.sleep(moment.uniform(0, 0.5))
        guilty = moment.randrange(2)
        os.kill(ranks[guilty].pid, signal.SIGKILL)
        assert ended([ranks[1 - guilty]]) == [RESUMABLE], words(endless, 1 - guilty)
    assert "Traceback" not in words(endless, 1 - guilty)
    assert "another rank is gone" in words(endless, 1 - guilty)


def step_by_step(rank: int, port: int, steps: int, said: Path) -> None:
    """A rank that makes some steps and then hangs, its other threads alive."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    store = TCPStore("localhost", port, is_master=rank == 0, wait_for_workers=False)
    watchdog = Watchdog(store, rank=rank, size=3, timeout=2)
    for step in range(steps):
        watchdog.beat(f"step {step + 1}")
        time.sleep(0.05)
    time.sleep(60)


def test_a_rank_that_hangs_is_named_with_its_step(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = [
        FORKS.Process(target=step_by_step, args=(rank, port, steps, tmp_path / str(rank)))
        for rank, steps in enumerate((9, 7, 9))
    ]
    for process in ranks:
        process.start()
    assert ended(ranks) == [RESUMABLE] * 3
    said = "".join((tmp_path / str(rank)).read_text() for rank in range(3))  # whoever asks first says it
    assert "rank 1 hangs after step 7; all ranks end" in said and said.count("error:") == 1


def weigh(config: Path, *rank: int) -> None:
    """Train, and note the resident memory after every validation, less what the allocator keeps for later."""
    plain, sizes = encoder.Trainer.validate, []

    def validate(trainer: encoder.Trainer) -> None:
        plain(trainer)
        trainer.saver.settle()
        ctypes.CDLL(None).malloc_trim(0)  # free pages of its arenas come and go by 10 MB
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))
        config.with_name("sizes.json").write_text(json.dumps(sizes))

    encoder.Trainer.validate = validate  # type: ignore[method-assign]
    train(config, *rank)


def test_memory_is_flat_over_epochs(tiny_experiment: Any, tmp_path: Path) -> None:
    epochs = 16
    settings = {"epochs": epochs, "patience": 0, "ema": 0.9, "probe_images": 16}
    loader = {"global_batch": 8, "size": 32, "steps_per_epoch": 1, "threads": 1}
    wide = {"backbone": "shufflenet_v2_x0_5", "embedding_dim": 2048}
    config = tmp_path / "config.yaml"
    config.write_text(dump(tiny_experiment(tmp_path / "run", train=settings, loader=loader, model=wide)))
    with started(config, work=weigh) as (process,):
        assert ended([process]) == [0], words(config)
    sizes = np.array(json.loads((tmp_path / "sizes.json").read_text())) / 1e6
    assert len(sizes) == epochs
    slope = np.polyfit(np.arange(epochs // 2), sizes[epochs // 2 :], 1)[0]
    assert slope < 1, f"{slope:.2f} MB an epoch: {sizes.round()}"  # the weights alone are 10 MB


def launch(config: Path) -> None:
    """What `torchrun --standalone --nproc-per-node=2 --max-restarts=1 -m train.encoder CONFIG` does, but that
    its ranks are forks of this process, which has loaded all modules."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        monitor_interval=0.1,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        start_method="fork",
    )
    elastic_launch(settings, launched)(config)


def launched(config: Path) -> None:
    """A rank, as the launcher's environment describes it."""
    train(config, int(os.environ["RANK"]))


def test_torchrun_starts_again_after_a_rank_is_lost(config: Path, moment: random.Random) -> None:
    folder = config.parent / "run"
    launcher = FORKS.Process(target=launch, args=(config,))
    launcher.start()
    assert until(lambda: checkpoints(folder), [launcher])
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    time.sleep(moment.uniform(0, 0.1))
    os.kill(int(ranks[moment.randrange(2)]), signal.SIGKILL)
    assert ended([launcher]) == [0], words(config) + words(config, 1)
    assert [row["step"] for row in lines(folder) if "loss" in row] == list(range(1, 9))
    assert (folder / "encoder.json").exists()
