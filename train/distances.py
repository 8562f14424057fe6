"""Who is near whom in a batch: B×B matrices of distances, and of which pairs are what.

Shapes: B global batch, D embedding. Anchors are rows, candidates columns. Distances are in float32 whatever
the embeddings' type; a matrix product must not round them to TensorFloat-32 (see `train.precision`).
"""

from typing import NamedTuple

import torch

FAR = 1e4  # a distance, or a logit, beyond all that unit vectors have


class Pairs(NamedTuple):
    """(B, B) masks; no sample pairs with itself."""

    positive: torch.Tensor
    """Of one class."""
    negative: torch.Tensor
    """Of two."""
    same_patient: torch.Tensor
    """Of one patient (or lesion): the shard set's group."""

    @classmethod
    def of(cls, labels_b: torch.Tensor, groups_b: torch.Tensor) -> "Pairs":
        """From class indices and group codes, (B,) each."""
        same = labels_b[:, None] == labels_b[None, :]
        return cls(same & ~diagonal(same), ~same, groups_b[:, None] == groups_b[None, :])


def diagonal(of_bb: torch.Tensor) -> torch.Tensor:
    """(B, B) mask of each sample with itself."""
    return torch.eye(len(of_bb), dtype=torch.bool, device=of_bb.device)


def distances(embeddings_bd: torch.Tensor, kind: str = "euclidean") -> torch.Tensor:
    """Distances (B, B) of unit vectors, from 0 to 2: `euclidean`, or `cosine`, which is 1 − cos.

    The gradient of a Euclidean one is finite where two vectors are equal: there it is zero.
    """
    cosine_bb = cosines(embeddings_bd)
    if kind == "cosine":
        return 1 - cosine_bb
    return (2 - 2 * cosine_bb).clamp(min=1e-7).sqrt()


def cosines(embeddings_bd: torch.Tensor) -> torch.Tensor:
    """Cosines (B, B) of unit vectors.

    Their common part is taken out of the product, whose gradient a GPU may round to TensorFloat-32: of
    vectors that are nearly equal, 2 % of it would be lost.
    """
    embeddings_bd = embeddings_bd.float()
    centre_d = embeddings_bd.mean(0).detach()
    apart_bd, along_b = embeddings_bd - centre_d, (embeddings_bd * centre_d).sum(1)
    return apart_bd @ apart_bd.T + (along_b[:, None] + along_b[None, :]) - centre_d.square().sum()


def mean_where(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean of the valid values, a scalar; 0 if there are none."""
    return values.where(valid, 0).sum() / valid.sum().clamp(min=1)
