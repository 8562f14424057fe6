"""The learning rate as a function of the steps done, so that a resumed run needs nothing to go on with it."""

import math

from configs.training import Train as Settings


def learning_rate(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up to `train.lr`, then `train.schedule`: a cosine (Loshchilov 2017), steps, or as it is."""
    warm = settings.warmup * steps_per_epoch
    if step < warm:
        return settings.lr * (step + 1) / math.ceil(warm)
    if settings.schedule == "constant":
        return settings.lr
    if settings.schedule == "step":
        return float(settings.lr * settings.step_factor ** (step // (settings.step_epochs * steps_per_epoch)))
    share = (step - warm) / max(1, settings.epochs * steps_per_epoch - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
