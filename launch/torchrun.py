"""Ranks on this host: torchrun's own agent, in this process, so that it can say plainly what became of them.

It takes torchrun's arguments, so that what `moleprint launch` shows is what it does. Beyond torchrun:

- the error that the user is shown is that of the rank which failed first, from its log;
- a mistake of the user's (exit status 2) is not tried again, whatever --max-restarts says;
- told to end (SIGTERM, SIGUSR1), it lets the ranks save and end of themselves;
- hosts that were together tell one that vanished (status 75) from one that has ended the run.
"""

import contextlib
import logging
import shutil
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed import run as torch_run
from torch.distributed.elastic.agent.server.api import DEFAULT_ROLE, RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api

from configs.errors import RESUMABLE, StageError, UserError
from shards.files import new_folder

MISTAKE = 2
"""Exit status of a rank that ended for a mistake of the user's, which it has told, or a peer of it has."""
GRACE = 100
"""Seconds for ranks that are told to end: the recipes of SLURM and Kubernetes give 120."""
TORCH_GRACE = 30
"""Seconds that torch gives the other ranks of a host to end when one has failed; then it kills them."""
LINGER = 5
"""Seconds that the host where all meet stays when the run has ended, so that the others hear of it."""
LINES = 25
"""Last lines of a failed rank's log that are shown."""


def torchrun(arguments: Sequence[str], logs: Path) -> None:
    """What `torchrun ARGUMENTS` does.

    Args:
        arguments: torchrun's.
        logs: their --log-dir; nothing of these ranks stays there after a mistake of the user's.

    Raises:
        StageError: if a rank ends with an error, or the ranks were told to end.
        UserError: if the hosts do not come together.
        KeyboardInterrupt: after Ctrl-C.
    """
    for name in list(logging.root.manager.loggerDict):  # each of torch's has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    parsed = torch_run.parse_args(list(arguments))  # type: ignore[no-untyped-call]
    if parsed.standalone:  # as torch's own run() does
        parsed.rdzv_backend, parsed.rdzv_endpoint, parsed.rdzv_id = "c10d", "localhost:0", uuid.uuid4().hex
    with _logs(logs):
        config, command, words = torch_run.config_from_args(parsed)
        # An empty name is the only way to lines without a prefix.
        config = replace(config, role="", log_line_prefix_template="${role_name}")
        agent = partial(_Agent, is_host=config.rdzv_configs.get("is_host") == "1")
        setattr(api, "LocalElasticAgent", agent)  # noqa: B010  # torch has no other way to put one there
        try:
            api.launch_agent(config, command, words)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise StageError(RESUMABLE) from None
        except RendezvousClosedError:
            _say("error: the other hosts have ended this run; what they print says why")
            raise StageError(1) from None
        except (RendezvousError, DistError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(
                f"the hosts did not come together at {config.rdzv_endpoint} ({reason[:200]}); start the same "
                "command on all of them, and let them reach that port"
            ) from None


@contextlib.contextmanager
def _logs(folder: Path) -> Iterator[None]:
    """The folder of all logs; those of ranks that began in this block go after a mistake of the user's."""
    with new_folder(folder):
        before = {*folder.glob("*")}
        try:
            yield
        except StageError as error:
            if error.status == MISTAKE:
                for mine in {*folder.glob("*")} - before:  # gone, where two launchers share a host's name
                    shutil.rmtree(mine, ignore_errors=True)
            raise


class _Agent(LocalElasticAgent):
    """Says what became of the ranks, and knows what is not worth a second try."""

    def __init__(self, *arguments: Any, is_host: bool, **named: Any) -> None:
        """
        Args:
            is_host: whether this is where several hosts meet.
        """
        super().__init__(*arguments, **named)
        self._is_host = is_host
        self._ended = False  # whether another host has been seen to end the run

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """As torch's; raises StageError where this host was together with others that are lost."""
        try:
            result: RunResult | None = super().run(role)
        except (RendezvousError, DistError) as error:
            if isinstance(error, RendezvousClosedError) or not self._pcontext:  # never together
                raise
            if self._ended:
                raise RendezvousClosedError from error
            reason = " ".join(str(error.__cause__ or error).split()) or "too few came back in time"
            _say(
                f"error: other hosts are lost ({reason[:200]}); the same command goes on from the newest step"
            )
            raise StageError(RESUMABLE) from None
        except StageError:
            self._leave()
            raise
        self._leave()
        # None: it waited in vain for a place among --nodes. torch goes on as if it were a result.
        return result or RunResult(WorkerState.SUCCEEDED)

    def _leave(self) -> None:
        """Let the other hosts know that the run has ended, before the store that they ask ends with it."""
        if self._is_host:
            self._worker_group.spec.rdzv_handler.shutdown()
            time.sleep(LINGER)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ended = self._ended_ranks()
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state == WorkerState.HEALTHY:
            self._ended = worker_group.spec.rdzv_handler.is_closed()
        if result.is_failed() and result.failures and self._pcontext:
            logs, began = self._pcontext.stderrs, min(f.timestamp for f in result.failures.values())
            ends = [
                End.of(r, f, logs[f.local_rank], began, terminated=f.local_rank not in ended)
                for r, f in result.failures.items()
            ]
            first = min(ends, key=End.order)
            first.tell(ends, len(worker_group.workers), worker_group.group_world_size or 1)
            if first.status == MISTAKE or not self._remaining_restarts:
                raise StageError(first.status)
        return result

    def _ended_ranks(self) -> set[int]:
        """Local ranks that have ended of themselves: once it sees one, torch terminates the others."""
        if not isinstance(self._pcontext, SubprocessContext):
            return set()
        ranks = self._pcontext.subprocess_handlers.items()
        return {local_rank for local_rank, rank in ranks if rank.proc.poll() is not None}

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        left = self._remaining_restarts
        _say(
            f"{socket.gethostname()}: all ranks start again from the newest checkpoint; {left} restarts left"
        )
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, **how: Any) -> None:
        if self._pcontext:
            self._pcontext.close(death_sig, timeout=GRACE)
        super()._shutdown(death_sig, **how)


