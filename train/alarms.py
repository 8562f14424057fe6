"""What in a run's figures somebody must look at: values that are not finite, embeddings that collapse."""

import math
from collections.abc import Mapping

COLLAPSED = 0.05
"""Spread of the embeddings (`train.learner.spread`, 0..1) below which they point one way."""


class Alarms:
    """Looks at every logged line, and tells each kind of trouble once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def of(self, step: int, values: Mapping[str, float]) -> list[tuple[str, str]]:
        """(title, text) of what is new at a step."""
        found = {}
        broken = sorted(name for name, value in values.items() if not math.isfinite(value))
        skipped = int(values.get("skipped_steps", 0))
        if broken or skipped:
            what = ", ".join(broken) or f"{skipped} steps, which were skipped"
            remedy = "lower train.lr, or set train.precision=float32"
            found["not finite"] = f"step {step}: not finite: {what}; {remedy}"
        # Before the first epoch's end a random network's embeddings may lie close together by nature.
        low = {name: v for name in ("spread", "val_spread") if (v := values.get(name, 1.0)) < COLLAPSED}
        if low and values.get("epoch", 0.0) >= 1:
            told = ", ".join(f"{name} {value:.3f}" for name, value in low.items())
            found["collapse"] = (
                f"step {step}: {told}: all embeddings point one way; try loss.mining=semi_hard, a lower "
                "train.lr, or a larger loss.classification"
            )
        new = [(title, text) for title, text in found.items() if title not in self._told]
        self._told |= found.keys()
        return new
