"""Which triplets an anchor learns from: dense choices on the B×B distances, of shapes known beforehand.

Shapes: B global batch. Anchors are rows, candidates columns. An anchor without a positive or a negative in
the batch has no triplet.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from configs.training import Loss as Settings
from train.distances import FAR, Pairs


class Triplets(NamedTuple):
    """Distances of the mined triplets, (B,) one an anchor, or (B, B) one a positive."""

    positive: torch.Tensor
    """Of anchor and positive."""
    negative: torch.Tensor
    """Of anchor and negative."""
    valid: torch.Tensor
    """Whether there is such a triplet."""


def mining_at(settings: Settings, done: float) -> str:
    """The mining of the loss's schedule once this share of training is done, 0..1."""
    begun = [(share, mining) for mining, share in settings.schedule.items() if share <= done]
    return max(begun)[1] if begun else settings.mining


def mine(mining: str, d_bb: torch.Tensor, pairs: Pairs, uniform_b2: torch.Tensor) -> Triplets:
    """Triplets of one of `MININGS`.

    Args:
        uniform_b2: (B, 2) in [0, 1), which positive and which negative `random` takes.
    """
    return MININGS[mining](d_bb, pairs, uniform_b2)


def _random(d_bb: torch.Tensor, pairs: Pairs, uniform_b2: torch.Tensor) -> Triplets:
    """One triplet an anchor, drawn uniformly: (B,)."""

    def pick(mask: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        nth = (uniform * mask.sum(1)).floor()
        column = (mask.cumsum(1) > nth[:, None]).int().argmax(1)
        return d_bb.gather(1, column[:, None]).squeeze(1)

    return Triplets(
        pick(pairs.positive, uniform_b2[:, 0]), pick(pairs.negative, uniform_b2[:, 1]), _anchors(pairs)
    )


def _semi_hard(d_bb: torch.Tensor, pairs: Pairs, _: torch.Tensor) -> Triplets:
    """Every anchor-positive pair with the nearest negative beyond the positive, else the farthest: (B, B).

    Schroff 2015 (FaceNet), arXiv 1503.03832, section 3.2.
    """
    sorted_bb = d_bb.masked_fill(~pairs.negative, FAR).sort(1).values
    count = pairs.negative.sum(1, keepdim=True)
    beyond = torch.searchsorted(sorted_bb.detach(), d_bb.detach().contiguous(), right=True)
    column = torch.minimum(beyond, count - 1).clamp(min=0)
    return Triplets(d_bb, sorted_bb.gather(1, column), pairs.positive & (count > 0))


def _batch_hard(d_bb: torch.Tensor, pairs: Pairs, _: torch.Tensor) -> Triplets:
    """Each anchor with its farthest positive and nearest negative: (B,).

    Hermans 2017, arXiv 1703.07737, equation 5.
    """
    return Triplets(_farthest(d_bb, pairs.positive), _nearest(d_bb, pairs.negative), _anchors(pairs))


def _easy_positive(d_bb: torch.Tensor, pairs: Pairs, _: torch.Tensor) -> Triplets:
    """Each anchor with its nearest positive and nearest negative: (B,).

    Xuan 2020, arXiv 1904.04370: a class of many kinds, such as all that is not melanoma, need not lie in one
    place.
    """
    return Triplets(_nearest(d_bb, pairs.positive), _nearest(d_bb, pairs.negative), _anchors(pairs))


def _patient_hard(d_bb: torch.Tensor, pairs: Pairs, _: torch.Tensor) -> Triplets:
    """As batch-hard, but with the nearest negative of the anchor's own patient, where there is one: (B,).

    It is the comparison with a patient's other lesions by which dermatologists find the ugly duckling
    (Grob 1998): what a patient's images share, such as skin tone and camera, cannot tell the two apart.
    """
    own = pairs.negative & pairs.same_patient
    nearest = torch.where(own.any(1), _nearest(d_bb, own), _nearest(d_bb, pairs.negative))
    return Triplets(_farthest(d_bb, pairs.positive), nearest, _anchors(pairs))


def _farthest(d_bb: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return d_bb.masked_fill(~mask, -FAR).amax(1)


def _nearest(d_bb: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return d_bb.masked_fill(~mask, FAR).amin(1)


def _anchors(pairs: Pairs) -> torch.Tensor:
    return pairs.positive.any(1) & pairs.negative.any(1)


MININGS: dict[str, Callable[[torch.Tensor, Pairs, torch.Tensor], Triplets]] = {
    "random": _random,
    "semi_hard": _semi_hard,
    "batch_hard": _batch_hard,
    "easy_positive": _easy_positive,
    "patient_hard": _patient_hard,
}
"""`all` is no choice: `train.losses` sums over it without listing it."""
