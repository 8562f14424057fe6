"""What processes cost: their children count, and what they share counts once."""

import mmap
import multiprocessing
import os
import time
from typing import Any

from shards.timing import cpu_seconds, family, memory

MEBI = 1 << 20


def hold(ready: Any, end: Any, shared: int) -> None:
    """Use a third of a second of CPU time, 64 MiB of its own, and 64 MiB of another process's."""
    own = bytearray(b"x") * (64 * MEBI)
    theirs = mmap.mmap(os.open(f"/proc/{os.getppid()}/fd/{shared}", os.O_RDWR), 64 * MEBI)
    began = time.process_time()
    while time.process_time() < began + 0.33:
        pass
    assert own[-1] and theirs[:] is not None
    ready.set()
    end.wait(60)


def test_children_count_and_what_is_shared_counts_once() -> None:
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    shared = os.memfd_create("test")
    os.truncate(shared, 64 * MEBI)
    mapped = mmap.mmap(shared, 64 * MEBI)
    mapped[:] = bytes(64 * MEBI)
    before, cpu = memory(os.getpid()), cpu_seconds()
    process = context.Process(target=hold, args=(ready, end, shared))
    process.start()
    assert ready.wait(60)
    assert process.pid in family(os.getpid())
    assert 64 * MEBI < memory(os.getpid()) - before < 110 * MEBI, "its own, an interpreter, not the shared"
    assert cpu_seconds() - cpu > 0.3
    end.set()
    process.join()
    assert process.pid not in family(os.getpid())
    assert cpu_seconds() - cpu > 0.3, "what has ended counts"
    os.close(shared)
