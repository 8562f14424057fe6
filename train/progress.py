"""How far a run is, which epoch is its best, and when it has waited long enough for a better one."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from configs.training import Train
from train.influence import Floats, standard_error

LOWER_IS_BETTER = frozenset({"triplet_loss"})


@dataclass
class Progress:
    """How far a run is: with the weights and the optimiser, all that resuming needs."""

    step: int = 0
    """Steps done, over all epochs."""
    top: float | None = None
    """Best monitored figure of a validation so far: the highest, or the lowest of a loss."""
    top_step: int = 0
    """The step it was seen at."""
    top_parts: list[float] = field(default_factory=list)
    """What each group of the validation split contributes to it."""
    top_of: str = ""
    """Which figure it is, of which shard set."""
    behind: float = 0.0
    """How far the newest validation is behind it, in standard errors of the difference."""
    best_step: int = 0
    """The step whose encoder is taken: the newest within so many standard errors of the top."""
    best_figures: dict[str, float] = field(default_factory=dict)
    """All validation figures of that step."""
    stale: int = 0
    """Epochs from the top to the newest validation."""
    run_id: str | None = None
    """The W&B run."""
    history: list[float] = field(default_factory=list)
    """The monitored figure of every validation."""

    def note(
        self,
        figures: dict[str, float],
        parts: Floats,
        *,
        of: str,
        settings: Train,
        steps: int,
    ) -> bool:
        """Take in a validation; returns whether its encoder is now the one to take.

        The highest of many figures is often so by luck. So an epoch that is behind it by less than
        `tolerance` standard errors of their difference, on the same samples, is taken for as good, and of
        these the newest, which has learnt the longest. One standard error is the yardstick of Breiman
        (Classification and Regression Trees, 1984, section 3.4.3), who takes the simplest model within it.

        Args:
            parts: what each group contributes to the monitored figure (groups,); see `train.influence`.
            of: what tells figures of other samples apart, which are not compared.
            steps: of an epoch.
        """
        value = figures[settings.monitor]
        self.history.append(value)
        if self.top_of not in ("", of) or self._is_top(value, settings.monitor):
            self.top, self.top_step, self.top_parts, self.top_of = value, self.step, parts.tolist(), of
            self.behind = 0.0
        else:
            assert self.top is not None
            error = standard_error(parts - np.asarray(self.top_parts)) if self.top_parts else 0.0
            self.behind = abs(self.top - value) / error if error else math.inf
        taken = self.top_step == self.step or self.behind < settings.tolerance
        if taken:
            self.best_step, self.best_figures = self.step, figures
        self.stale = (self.step - self.top_step) // steps
        return taken

    def _is_top(self, value: float, monitor: str) -> bool:
        """Any value is better than NaN."""
        if self.top is None or math.isnan(self.top):
            return True
        return value < self.top if monitor in LOWER_IS_BETTER else value > self.top

    def said(self, monitor: str, steps: int) -> str:
        """The newest validation in a line."""
        name = monitor.replace("_", " ").replace("roc auc", "AUC")
        which = "best"
        if self.top_step != self.step:
            behind = f"{self.behind:.1f} standard errors behind " if math.isfinite(self.behind) else ""
            which = f"{'taken, ' if self.best_step == self.step else ''}{behind}the best, {self.top:.3f}"
        return f"epoch {self.step // steps}: validation {name} {self.history[-1]:.3f} ({which})"

    @classmethod
    def of(cls, recorded: dict[str, Any]) -> "Progress":
        """What a checkpoint recorded, those included that took the best figure's encoder, and those that knew
        one figure, the ROC-AUC."""
        known = {f.name: recorded[f.name] for f in fields(cls) if f.name in recorded}
        if "best_auc" in recorded:
            known["best_figures"] = {"roc_auc": recorded["best_auc"]}
        if "top" not in recorded and recorded.get("history"):
            best = recorded["best_auc"] if "best_auc" in recorded else recorded["best"]
            known |= {"top": best, "top_step": recorded["best_step"]}
        return cls(**known)
