"""Losses on the whole global batch: B×B matrices, no dynamic shapes, no host synchronisation, compilable.

Shapes: B global batch, D embedding, C classes, T terms; rows anchors, columns candidates. Results: float32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from train.distances import FAR, Pairs, cosines, diagonal, mean_where
from train.mining import mine

TERMS = 12  # Chebyshev polynomials that a soft margin is made of


class Mined(NamedTuple):
    """A triplet loss and what is worth watching about it, all scalars on the device.

    Without any triplet the loss is 0, and what is to be watched NaN.
    """

    loss: torch.Tensor
    active: torch.Tensor
    """Share of triplets with a positive loss; with a soft margin, of those whose negative is the nearer."""
    positive: torch.Tensor
    """Mean anchor-positive distance of the triplets."""
    negative: torch.Tensor
    """Mean anchor-negative distance of the triplets."""


def triplet(
    d_bb: torch.Tensor, pairs: Pairs, *, mining: str, margin: float | None, uniform_b2: torch.Tensor
) -> Mined:
    """max(0, d(anchor, positive) − d(anchor, negative) + margin), averaged over the mined triplets.

    Schroff 2015, arXiv 1503.03832; with a soft margin log(1 + exp(d⁺ − d⁻)), Hermans 2017, arXiv 1703.07737.

    Args:
        d_bb: of unit vectors, from 0 to 2.
        mining: `all` or one of `train.mining.MININGS`; over `all`, the average is of those with a loss.
        margin: None is the soft margin.
        uniform_b2: (B, 2) in [0, 1), which positive and which negative `random` takes.
    """
    if mining == "all":
        return _all(d_bb, pairs, margin)
    mined = mine(mining, d_bb, pairs, uniform_b2)
    gap = mined.positive - mined.negative
    loss = F.softplus(gap) if margin is None else F.relu(gap + margin)
    return Mined(
        loss=mean_where(loss, mined.valid),
        active=_mean_if_any((gap + (margin or 0) > 0).float(), mined.valid),
        positive=_mean_if_any(mined.positive, mined.valid),
        negative=_mean_if_any(mined.negative, mined.valid),
    )


def _mean_if_any(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean of the valid values, a scalar without gradient; NaN if there are none."""
    return values.detach().where(valid, 0).sum() / valid.sum()


def _all(d_bb: torch.Tensor, pairs: Pairs, margin: float | None) -> Mined:
    """Every triplet; the mean is of those with a loss: Hermans 2017's "batch all", BA≠0.

    No list of them is made. With an anchor's negatives sorted, those that count for a positive come first,
    and a hinge's sum over them is a prefix sum's: O(B² log B). For a soft margin see `_soft_sum`.
    """
    positives, negatives = pairs.positive.sum(1), pairs.negative.sum(1)
    count = (positives * negatives).sum()
    sorted_bb = d_bb.masked_fill(~pairs.negative, FAR).sort(1).values
    reach_bb = d_bb + (margin or 0)
    # How many negatives of an anchor lie nearer than each positive plus the margin.
    nearer_bb = torch.searchsorted(sorted_bb.detach(), reach_bb.detach().contiguous())
    active = nearer_bb.where(pairs.positive, 0).sum()
    if margin is None:
        loss = _soft_sum(d_bb, pairs) / count.clamp(min=1)
    else:
        prefix_bb = F.pad(sorted_bb.where(sorted_bb < FAR, 0).cumsum(1), (1, 0))
        sums_bb = nearer_bb * reach_bb - prefix_bb.gather(1, nearer_bb)
        loss = sums_bb.where(pairs.positive, 0).sum() / active.clamp(min=1)
    masks = pairs.positive, pairs.negative
    to_positives, to_negatives = (d_bb.detach().where(mask, 0).sum(1) for mask in masks)
    return Mined(
        loss=loss,
        active=active / count,
        positive=(to_positives * negatives).sum() / count,
        negative=(to_negatives * positives).sum() / count,
    )


