"""Results come in order; workers end when their parent is stopped, fails or is killed."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from shards.workers import in_order

ROOT = Path(__file__).parents[2]


def test_results_come_in_order_from_other_processes() -> None:
    results = list(in_order(pow, ((n, 2) for n in range(20)), workers=2))
    assert results == [n**2 for n in range(20)]
    assert not multiprocessing.active_children()


def test_an_error_ends_the_others_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="non-negative"):
        list(in_order(time.sleep, iter([(-1,), (60,), (60,)]), workers=2))
    assert time.monotonic() - start < 20
    assert not multiprocessing.active_children()


def test_closing_ends_the_workers_at_once() -> None:
    start = time.monotonic()
    with contextlib.closing(in_order(time.sleep, iter([(0,)] * 5 + [(60,)] * 3), workers=2)) as results:
        next(results)
    assert time.monotonic() - start < 20


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(UserError, match="killed"):
        list(in_order(os._exit, iter([(9,)]), workers=2))


def test_ctrl_c_never_reaches_a_worker() -> None:
    """Not even one that still starts, and would show where: it is the parent's to deal with."""
    (blocked,) = in_order(signal.pthread_sigmask, iter([(signal.SIG_BLOCK, ())]), workers=2)
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_do_not_outlive_their_parent(how: signal.Signals) -> None:
    code = (
        "import time\nfrom shards.workers import in_order\n"
        "if __name__ == '__main__':\n"
        "    for done in in_order(time.sleep, iter([(0,)] * 5 + [(60,)] * 2), 2): print('up', flush=True)\n"
    )
    script = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert script.stdout is not None and script.stdout.readline() == "up\n"
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    assert len(children) >= 2
    script.send_signal(how)
    script.wait(timeout=20)
    script.stdout.close()
    deadline = time.monotonic() + 10
    while any(_alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [child for child in children if _alive(child)]


def _alive(process: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
