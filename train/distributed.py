"""Where training reads torchrun's environment, and the collectives that it needs."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from configs.errors import UserError
from train.rendezvous import fresh
from train.watchdog import END, Watchdog

_ENDED = "moleprint/ended"
_watchdogs: list[Watchdog] = []  # of this process, one at most, as torch.distributed has one group


class PeerError(Exception):
    """Another rank ended with an error that it has told the user."""


class LostError(Exception):
    """Another rank is gone without a word: killed, or its host is."""


@dataclass(frozen=True)
class World:
    """Where this process stands among all of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Rank 0: the one that prints, tracks and writes."""
        return self.rank == 0

    def threads(self, asked: int) -> int:
        """DALI threads of this rank: `asked`, or this host's cores shared among its ranks if 0."""
        return asked or max(1, len(os.sched_getaffinity(0)) // self.local_size)


@contextlib.contextmanager
def world(timeout: float = 1800) -> Iterator[World]:
    """Join the process group that torchrun describes (NCCL on GPUs, else gloo), and leave it at the end.

    Without torchrun: one process, no group.

    Args:
        timeout: seconds in which a rank neither calls `beat` nor comes to where it waits for the others,
            after which it hangs. The wait itself is given `END` more, in which the rank to blame is named.

    Raises:
        PeerError: if another rank ended with an error of its own.
        LostError: if another rank is gone.
    """
    rank, size = process_rank(), _environment("WORLD_SIZE", 1)
    local, local_size = local_rank(), _environment("LOCAL_WORLD_SIZE", 1)
    device = _device(local, local_size)
    here = World(rank, size, local, local_size, device)
    if "RANK" not in os.environ:
        yield here
        return
    store = _join(here, timedelta(seconds=timeout + END))
    _watchdogs.append(Watchdog(store, rank=rank, size=size, timeout=timeout))
    try:
        yield here
    except UserError as error:
        if error.spoken_by(local):
            # Noted before this process ends, which is what the others will notice.
            with contextlib.suppress(RuntimeError):  # the store may have ended with another rank
                store.set(_ENDED, str(rank))
        raise
    except RuntimeError as error:
        if _said(store, _ENDED):
            raise PeerError from error
        _raise_lost(error)
        raise
    finally:
        _watchdogs.pop().close()
    # Not after an error: the other ranks may be waiting in a collective, and this would wait for them.
    dist.destroy_process_group()


def beat(where: str) -> None:
    """Tell the watchdog what this rank has just done; see there. Every rank does, alike."""
    for watchdog in _watchdogs:
        watchdog.beat(where)


def _arrive() -> bool:
    """Tell the watchdog that this rank waits for the others; returns whether there are any."""
    for watchdog in _watchdogs:
        watchdog.arrive()
    return dist.is_initialized()


def _join(here: World, timeout: timedelta) -> Any:
    """Make the process group; returns the store that it met in."""
    store, _, _ = next(rendezvous("env://"))
    on_gpu = here.device.type == "cuda"
    try:
        with (
            fresh(store, rank=here.rank, size=here.size, timeout=timeout) as meeting,
            contextlib.nullcontext() if on_gpu else _quiet(),
        ):
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=meeting,
                rank=here.rank,
                world_size=here.size,
                timeout=timeout,
                device_id=here.device if on_gpu else None,
            )
    except TimeoutError as error:
        raise LostError(str(error)) from error
    except RuntimeError as error:
        _raise_lost(error)
        raise
    return meeting


def _raise_lost(error: RuntimeError) -> None:
    """Raises LostError if an error is a broken or silent connection to another rank."""
    if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
        raise LostError(str(error).splitlines()[0]) from error


def _said(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except RuntimeError:  # the store ended with the rank that held it
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without gloo's own words on standard output, one line a rank."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def process_rank() -> int:
    """This process's rank, known before any process group is."""
    return _environment("RANK", 0)


def local_rank() -> int:
    """This process's rank on its host, known before any process group is."""
    return _environment("LOCAL_RANK", 0)


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _device(local_rank: int, local_size: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if not gpus:
        # Ranks on one CPU share its cores; torch would otherwise take all of them in each.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        return torch.device("cpu")
    if local_size > gpus:
        raise UserError(f"{local_size} processes on a host with {gpus} GPUs; use --nproc-per-node={gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in rank order.

    Every rank computes the same loss of the same rows, so the gradient of its own rows is at hand and needs
    no communication; it is scaled by the number of ranks because DDP then averages over them. The result is
    the gradient of one process with the whole batch.
    """

    @staticmethod
    def forward(context: Any, rows: torch.Tensor) -> torch.Tensor:
        gathered = rows.new_empty((dist.get_world_size() * len(rows), *rows.shape[1:]))
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        context.rows = len(rows)
        return gathered

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        start = dist.get_rank() * context.rows
        return gradients[0][start : start + context.rows] * dist.get_world_size()


def gather_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """(batch, …) of this rank -> (ranks × batch, …) of all; each rank must make the same loss of it."""
    if not _arrive():
        return rows
    gathered: torch.Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def gather(rows: torch.Tensor) -> torch.Tensor:
    """(batch, …) of this rank -> (ranks × batch, …) of all, without gradient."""
    with torch.no_grad():
        return gather_with_gradient(rows)


def broadcast(value: Any) -> Any:
    """Rank 0's value of a small picklable object, on every rank."""
    if not _arrive():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_on_node(value: Any, here: World) -> Any:
    """The value of a small picklable object on this host's first rank; torchrun numbers them in a row."""
    if not _arrive():
        return value
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values[here.rank - here.local_rank]


def check_equal(value: Any, what: str) -> None:
    """Raises UserError if a rank holds another value than rank 0: they would train on apart, or hang."""
    if not _arrive():
        return
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    apart = [rank for rank, other in enumerate(values) if other != values[0]]
    if apart:
        raise UserError(
            f"ranks {apart} have another {what} than rank 0; put run.folder and pack.output on storage that "
            "all hosts share, and give all the same configuration"
        )


def union(found: set[int]) -> set[int]:
    """What any rank has found, on every rank."""
    if not _arrive():
        return found
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return set().union(*every)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over all ranks, in place."""
    if _arrive():
        dist.all_reduce(values)
    return values


def max_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over all ranks, in place."""
    if _arrive():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if _arrive():
        dist.barrier()


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Give every rank rank 0's buffers (BatchNorm's running statistics), as DDP does before each step."""
    if _arrive():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
