"""Work that several packers share, through nothing but a common folder: who does what, and who is gone."""

import fcntl
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from shards.workers import Crew

Result = TypeVar("Result")
POLL = 0.2
"""Seconds between two looks at what other packers have finished."""


@dataclass(frozen=True)
class Part:
    """One of several packers of the same set: under torchrun or a SLURM array."""

    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.size == 1


ALONE = Part()


@dataclass(frozen=True)
class Job(Generic[Result]):
    """A piece of the work whose result lies in a file once it is finished."""

    name: str
    arguments: Callable[[], tuple[Any, ...]]
    """Made when the job is begun, so that what they hold is not in memory for all jobs at once."""
    finished: Callable[[], Result | None]
    """The result if the file is there and is this job's."""


def lock(path: Path, *, shared: bool = False, patience: float = 0) -> int | None:
    """Lock a file or folder; the lock ends with the process, whatever ends it.

    Args:
        patience: seconds to try again where another process holds the lock.

    Returns:
        a handle to close when done, or None if another process holds the lock.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(POLL)
                continue
            os.close(handle)
            return None
        except OSError:
            pass  # a file system without locks: packers may do the same work, and write the same bytes
        return handle


def lock_alone(handle: int) -> bool:
    """Make a shared lock an exclusive one, if nobody else shares it; else it is lost."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def complete(
    jobs: Sequence[Job[Result]],
    function: Callable[..., Result],
    folder: Path,
    part: Part,
    crew: Crew,
    report: Callable[[Result], object],
) -> list[Result]:
    """The results of all jobs, in order: found finished, done here, or done by the other packers.

    Each packer takes whatever job is open and unclaimed, beginning at its own share of the list, so that one
    that is late, slow or gone holds nobody up. Results are reported once each, in any order.
    """
    results: dict[int, Result] = {}

    def take(number: int) -> Iterator[int]:
        """Look at a job: take note if it is finished; yield a handle that claims it if it is not."""
        handle = None if part.alone else lock(folder / f"{jobs[number].name}.lock")
        # Looked at after the claim: the other packer finishes first, and lets go then.
        found = jobs[number].finished()
        if found is not None:
            results[number] = found
            report(found)
        elif handle is not None or part.alone:
            yield -1 if handle is None else handle
            return
        if handle is not None:
            os.close(handle)

    first = len(jobs) * part.rank // part.size
    while len(results) < len(jobs):
        order = [n for n in (*range(first, len(jobs)), *range(first)) if n not in results]
        claimed: list[tuple[int, int]] = []

        def tasks(order: Sequence[int] = order, claimed: list[tuple[int, int]] = claimed) -> Generator[Any]:
            for number in order:
                for handle in take(number):
                    claimed.append((number, handle))
                    yield jobs[number].arguments()

        try:
            with closing(crew.in_order(function, tasks())) as done:
                for count, result in enumerate(done):
                    number, handle = claimed[count]
                    results[number] = result
                    report(result)
                    if handle >= 0:
                        os.close(handle)
                        claimed[count] = (number, -1)
        finally:
            for _, handle in claimed:
                if handle >= 0:
                    os.close(handle)
        if len(results) < len(jobs):
            time.sleep(POLL)
    return [results[number] for number in range(len(jobs))]
