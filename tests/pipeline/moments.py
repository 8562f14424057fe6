"""Ctrl-C at every moment, one by one."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = str(Path(__file__).parents[2] / "pipeline")


def interrupted(call: Callable[[], object], moment: int) -> bool:
    """Call it, and raise a KeyboardInterrupt at its n-th moment; False if it ended before.

    Moments are the beginnings of all Python functions that it comes to, of others too, where Python looks for
    signals, and every step of our own. What it starts in other threads goes on undisturbed.

    Raises:
        AssertionError: if the exception did not come out.
    """
    left, came = moment, False

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left, came
        frame.f_trace_opcodes = ours = frame.f_code.co_filename.startswith(ROOT)
        if event in ("call", "opcode"):
            left -= 1
            if left < 0:
                sys.settrace(None)
                came = True
                raise KeyboardInterrupt
        return trace if ours else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    assert not came, "swallowed"
    return False
