"""The mean of a run's figures between two lines of its log."""

import math

import torch

from train.meter import Meter

GOOD, BAD = torch.tensor(True), torch.tensor(False)


def figures(loss: float, distance: float) -> dict[str, torch.Tensor]:
    """Two figures of a step."""
    return {"loss": torch.tensor(loss), "distance": torch.tensor(distance)}


def means(meter: Meter) -> dict[str, float]:
    """What it has read, but for the clock's."""
    return {k: v for k, v in meter.read().items() if k not in ("images_per_second", "data_wait")}


def test_a_mean_is_of_the_steps_that_have_the_figure() -> None:
    meter = Meter()
    for loss, distance, good in [(1, 0.5, GOOD), (2, math.nan, GOOD), (math.nan, 9, BAD), (6, 1.5, GOOD)]:
        meter.add(8, figures(loss, distance), good)
    assert means(meter) == {"loss": 3, "distance": 1}
    assert means(meter) == {}
    meter.add(8, figures(1, math.nan), GOOD)
    assert means(meter) == {"loss": 1}


def test_a_mean_goes_on_after_a_checkpoint() -> None:
    meter, resumed = Meter(), Meter()
    meter.add(8, figures(1, math.nan), GOOD)
    resumed.load(meter.state(), torch.device("cpu"))
    resumed.add(8, figures(2, 4), GOOD)
    assert means(resumed) == {"loss": 1.5, "distance": 4}
