"""The optimiser's groups of parameters: which learn, how fast, and which decay."""

from typing import Any

from torch import nn

from train.learner import Learner


def parameter_groups(
    learner: Learner, *, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """An optimiser's groups: matrices and kernels decay, biases, norms, positions and scales do not.

    With layer-wise decay of the learning rate (Clark 2020, ELECTRA, arXiv 2003.10555) stage i of n from the
    input, i = 1 … n, learns at layer_decay ** (n + 1 − i) of `lr`; projection and heads at all of it. What is
    frozen is in no group.

    Returns:
        `params`, `weight_decay`, `lr` and `lr_scale`, by which a schedule must multiply the rate that it
        sets.
    """
    stages = learner.encoder.stages
    scale = {
        f"encoder.backbone.{part}.": layer_decay ** (len(stages) - i)
        for i, stage in enumerate(stages)
        for part in stage
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            own = next((s for part, s in scale.items() if f"{name}.".startswith(part)), 1.0)
            decays = parameter.ndim > 1 and name.endswith("weight")
            groups.setdefault((own, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "lr": lr * own,
            "lr_scale": own,
        }
        for (own, decays), parameters in sorted(
            groups.items(), key=lambda item: (-item[0][0], not item[0][1])
        )
    ]
