"""Told to stop: SIGTERM and SIGUSR1 end a run at a step boundary, the same one on all ranks."""

import signal
import threading
from collections import deque
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from train.distributed import World, max_over_ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAG = 8
"""Steps after which a GPU's ranks read the agreement: it has been reached long before, so no host waits."""


class StoppedError(Exception):
    """The run was told to stop and has been saved."""


class Stop:
    """Takes the two signals in a `with` block, and lets all ranks agree when to act on them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._told = False
        self._lag = LAG if world.device.type == "cuda" else 0
        self._flags: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._before: dict[signal.Signals, Any] = {}

    def agreed(self, *, now: bool = False) -> bool:
        """Whether any rank was told to stop: every rank asks after every step, and all get the same answer.

        Args:
            now: wait for the ranks' newest word; on a GPU the answer is otherwise that of `LAG` steps ago.
        """
        if self._world.size == 1:
            return self._told
        self._flags.append(self._ask())
        answer = False
        while len(self._flags) > (0 if now else self._lag):
            flag, event = self._flags.popleft()
            if event:
                event.synchronize()
            answer |= bool(flag)
        return answer

    def _ask(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        flag = max_over_ranks(torch.full((), int(self._told), device=self._world.device))
        if flag.device.type == "cpu":
            return flag, None
        here = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
        return here, torch.cuda.current_stream().record_event()  # type: ignore[no-untyped-call]

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python takes signals nowhere else
            self._before = {number: signal.signal(number, self._tell) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
