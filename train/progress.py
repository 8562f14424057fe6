"""How far a run is, which epoch is its best, and when it has waited long enough for a better one."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from train.influence import Floats, standard_error

LOWER_IS_BETTER = frozenset({"triplet_loss"})


@dataclass
class Progress:
    """How far a run is: with the weights and the optimiser, all that resuming needs."""

    step: int = 0
    """Steps done, over all epochs."""
    top: float | None = None
    """Highest monitored figure of a validation so far, or the lowest of a loss."""
    top_step: int = 0
    """The step it was seen at."""
    top_parts: list[float] = field(default_factory=list)
    """What each group of the validation split contributes to it."""
    best_step: int = 0
    """The step whose encoder is taken for the best: the newest that is not below the top for certain."""
    best_figures: dict[str, float] = field(default_factory=dict)
    """All validation figures of that step."""
    stale: int = 0
    """Epochs from the top to the newest validation."""
    run_id: str | None = None
    """The W&B run."""
    history: list[float] = field(default_factory=list)
    """The monitored figure of every validation."""

    def note(
        self, figures: dict[str, float], parts: Floats, *, monitor: str, tolerance: float, steps: int
    ) -> bool:
        """Take in a validation; returns whether its encoder is now the best.

        One that is behind the top by no more than chance is taken for as good; of those the newest is the
        best, as it has learnt the longest: the highest of many figures is often so by luck. Within one
        standard error is Breiman's rule (Classification and Regression Trees, 1984, section 3.4.3), here of
        the difference.

        Args:
            parts: what each group contributes to the monitored figure (groups,); see `train.influence`.
            tolerance: standard errors of the difference that are put down to chance.
            steps: of an epoch.
        """
        value = figures[monitor]
        self.history.append(value)
        is_best = True
        if self._is_top(value, monitor):
            self.top, self.top_step, self.top_parts = value, self.step, parts.tolist()
        else:
            assert self.top is not None
            error = standard_error(parts - np.asarray(self.top_parts)) if self.top_parts else 0.0
            is_best = abs(self.top - value) <= tolerance * error
        if is_best:
            self.best_step, self.best_figures = self.step, figures
        self.stale = (self.step - self.top_step) // steps
        return is_best

    def _is_top(self, value: float, monitor: str) -> bool:
        """Any value is better than NaN."""
        if self.top is None or math.isnan(self.top):
            return True
        return value < self.top if monitor in LOWER_IS_BETTER else value > self.top

    def said(self, monitor: str, steps: int) -> str:
        """The newest validation in a line."""
        name = monitor.replace("_", " ").replace("roc auc", "AUC")
        highest = "lowest" if monitor in LOWER_IS_BETTER else "highest"
        if self.top_step == self.step:
            which = "best"
        elif self.best_step == self.step:
            which = f"taken for best: behind {self.top:.3f} by no more than chance"
        else:
            which = f"{highest} {self.top:.3f}"
        return f"epoch {self.step // steps}: validation {name} {self.history[-1]:.3f} ({which})"

    @classmethod
    def of(cls, recorded: dict[str, Any]) -> "Progress":
        """What a checkpoint recorded, those included that took the highest figure for the best, and those
        that knew one figure, the ROC-AUC."""
        known = {f.name: recorded[f.name] for f in fields(cls) if f.name in recorded}
        if "best_auc" in recorded:
            known["best_figures"] = {"roc_auc": recorded["best_auc"]}
            recorded = {**recorded, "best": recorded["best_auc"] if recorded["history"] else None}
        if "top" not in recorded:
            known |= {"top": recorded["best"], "top_step": recorded["best_step"]}
        return cls(**known)
