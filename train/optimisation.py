"""From a loss to new weights. Nothing here waits for the device."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from configs.training import Train as Settings

Groups = Sequence[dict[str, Any]]


class Optimisation:
    """An optimiser, the scaler that float16 needs, and how both are asked to skip a step.

    optimisation.backward(loss)
    norm = optimisation.clip()              gradients are unscaled now
    optimisation.step(rate, good)           `good` False leaves weights and moments as they are
    """

    def __init__(
        self, groups: Groups, settings: Settings, *, device: torch.device, precision: torch.dtype
    ) -> None:
        """
        Args:
            groups: parameter groups; a group's `lr_scale` multiplies the learning rate.
        """
        self._settings = settings
        self._fused = device.type == "cuda"
        self._optimizer = _optimizer(groups, settings, fused=self._fused)
        # Scales the loss so that float16's small gradients do not become zero (Micikevicius 2018).
        self._scaler = GradScaler(device.type, enabled=precision == torch.float16)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a loss, in place of the last step's."""
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def clip(self) -> torch.Tensor:
        """Unscale the gradients and limit their norm; returns what it was, finite if all of them are."""
        self._scaler.unscale_(self._optimizer)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, self._settings.grad_clip or math.inf)

    def step(self, rate: float, good: torch.Tensor) -> None:
        """Change the weights where `good`, a boolean scalar on the device, is true."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1)
        if self._fused:
            # How GradScaler tells a fused kernel to do nothing: read on the device, not by the host.
            self._optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
            self._optimizer.step()
        elif good:  # on a CPU there is nothing to wait for
            self._optimizer.step()
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "optimizer_kind": self._settings.optimizer,
            "scaler": self._scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint; rates, decay and the like stay those of the configuration.

        Another optimiser's moments mean nothing to this one, which then begins without.

        Raises:
            ValueError: if it is of other parameters.
        """
        moments = state["optimizer"]
        mine = self._optimizer.state_dict()["param_groups"]
        if [len(group["params"]) for group in mine] != [len(g["params"]) for g in moments["param_groups"]]:
            raise ValueError("the optimiser's groups have other parameters")
        if state.get("optimizer_kind", "adamw") == self._settings.optimizer:
            self._optimizer.load_state_dict({"state": moments["state"], "param_groups": mine})
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])


def _optimizer(groups: Groups, settings: Settings, *, fused: bool) -> torch.optim.Optimizer:
    # `None` lets torch choose, which on a CPU is its plain loop.
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=fused or None)
    sgd = torch.optim.SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        fused=fused or None,
    )
    if settings.momentum:
        # A fused kernel that is told to skip the very first step would leave them uninitialised.
        for parameter in (p for group in sgd.param_groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd
