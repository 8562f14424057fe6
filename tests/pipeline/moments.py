"""What may come at any moment, Ctrl-C before all, made to come at each, one by one."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = str(Path(__file__).parents[2] / "pipeline")


def interrupted(call: Callable[[], object], moment: int) -> bool:
    """Call it, and raise a KeyboardInterrupt at its n-th moment; False if it ended before.

    Raises:
        AssertionError: if the exception did not come out.
    """

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        came = at_moment(call, moment, interrupt)
    except KeyboardInterrupt:
        return True
    assert not came, "swallowed"
    return False


def at_moment(
    call: Callable[[], object], moment: int, happens: Callable[[], object], *, steps: bool = True
) -> bool:
    """Call it, and let something happen at its n-th moment, as a signal's handler would; whether it did.

    Moments are the beginnings of all Python functions that it comes to, of others too, where Python looks for
    signals, and every step of our own, more than it does. Other threads go on undisturbed.

    Args:
        steps: False for the beginnings alone.
    """
    left, came = moment, False

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left, came
        frame.f_trace_opcodes = ours = steps and frame.f_code.co_filename.startswith(ROOT)
        if event in ("call", "opcode"):
            left -= 1
            if left < 0:
                sys.settrace(None)
                came = True
                happens()
                return None
        return trace if ours else None

    before = sys.gettrace()
    gc.disable()  # what is raised in the destructors of others' garbage Python drops
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return came
