"""An exponential moving average of the weights: a smoother encoder than any one step's (Polyak 1992)."""

import copy
from typing import Any

import torch

from train.model import Encoder


class Average:
    """An encoder whose weights and running statistics trail another's.

    The decay begins low, min(decay, (1 + step) / (10 + step)), so that the first, random weights are soon
    forgotten (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, encoder: Encoder, decay: float) -> None:
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self._decay = decay
        ours, theirs = self.encoder.state_dict(), encoder.state_dict()
        averaged = [name for name in ours if ours[name].is_floating_point()]
        self._ours, self._theirs = [ours[n] for n in averaged], [theirs[n] for n in averaged]
        self._counters = [(ours[n], theirs[n]) for n in ours.keys() - set(averaged)]

    @torch.no_grad()
    def update(self, step: int, good: torch.Tensor) -> None:
        """Move towards the other's weights after a step.

        Args:
            step: steps done before it.
            good: boolean scalar on the device; false leaves the average as it is.
        """
        share = (1 - min(self._decay, (1 + step) / (10 + step))) * good
        towards = torch._foreach_sub(self._theirs, self._ours)
        torch._foreach_mul_(towards, share)
        torch._foreach_add_(self._ours, towards)
        for mine, other in self._counters:
            mine.copy_(other)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self.encoder.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.encoder.load_state_dict(state)
