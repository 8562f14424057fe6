"""How far a run is, which epoch was its best, and when it has waited long enough for a better one."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

LOWER_IS_BETTER = frozenset({"triplet_loss"})


@dataclass
class Progress:
    """How far a run is: with the weights and the optimiser, all that resuming needs."""

    step: int = 0
    """Steps done, over all epochs."""
    best: float | None = None
    """Best value of the monitored validation figure so far."""
    best_step: int = 0
    """The step it was seen at."""
    best_figures: dict[str, float] = field(default_factory=dict)
    """All validation figures of that step."""
    stale: int = 0
    """Epochs from it to the newest validation."""
    run_id: str | None = None
    """The W&B run."""
    history: list[float] = field(default_factory=list)
    """The monitored figure of every validation."""

    def note(self, figures: dict[str, float], monitor: str, steps: int) -> bool:
        """Take in a validation; returns whether it is the best so far.

        Args:
            steps: of an epoch.
        """
        value = figures[monitor]
        self.history.append(value)
        is_best = self.beats(value, monitor)
        if is_best:
            self.best, self.best_step, self.best_figures = value, self.step, figures
        self.stale = (self.step - self.best_step) // steps
        return is_best

    def beats(self, value: float, monitor: str) -> bool:
        """Whether a value of the monitored figure is better than the best; any is better than NaN."""
        if self.best is None or math.isnan(self.best):
            return True
        return value < self.best if monitor in LOWER_IS_BETTER else value > self.best

    def said(self, monitor: str, steps: int) -> str:
        """The newest validation in a line."""
        best = "best" if self.best_step == self.step else f"best {self.best:.3f}"
        name = monitor.replace("_", " ").replace("roc auc", "AUC")
        return f"epoch {self.step // steps}: validation {name} {self.history[-1]:.3f} ({best})"

    @classmethod
    def of(cls, recorded: dict[str, Any]) -> "Progress":
        """What a checkpoint recorded, those included that knew one figure, the ROC-AUC."""
        known = {f.name: recorded[f.name] for f in fields(cls) if f.name in recorded}
        if "best_auc" in recorded:
            known["best_figures"] = {"roc_auc": recorded["best_auc"]}
            known["best"] = recorded["best_auc"] if recorded["history"] else None
        return cls(**known)
