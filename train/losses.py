"""Triplet losses on the whole global batch: B×B distances, no dynamic shapes, no host synchronisation.

Shapes: B global batch, D embedding, C classes. Anchors are rows, candidates columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

FAR = 1e4  # a distance no pair of unit vectors has


@dataclass(frozen=True)
class Mined:
    """A triplet loss and what is worth watching about it, all scalars on the device."""

    loss: torch.Tensor
    active: torch.Tensor
    """Share of triplets with a positive loss."""
    positive: torch.Tensor
    """Mean anchor-positive distance of the triplets."""
    negative: torch.Tensor
    """Mean anchor-negative distance of the triplets."""


def distances(embeddings_bd: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (B, B) of unit vectors, in float32; finite gradients where two are equal."""
    embeddings_bd = embeddings_bd.float()
    squared = 2 - 2 * (embeddings_bd @ embeddings_bd.T)
    return squared.clamp(min=1e-7).sqrt()


def triplet(
    embeddings_bd: torch.Tensor,
    labels_b: torch.Tensor,
    *,
    mining: str,
    margin: float,
    uniform_b2: torch.Tensor,
) -> Mined:
    """max(0, d(anchor, positive) − d(anchor, negative) + margin), averaged over the mined triplets.

    Args:
        embeddings_bd: unit vectors (B, D).
        labels_b: class indices (B,).
        mining: `random`, `semi_hard` or `batch_hard`.
        uniform_b2: (B, 2) in [0, 1), which positive and which negative `random` takes.

    Without a positive or a negative in the batch an anchor has no triplet; without any triplet the loss is 0.
    """
    d_bb = distances(embeddings_bd)
    same = labels_b[:, None] == labels_b[None, :]
    positives = same & ~torch.eye(len(labels_b), dtype=torch.bool, device=same.device)
    miners: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {
        "random": lambda: _random(d_bb, positives, ~same, uniform_b2),
        "semi_hard": lambda: _semi_hard(d_bb, positives, ~same),
        "batch_hard": lambda: _batch_hard(d_bb, positives, ~same),
    }
    d_positive, d_negative, valid = miners[mining]()
    loss = F.relu(d_positive - d_negative + margin)
    return Mined(
        loss=_mean(loss, valid),
        active=_mean((loss > 0).float(), valid),
        positive=_mean(d_positive, valid).detach(),
        negative=_mean(d_negative, valid).detach(),
    )


def _random(
    d_bb: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, uniform_b2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One triplet an anchor, drawn uniformly: (B,) each."""

    def pick(mask: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        nth = (uniform * mask.sum(1)).floor()
        column = (mask.cumsum(1) > nth[:, None]).int().argmax(1)
        return d_bb.gather(1, column[:, None]).squeeze(1)

    valid = positives.any(1) & negatives.any(1)
    return pick(positives, uniform_b2[:, 0]), pick(negatives, uniform_b2[:, 1]), valid


def _semi_hard(
    d_bb: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every anchor-positive pair with the nearest negative beyond the positive, else the farthest.

    Schroff 2015 (FaceNet), arXiv 1503.03832, section 3.2. (B, B) each.
    """
    sorted_bb = d_bb.masked_fill(~negatives, FAR).sort(1).values
    count = negatives.sum(1, keepdim=True)
    beyond = torch.searchsorted(sorted_bb.detach(), d_bb.detach().contiguous(), right=True)
    column = torch.minimum(beyond, count - 1).clamp(min=0)
    return d_bb, sorted_bb.gather(1, column), positives & (count > 0)


def _batch_hard(
    d_bb: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each anchor with its farthest positive and nearest negative: (B,) each.

    Hermans 2017, arXiv 1703.07737, equation 5.
    """
    farthest = d_bb.masked_fill(~positives, -FAR).amax(1)
    nearest = d_bb.masked_fill(~negatives, FAR).amin(1)
    return farthest, nearest, positives.any(1) & negatives.any(1)


def _mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return values.where(valid, 0).sum() / valid.sum().clamp(min=1)
