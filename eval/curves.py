"""Curves of a split for the report: does a probability mean what it says, and is acting on it worth it?"""

from typing import Any

import numpy as np

from eval.figures import estimate
from eval.metrics import Bools, Bootstrap, Floats, Ints, quantile_bins, ratio, reliability, sums

ACTED_ON = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Probabilities at which one would act, of the decision curve."""


def reliability_rows(
    scores: Floats, positives: Bools, groups: Ints, bootstrap: Bootstrap
) -> list[dict[str, Any]]:
    """Tenths of the images by score: mean score, share of positives with its interval, images."""
    mean, share, low, high = reliability(scores, positives, groups, bootstrap)
    sizes = np.bincount(quantile_bins(scores, 10))
    return [
        {
            "mean": float(m),
            "share": {"value": float(v), "low": _number(a), "high": _number(b)},
            "images": int(n),
        }
        for m, v, a, b, n in zip(mean, share, low, high, sizes, strict=True)
    ]


def decision_curve(
    scores: Floats,
    positives: Bools,
    groups: Ints,
    bootstrap: Bootstrap,
    group: str,
    prevalence: float | None = None,
) -> list[dict[str, Any]]:
    """Net benefit of acting where the probability reaches p, for several p (Vickers & Elkin 2006).

    It is the share of images rightly acted on, less the share wrongly acted on × p / (1 - p): whoever acts
    at p holds one found to be worth (1 - p) / p false alarms. Acting on none has 0; `all` is acting on every
    image.

    Args:
        prevalence: at which benefit is told, of probabilities brought to it from that of the data; None: that
            of the data.
    """
    if prevalence is not None:
        scores = _brought(scores, float(positives.mean()), prevalence)
    part = _Benefit(scores, positives, groups, prevalence)
    found = estimate([part], groups, bootstrap, group)
    return [
        {"probability": p, "model": found.get(f"model {p}"), "all": found.get(f"all {p}")} for p in ACTED_ON
    ]


def _brought(scores: Floats, share: float, prevalence: float) -> Floats:
    """Probabilities (n,) calibrated where a share is positive, as they would be at a prevalence (Elkan 2001).

    Left alone they would be too high for a clinic where fewer are positive, and so its benefit too low. Where
    all or none are positive, nothing tells what to bring them from.
    """
    if not 0 < share < 1:
        return scores
    of, others = scores * prevalence / share, (1 - scores) * (1 - prevalence) / (1 - share)
    return of / (of + others)


class _Benefit:
    """Net benefit at each of ACTED_ON, of the model and of acting on all."""

    def __init__(self, scores: Floats, positives: Bools, groups: Ints, prevalence: float | None) -> None:
        count, reached = int(groups.max()) + 1, np.searchsorted(ACTED_ON, scores, side="right")
        cells = sums(groups, 2 * reached + positives, 2 * (len(ACTED_ON) + 1), rows=count)
        # (G, p, kind) images that reach each p: all below are summed from the top down.
        self._acted = cells.reshape(count, -1, 2)[:, ::-1].cumsum(axis=1)[:, ::-1].reshape(count, -1)
        self._prevalence = prevalence

    def under(self, multiplicity: Floats) -> dict[str, Floats]:
        """name -> (b,)."""
        acted = (multiplicity @ self._acted).reshape(len(multiplicity), -1, 2)
        total = acted[:, 0].sum(axis=1)
        kinds = acted[:, :1] if self._prevalence is not None else total[:, None, None]
        shares = ratio(acted, kinds)
        if self._prevalence is not None:
            shares = shares * np.array([1 - self._prevalence, self._prevalence])
        odds = [p / (1 - p) for p in ACTED_ON]
        values = {}
        for i, (p, worth) in enumerate(zip(ACTED_ON, odds, strict=True)):
            values[f"model {p}"] = shares[:, i + 1, 1] - worth * shares[:, i + 1, 0]
            values[f"all {p}"] = shares[:, 0, 1] - worth * shares[:, 0, 0]
        return values

    def needs(self) -> dict[str, list[tuple[int, str]]]:
        """name -> what it needs."""
        kinds = (self._acted[:, :2] > 0).sum(axis=0).tolist()
        needed = [] if self._prevalence is None else [(kind, " with images of each kind") for kind in kinds]
        return {f"{what} {p}": needed for p in ACTED_ON for what in ("model", "all")}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
