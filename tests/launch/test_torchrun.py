"""What the user is told when ranks end: the first one's error, once, and a status that says what helps."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from configs.errors import StageError
from launch.torchrun import End, torchrun

SAYS = """import os, signal, sys, time; rank = int(os.environ['RANK']); path = sys.argv[1]
os.symlink(str(os.getpid()), f'{path}/pid{rank}-' + os.environ['TORCHELASTIC_RESTART_COUNT'])

def say(words): print(words, file=sys.stderr, flush=True); open(f'{path}/said{rank}', 'w').close()
def lost(): say(f'error: rank {rank}: another rank is gone'); sys.exit(75)

# However slow the machine: the other rank's words or end, and no sooner.
def after(other, found):
    while not found(other): time.sleep(0.01)
def said(other): return os.path.exists(f'{path}/said{other}')
def dead(other):
    try: stat = '/proc/' + os.readlink(f'{path}/pid{other}-0') + '/stat'
    except OSError: return False
    try: return open(stat).read().rpartition(') ')[2].startswith('Z')
    except OSError: return True

"""
ENDS: dict[str, tuple[str, int, list[str], list[str]]] = {
    # what the ranks do: (…, status, said, not said)
    "rank 1 raises, then rank 0 is drawn along": (
        "if rank == 1: raise ValueError('the cause')\nafter(1, dead); lost()",
        1,
        ["ValueError: the cause", "error: rank 1 on", "exit status 1, the first of 2", "1/stderr.log"],
        ["error: rank 0 on"],
    ),
    "both raise, rank 1 first": (
        "if rank == 0: after(1, dead)\nraise ValueError(f'of {rank}')",
        1,
        ["ValueError: of 1", "error: rank 1 on"],
        ["error: rank 0 on"],
    ),
    "rank 1 is killed": (
        "if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nafter(1, dead); lost()",
        75,
        ["error: rank 1 on", "killed by SIGKILL (out of memory?"],
        ["error: rank 0 on"],
    ),
    "somebody ends rank 1 before it can heed that": (
        "if rank == 1: os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(600)",
        75,
        ["error: rank 1 on", "killed by SIGTERM, the first of 2"],
        ["error: rank 0 on"],
    ),
    "a mistake that rank 1 tells, rank 0 silent": (
        "if rank == 1: say('error: rank 1: bad.jpg')\nelse: after(1, said)\nsys.exit(2)",
        2,
        ["error: rank 1: bad.jpg"],
        ["exit status", "start again"],
    ),
    "one that says nothing": (
        "if rank == 1: after(0, dead)\nsys.exit(2)",
        2,
        ["error: rank 0 on", "exit status 2"],
        [],
    ),
    "told to end": (
        "if rank == 1: after(0, said)\nlost()",
        75,
        ["error: rank 0: another rank is gone"],
        ["start again"],
    ),
    "told to end by another host": (
        "if rank == 0: say('told to stop: step 3 is saved')\nelse: after(0, said)\nsys.exit(75)",
        75,
        ["told to stop: step 3"],
        ["error:"],
    ),
    "told to end by another host, rank 1 before it can heed that": (
        "if rank == 1: time.sleep(600)\nsay('told to stop: step 3 is saved'); sys.exit(75)",
        75,
        ["told to stop: step 3"],
        ["error:"],
    ),
}


class Ended(NamedTuple):
    """How the launcher ended."""

    status: int
    out: str
    err: str


Launch = Callable[..., Ended]


@pytest.fixture
def launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Launch]:
    """Runs a script on two ranks, their logs in tmp_path/logs; torch's signal handlers go again."""

    def run(script: str, *options: str) -> Ended:
        (tmp_path / "ranks.py").write_text(SAYS + script)
        words = ["--standalone", "--nproc-per-node=2", "--monitor-interval=0.1", f"--log-dir={tmp_path}/logs"]
        words += ["--redirects=3", "--tee=0:3", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
        status = 0
        try:
            torchrun([*words, *options, str(tmp_path / "ranks.py"), str(tmp_path)], tmp_path / "logs")
        except StageError as error:
            status = error.status
        return Ended(status, *capsys.readouterr())

    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("case", ENDS)
def test_the_first_ranks_error_is_what_is_shown(case: str, launch: Launch, tmp_path: Path) -> None:
    script, status, said, unsaid = ENDS[case]
    restarts = "3" if status == 2 else "0"  # a mistake is not tried again
    ended = launch(script, f"--max-restarts={restarts}")
    assert ended.status == status, ended.err
    for words in said:
        assert ended.err.count(words) == 1, ended.err
    assert not any(words in ended.err for words in unsaid), ended.err
    assert "ChildFailedError" not in ended.err
    assert (tmp_path / "logs").exists() == (status != 2)


HANGS = "error: no step for 6 s (train.timeout): rank 0 hangs after step 7"
GROUPS: dict[str, tuple[list[tuple[int, int, str]], int, str]] = {
    # (seconds, exit status, told) of each rank of a host; the launcher's status; what it says
    "a rank of another host told a mistake": ([(0, 2, ""), (0, 2, "")], 2, "error: a rank of another host"),
    "rank 0 hangs, rank 2 knows": ([(30, -9, ""), (0, 75, ""), (0, 75, HANGS)], 75, HANGS),
    "rank 1 hangs, rank 0 knows": ([(0, 75, HANGS), (31, -9, "")], 75, ""),
    "rank 0 told a mistake, and waits for W&B": ([(30, -9, "error: bad"), (0, 2, "")], 2, ""),
    "rank 1 is killed by another": ([(1, 75, "error: lost"), (0, -9, "")], 75, "error: rank 1 on"),
}


@pytest.mark.parametrize("case", GROUPS)
def test_who_was_first_of_a_host_among_others(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not one that torch killed, 30 s after another had ended: nobody is to look for a lack of memory."""
    ranks, status, said = GROUPS[case]
    ends = []
    for rank, (seconds, code, told) in enumerate(ranks):
        (tmp_path / str(rank)).write_text(told)
        failure = ProcessFailure(rank, 1, code, error_file="")
        failure.timestamp = 1000 + seconds
        log = str(tmp_path / str(rank))
        ends.append(End.of(rank, failure, log, began=1000, terminated=seconds >= 30))
    first = min(ends, key=End.order)
    first.tell(ends, len(ends), hosts=2)
    words = capsys.readouterr().err
    assert (first.status, words.startswith(said), bool(words)) == (status, True, bool(said)), words


def test_every_rank_has_a_log_and_rank_0_the_console(launch: Launch, tmp_path: Path) -> None:
    ended = launch("print(f'out {rank}', flush=True); print(f'err {rank}', file=sys.stderr)")
    assert ended == (0, "out 0\n", "err 0\n")
    logs = {path.relative_to(path.parents[1]): path.read_text() for path in tmp_path.glob("logs/*/*/*/*.log")}
    assert {str(name): text for name, text in logs.items()} == {
        f"{rank}/std{stream}.log": f"{stream} {rank}\n" for rank in (0, 1) for stream in ("out", "err")
    }


def test_a_lost_rank_starts_all_again(launch: Launch) -> None:
    script = (
        "if rank == 1 and not os.path.exists(path + '/once'):\n"
        "    open(path + '/once', 'w'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "if rank == 0 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': time.sleep(60)\n"
        "print('whole', flush=True)"
    )
    ended = launch(script, "--max-restarts=2")
    assert (ended.status, ended.out) == (0, "whole\n"), ended.err
    assert "all ranks start again from the newest checkpoint; 1 restarts left" in ended.err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_are_told_to_end_may_save_first(
    sent: signal.Signals, launch: Launch, tmp_path: Path
) -> None:
    """The launcher hands the signal on, waits, starts nothing again, and ends as what can go on."""
    script = (
        "told = []\n"
        "for s in (signal.SIGTERM, signal.SIGUSR1): signal.signal(s, lambda number, _: told.append(number))\n"
        "open(f'{path}/ready{rank}', 'w').close()\n"
        "while not told: time.sleep(0.01)\n"
        "time.sleep(0.5); open(f'{path}/saved{rank}-{told[0]}', 'w').close(); sys.exit(75)"
    )

    def send() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), sent)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    ended = launch(script, "--max-restarts=3")
    thread.join()
    assert ended.status == 75, ended.err
    assert {p.name for p in tmp_path.glob("saved*")} == {f"saved{rank}-{int(sent)}" for rank in (0, 1)}
    assert "start again" not in ended.err