@dataclass(frozen=True)
class End:
    """How a rank ended that did not end well."""

    rank: int
    local_rank: int
    status: int
    """Exit status of the launcher if this rank was the first."""
    exitcode: int
    time: int
    """Seconds since 1970."""
    killed_by_torch: bool
    """Whether it ended by a signal of torch's: it had not yet begun to heed SIGTERM, or did not in time."""
    log: Path
    """What it wrote on standard error."""

    @classmethod
    def of(cls, rank: int, failure: ProcessFailure, log: str, began: int, *, terminated: bool) -> "End":
        """What torch noted of a rank.

        Args:
            began: when the first of them ended, in seconds since 1970.
            terminated: whether torch may have told it to end, since another had.
        """
        killed = failure.exitcode in (-signal.SIGKILL, -signal.SIGTERM)  # from outside: it can start again
        status = failure.exitcode if failure.exitcode in (MISTAKE, RESUMABLE) else RESUMABLE if killed else 1
        late = failure.exitcode == -signal.SIGKILL and failure.timestamp - began >= TORCH_GRACE - 1
        by_torch = terminated and (late or failure.exitcode == -signal.SIGTERM)
        return cls(rank, failure.local_rank, status, failure.exitcode, failure.timestamp, by_torch, Path(log))

    def order(self) -> tuple[bool, bool, int, float]:
        """Sorts the one first that failed first, before those that were only drawn along."""
        silent = self.exitcode == MISTAKE and not self.told()
        drawn_along = silent or self.exitcode in (RESUMABLE, -signal.SIGTERM)
        return self.killed_by_torch, drawn_along, self.time, self.log.stat().st_mtime

    def lines(self) -> list[str]:
        """Of its log."""
        return self.log.read_text(errors="replace").splitlines()

    def told(self) -> list[str]:
        """Lines in which it told the user why it ends."""
        return [line for line in self.lines() if line.startswith(("error:", "told to stop:"))]

    def tell(self, ends: "Sequence[End]", ranks: int, hosts: int) -> None:
        """Show why it ended; local rank 0's own words are on the console already.

        Args:
            ends: those of all ranks of this host: one of them may have told what this one knows of.
            ranks: how many there are.
            hosts: of the run.
        """
        if self.exitcode in (MISTAKE, RESUMABLE):
            for end in sorted(ends, key=lambda end: (end is not self, end.order())):
                if told := end.told():
                    _say(*(told if end.local_rank else ()))
                    return
        if self.exitcode == MISTAKE and hosts > 1:
            _say("error: a rank of another host has found a mistake, and tells it there")
            return
        _say(*(self.lines()[-LINES:] if self.local_rank else ()))
        how = f"ended with exit status {self.exitcode}"
        if self.exitcode < 0:
            how = f"was killed by {signal.Signals(-self.exitcode).name}"
        if self.exitcode == -signal.SIGKILL:
            how += " (out of memory? `dmesg` tells)"
        where = f"rank {self.rank} on {socket.gethostname()}"
        _say(f"error: {where} {how}, the first of {ranks}; its log: {self.log}")


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
