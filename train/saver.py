"""Checkpoints written while training goes on: the state is copied at once, and a thread does the rest."""

from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from train import checkpoint
from train.progress import Progress


class Saver:
    """Writes a run's checkpoints in a thread of its own, one at a time.

    What it holds meanwhile is one copy of the state in the host's memory.
    """

    def __init__(self, folder: Path, fingerprint: str, *, keep: int) -> None:
        self._save = partial(checkpoint.save, folder, fingerprint, keep=keep)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._copy: Any = None  # reused: fresh memory costs the host more than the copying

    def save(self, progress: Progress, state: dict[str, Any], good: torch.Tensor) -> None:
        """Begin to write a state; waits only where the one before is still being written.

        Args:
            state: nested dicts and lists of tensors; training may change them as soon as this returns.
            good: boolean scalar on the device, whether to write it at all: not in the midst of an epoch
                after a step that was not finite, or a run that diverges would push out what was before.
        """
        self.settle()
        self._copy = copied = _copied({"state": state, "good": good}, self._copy)
        event = None
        if torch.cuda.is_available():  # the device makes the copies when it comes to them
            event = torch.cuda.current_stream().record_event()  # type: ignore[no-untyped-call]
        self._writing = self._thread.submit(self._write, deepcopy(progress), copied, event)

    def settle(self, *, must: bool = False) -> None:
        """Wait for what is being written. If there was no room for it, a warning says so.

        Raises:
            UserError: instead of the warning, if it `must` have been written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except UserError as error:
            if must:
                raise
            print(f"warning: {error}; training goes on, older checkpoints stay", flush=True)

    def look(self) -> None:
        """Tell of a failure as soon as it is known; waits for nothing."""
        if self._writing is not None and self._writing.done():
            self.settle()

    def close(self) -> None:
        """Wait for what is being written, and end the thread."""
        self.settle()
        self._thread.shutdown()

    def _write(self, progress: Progress, copied: dict[str, Any], event: torch.cuda.Event | None) -> None:
        if event:
            event.synchronize()
        if copied["good"]:
            self._save(progress, copied["state"])


def _copied(value: Any, last: Any) -> Any:
    """The same nesting with tensors copied to the host; those on a GPU are on their way when this returns.

    Args:
        last: what the call before returned, whose memory is taken where it fits.
    """
    if isinstance(value, dict):
        last = last if isinstance(last, dict) else {}
        return {key: _copied(item, last.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        last = last if isinstance(last, list | tuple) and len(last) == len(value) else [None] * len(value)
        return type(value)(_copied(item, old) for item, old in zip(value, last, strict=True))
    if not isinstance(value, torch.Tensor):
        return value
    if not (isinstance(last, torch.Tensor) and last.shape == value.shape and last.dtype == value.dtype):
        last = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")
    return last.copy_(value.detach(), non_blocking=True)
