"""`moleprint bench loader`: images a second of the loader, and of its peers in the same run."""

import signal
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Self

import numpy as np
import torch
from tqdm import tqdm

from configs.errors import UserError
from configs.schema import Experiment
from pipeline import fused
from pipeline.contestants import Batches, names, prepare
from pipeline.environment import environment
from pipeline.source import Source
from shards.files import write_json
from shards.shardset import ShardSet
from shards.timing import (
    REFERENCE,
    TURNS,
    Row,
    cpu_seconds,
    memory,
    refuse_folder,
    row,
    table,
    take_turns,
)

_LOOK = 0.5  # seconds between two looks at the memory of processes
_COLUMNS = {"first_batch_seconds": "first batch, s", "cpu_seconds_per_1000": "CPU s/1,000", "megabytes": "MB"}


def bench(
    experiment: Experiment, json_file: Path | None, *, warm_up: float = 1.5, seconds: float = 3.0
) -> None:
    """Measure the loader and its peers, print a table, and write it as JSON where asked.

    All cores, and the first GPU if there is one. Each contestant has a process of its own, and they take
    turns, so that whatever else the machine does falls on all of them.

    Args:
        json_file: gets a list of rows `{"name", "images_per_second", "low", "high", "ratio", …}`.
        warm_up: seconds of each turn that do not count: the turn before may have filled its queue.
        seconds: seconds of each turn that count.

    Raises:
        UserError: if there is no shard set, a sample of it is damaged, a batch cannot be shared by the
            classes, or `json_file` is a folder.
    """
    refuse_folder(json_file)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    shards, settings = ShardSet.of(experiment), experiment.loader
    _read_once(shards)
    fused.kernel(settings.dtype, channels_last=settings.channels_last)  # compiled, if it never was
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        contestants = {}
        for name in tqdm(names(device), desc="start", unit="loader"):
            try:
                contestant = Contestant(name, experiment, device, warm_up, seconds)
            except UserError as error:
                left_out[name] = str(error)
            else:
                contestants[name] = stack.enter_context(contestant)
        rates = take_turns({name: contestant.turn for name, contestant in contestants.items()})
    rows = [row(name, rates) | contestants[name].figures() for name in rates]
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "size": settings.size,
        "batch": settings.global_batch,
        "turns": TURNS,
        "seconds": seconds,
        "images": len(shards.split("train")),
        "bytes_per_image": round(float(shards.sizes[shards.split("train")].mean())),
        "augment": settings.augment.model_dump(),
        "shards_sha256": shards.sha256,
        "environment": environment(),
    }
    print("\n".join(_report(rows, about, left_out)))
    if json_file:
        write_json(json_file, [each | about for each in rows])


class Contestant:
    """A loader in a process of its own, which waits where it is not its turn."""

    def __init__(
        self, name: str, experiment: Experiment, device: torch.device, warm_up: float, seconds: float
    ) -> None:
        """Start it, and wait for its first batch.

        Raises:
            UserError: if there is no such loader here, and why.
        """
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_compete, args=(theirs, name, experiment, device, warm_up, seconds), name=name
        )
        self._process.start()
        theirs.close()
        self._memory, self._cpu = 0, list[float]()
        try:
            self._first = self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self) -> float:
        """Images a second of a turn; the warm-up does not count."""
        with suppress(BrokenPipeError):  # it has ended: waiting for its answer tells so
            self._pipe.send("turn")
        rate, cpu = self._answer()
        self._cpu.append(cpu)
        return float(rate)

    def figures(self) -> Row:
        """What its rates do not tell."""
        return {
            "first_batch_seconds": round(self._first, 3),
            "cpu_seconds_per_1000": round(median(self._cpu), 3),
            "megabytes": round(self._memory / 1e6),
        }

    def close(self) -> None:
        """End it and all that it started."""
        self._pipe.close()
        self._process.join(10)  # seconds; it ends what it started
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._process.pid is not None
        while not self._pipe.poll(_LOOK):
            self._memory = max(self._memory, memory(self._process.pid))
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(f"the process of {self._process.name} has ended; see above why") from None
        self._memory = max(self._memory, memory(self._process.pid))
        if isinstance(answer, UserError):
            raise answer
        return answer


def _compete(
    pipe: Connection, name: str, experiment: Experiment, device: torch.device, warm_up: float, seconds: float
) -> None:
    """A contestant's process: first batch, then a turn for each word that comes, until no more can come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    try:
        open_set = prepare(name, experiment, device)
    except UserError as error:
        pipe.send(error)
        return
    began = perf_counter()
    with closing(open_set()) as batches:
        next(batches)
        _finish(device)
        answer: Any = perf_counter() - began
        while _asked_again(pipe, answer):
            answer = _turn(batches, device, warm_up, seconds)


def _asked_again(pipe: Connection, answer: Any) -> bool:
    """Give an answer and wait for the next word; none comes where the first process has ended the race."""
    try:
        pipe.send(answer)
        pipe.recv()
    except (EOFError, OSError):
        return False
    return True


def _turn(batches: Batches, device: torch.device, warm_up: float, seconds: float) -> tuple[float, float]:
    """Images a second, and CPU seconds of 1,000 images, children included, after the warm-up."""
    _count(batches, device, warm_up)
    began, before = perf_counter(), cpu_seconds()
    images = _count(batches, device, seconds)
    return images / (perf_counter() - began), 1000 * (cpu_seconds() - before) / images


def _count(batches: Batches, device: torch.device, seconds: float) -> int:
    """Images in at least so many seconds, in whole batches, one or more."""
    images, began = next(batches), perf_counter()
    while perf_counter() - began < seconds:
        images += next(batches)
    _finish(device)
    return images


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_once(shards: ShardSet) -> None:
    """Check every training image's bytes; from here on all contestants find them in the page cache."""
    source = Source(shards, max_bad=0)
    for index in tqdm(shards.split("train"), desc="read", unit="image"):
        source.fetch(np.array([index]))
    source.close()


def _report(rows: Sequence[Row], about: dict[str, Any], left_out: dict[str, str]) -> list[str]:
    """The rows, aligned, with what they mean."""
    cores, size, kilobytes = about["environment"]["cores"], about["size"], about["bytes_per_image"] / 1000
    turns = f"Medians of {about['turns']} turns of {about['seconds']:g} s, taken in rotation"
    head = f"{about['device']}, {cores} cores, {about['images']:,} JPEGs of {kilobytes:,.0f} kB"
    return [
        f"{head}, {size} × {size} pixels out, batches of {about['batch']}",
        *table(rows, more=_COLUMNS),
        *(f"left out: {name}: {why}" for name, why in left_out.items()),
        f"{turns}; the interval of a median spans all turns.",
        f"{REFERENCE}: DataLoader with a worker a core, Pillow, torchvision's first transforms.",
        "first batch: from opening the set, all imports done. CPU and MB count child processes too;",
        "MB is the most memory held at once, without files (libraries, mapped shards).",
    ]