def _soft_sum(d_bb: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Σ log(1 + exp(d⁺ − d⁻)) over all triplets, without a list of them: O(B²).

    On distances from 0 to 2 the summand is Σ c_ij Tᵢ(d⁺ − 1) Tⱼ(d⁻ − 1), Chebyshev polynomials that
    interpolate it to 2e-10 and its slope to 1e-8 (Trefethen 2013, "Approximation theory and approximation
    practice", chapters 4 and 8). So all that an anchor's triplets need of its positives and of its negatives
    is the sum of each polynomial over them, as in the fast Gauss transform (Greengard and Strain 1991).
    """
    terms = _chebyshev(d_bb - 1)
    masks = pairs.positive, pairs.negative
    near_tb, far_tb = (torch.stack([t.where(mask, 0).sum(1) for t in terms]) for mask in masks)
    # In float64, which no GPU makes TensorFloat-32 of, in the backward pass either.
    return (near_tb * (_softplus_terms(d_bb.device) @ far_tb.double()).to(d_bb.dtype)).sum()


def _chebyshev(x: torch.Tensor) -> list[torch.Tensor]:
    """The first TERMS, each of two of half its order, so that a backward pass needs the first half alone."""
    terms = [torch.ones_like(x), x]
    for order in range(2, TERMS):
        half, rest = terms[order // 2], terms[order - order // 2]
        terms.append(2 * (half * rest) - (x if order % 2 else 1))  # 2 TᵢTⱼ = Tᵢ₊ⱼ + T|ᵢ₋ⱼ|
    return terms


def _softplus_terms(device: torch.device) -> torch.Tensor:
    """c (TERMS, TERMS) of log(1 + exp(x − y)) = Σ c_ij Tᵢ(x) Tⱼ(y), x and y from −1 to 1.

    Made where it is used: from the host, it would have to be copied and waited for.
    """
    order_t = torch.arange(TERMS, device=device, dtype=torch.float64)
    angle_t = (order_t + 0.5) * (math.pi / TERMS)
    node_t = angle_t.cos()
    to_terms = (order_t[:, None] * angle_t).cos() * ((1 + order_t.clamp(max=1)) / TERMS)[:, None]
    return to_terms @ F.softplus(node_t[:, None] - node_t) @ to_terms.T


def contrastive(d_bb: torch.Tensor, pairs: Pairs, *, margin: float) -> torch.Tensor:
    """½ d² of positive pairs and ½ max(0, margin − d)² of negative ones, the mean of either kind added.

    Hadsell 2006, "Dimensionality reduction by learning an invariant mapping", equation 4; means of each kind,
    so that the rarer of them counts as much.
    """
    attracted = mean_where(d_bb.square(), pairs.positive)
    repelled = mean_where(F.relu(margin - d_bb).square(), pairs.negative)
    return 0.5 * (attracted + repelled)


def supcon(embeddings_bd: torch.Tensor, pairs: Pairs, *, temperature: float) -> torch.Tensor:
    """−log softmax of an anchor's cosines at its positives, their mean, averaged over anchors that have any.

    Khosla 2020, arXiv 2004.11362, equation 2 (L_out).
    """
    logits_bb = cosines(embeddings_bd) / temperature
    logits_bb = logits_bb.masked_fill(diagonal(logits_bb), -FAR)
    log_share_bb = logits_bb - logits_bb.logsumexp(1, keepdim=True)
    count = pairs.positive.sum(1)
    of_anchor = -log_share_bb.where(pairs.positive, 0).sum(1) / count.clamp(min=1)
    return mean_where(of_anchor, count > 0)


def arcface(
    embeddings_bd: torch.Tensor,
    labels_b: torch.Tensor,
    centres_cd: torch.Tensor,
    *,
    margin: float,
    scale: float,
    class_weights_c: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of scale × cos θ, where θ, the angle to a class's centre, is taken `margin` larger for
    the embedding's own class. Deng 2019, arXiv 1801.07698, equation 3.

    Where θ + margin would pass π, cos θ − margin × sin margin goes on falling, as in the authors' own code.
    The gradient is finite at θ = 0 and θ = π.

    Args:
        centres_cd: of any length.
        class_weights_c: how much each class counts.
    """
    cosine_bc = embeddings_bd.float() @ F.normalize(centres_cd.float(), dim=1).T
    sine_bc = (1 - cosine_bc.square()).clamp(min=1e-7).sqrt()
    moved_bc = torch.where(
        cosine_bc > -math.cos(margin),
        cosine_bc * math.cos(margin) - sine_bc * math.sin(margin),
        cosine_bc - margin * math.sin(margin),
    )
    own = labels_b[:, None] == torch.arange(len(centres_cd), device=labels_b.device)
    return F.cross_entropy(scale * torch.where(own, moved_bc, cosine_bc), labels_b, class_weights_c)
