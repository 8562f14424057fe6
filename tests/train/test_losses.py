"""The triplet losses and the whole objective against slow loops over (anchor, positive, negative)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from configs.training import Loss
from train.learner import Learner, spread
from train.losses import triplet

MININGS = ["random", "semi_hard", "batch_hard"]
MARGIN = 0.3


def batch(seed: int, count: int = 18, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors (count, 5) in loose clusters, labels, and draws for random mining."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=draw)
    centres = torch.randn(classes, 5, generator=draw)
    raw = centres[labels] + torch.randn(count, 5, generator=draw)
    return F.normalize(raw, dim=1), labels, torch.rand(count, 2, generator=draw)


def slow_triplets(
    vectors: torch.Tensor, labels: torch.Tensor, mining: str, uniform: torch.Tensor
) -> list[tuple[int, int, int]]:
    """The mined (anchor, positive, negative), as the papers say it."""
    count = len(labels)
    d = [[math.dist(vectors[i].tolist(), vectors[j].tolist()) for j in range(count)] for i in range(count)]
    chosen = []
    for a in range(count):
        positives = [p for p in range(count) if p != a and labels[p] == labels[a]]
        negatives = [n for n in range(count) if labels[n] != labels[a]]
        if not positives or not negatives:
            continue
        if mining == "random":
            p, n = (
                of[int(u * len(of))]
                for of, u in zip((positives, negatives), uniform[a].tolist(), strict=True)
            )
            chosen.append((a, p, n))
        elif mining == "batch_hard":
            chosen.append((a, max(positives, key=d[a].__getitem__), min(negatives, key=d[a].__getitem__)))
        else:
            for p in positives:
                beyond = [n for n in negatives if d[a][n] > d[a][p]]
                n = min(beyond, key=d[a].__getitem__) if beyond else max(negatives, key=d[a].__getitem__)
                chosen.append((a, p, n))
    return chosen


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("seed", range(6))
def test_a_mined_loss_and_its_gradient_equal_a_slow_loop(mining: str, seed: int) -> None:
    vectors, labels, uniform = batch(seed)
    fast = vectors.clone().requires_grad_()
    mined = triplet(fast, labels, mining=mining, margin=MARGIN, uniform_b2=uniform)
    mined.loss.backward()

    slow = vectors.double().requires_grad_()
    chosen = slow_triplets(vectors.double(), labels, mining, uniform)
    near = torch.stack([(slow[a] - slow[p]).norm() for a, p, _ in chosen])
    far = torch.stack([(slow[a] - slow[n]).norm() for a, _, n in chosen])
    losses = (near - far + MARGIN).clamp(min=0)
    losses.mean().backward()

    assert (losses > 0).any() and (mining == "batch_hard" or (losses == 0).any())  # both sides of the hinge
    for value, expected in [
        (mined.loss, losses.mean()),
        (mined.active, (losses > 0).double().mean()),
        (mined.positive, near.mean()),
        (mined.negative, far.mean()),
    ]:
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    # A unit vector moves along the sphere only, where both ways of writing the distance agree.
    torch.testing.assert_close(tangent(fast), tangent(slow).float(), atol=1e-5, rtol=1e-4)


def tangent(vectors: torch.Tensor) -> torch.Tensor:
    """Gradients (n, dim) without their part along the vectors."""
    assert vectors.grad is not None
    along = (vectors.grad * vectors).sum(1, keepdim=True)
    return (vectors.grad - along * vectors).detach()


def test_a_semi_hard_negative_lies_strictly_beyond_the_positive() -> None:
    """Anchor x, positive y; of the negatives z is as far as y, so that −x is the one."""
    vectors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]])
    mined = triplet(
        vectors, torch.tensor([0, 0, 1, 2]), mining="semi_hard", margin=1, uniform_b2=torch.zeros(4, 2)
    )
    # From y, all negatives are as far as x: the farthest it is.
    expected = ((math.sqrt(2) - 2 + 1) + 1) / 2
    torch.testing.assert_close(mined.loss, torch.tensor(expected))


def test_torch_agrees() -> None:
    vectors, labels, uniform = batch(1)
    a, p, n = torch.tensor(slow_triplets(vectors, labels, "random", uniform)).T
    expected = F.triplet_margin_loss(vectors[a], vectors[p], vectors[n], margin=MARGIN)
    mined = triplet(vectors, labels, mining="random", margin=MARGIN, uniform_b2=uniform)
    torch.testing.assert_close(mined.loss, expected, atol=1e-5, rtol=0)


def test_random_mining_reaches_every_positive_and_negative() -> None:
    """Also at the ends of the range of the draws, where rounding could step outside."""
    labels = torch.arange(130) % 2
    vectors = F.normalize(torch.randn(130, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    for edge in (0.0, 1 - 2**-24):
        uniform = torch.full((130, 2), edge)
        mined = triplet(vectors, labels, mining="random", margin=MARGIN, uniform_b2=uniform)
        a, p, n = torch.tensor(slow_triplets(vectors, labels, "random", uniform)).T
        expected = F.triplet_margin_loss(vectors[a], vectors[p], vectors[n], margin=MARGIN)
        torch.testing.assert_close(mined.loss, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mining", MININGS)
def test_identical_embeddings_have_finite_gradients(mining: str) -> None:
    _, labels, uniform = batch(0)
    raw = torch.ones(18, 5).requires_grad_()
    mined = triplet(F.normalize(raw, dim=1), labels, mining=mining, margin=MARGIN, uniform_b2=uniform)
    mined.loss.backward()
    torch.testing.assert_close(mined.loss.detach(), torch.tensor(MARGIN), atol=1e-3, rtol=0)
    assert raw.grad is not None and raw.grad.isfinite().all()


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize(
    "labels", [torch.arange(6), torch.zeros(6, dtype=torch.long)], ids=["no positive", "no negative"]
)
def test_a_batch_without_triplets_gives_zero(mining: str, labels: torch.Tensor) -> None:
    vectors, _, uniform = batch(2, count=6)
    vectors.requires_grad_()
    mined = triplet(vectors, labels, mining=mining, margin=MARGIN, uniform_b2=uniform)
    mined.loss.backward()
    assert mined.loss == mined.active == mined.positive == mined.negative == 0
    assert vectors.grad is not None and (vectors.grad == 0).all()


@pytest.mark.parametrize("mining", MININGS)
def test_half_precision_is_mined_in_full(mining: str) -> None:
    vectors, labels, uniform = batch(3)
    rounded = vectors.bfloat16()
    half, full = (
        triplet(v, labels, mining=mining, margin=MARGIN, uniform_b2=uniform).loss
        for v in (rounded, rounded.float())
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full)


@pytest.mark.parametrize(("weight", "classification"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_objective_is_the_weighted_sum(weight: float, classification: float) -> None:
    vectors, labels, uniform = batch(4)
    settings = Loss(triplet=weight, classification=classification, margin=MARGIN)
    class_weights = torch.tensor([1.0, 2.0, 0.5])
    learner = Learner(nn.Identity(), settings, embedding_dim=5, class_weights=class_weights, seed=0)  # type: ignore[arg-type]
    outcome = learner(vectors, labels, uniform, torch.float32)
    expected = weight * triplet(vectors, labels, mining="semi_hard", margin=MARGIN, uniform_b2=uniform).loss
    if classification:
        logits = 10 * (vectors @ learner.head.weight.T + learner.head.bias / 10)
        of_class = class_weights[labels]
        chance = logits.softmax(1)[range(18), labels]
        expected = expected + classification * -(of_class * chance.log()).sum() / of_class.sum()
    torch.testing.assert_close(outcome.loss, expected)
    assert set(outcome.figures) >= {"loss", "spread"}
    assert ("triplet" in outcome.figures, "classification" in outcome.figures) == (
        weight > 0,
        classification > 0,
    )
    assert torch.equal(outcome.embeddings, vectors) and torch.equal(outcome.labels, labels)


def test_the_head_is_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    heads = [
        Learner(nn.Identity(), Loss(), embedding_dim=4, class_weights=torch.ones(2), seed=seed).head.weight  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_spread_is_zero_at_collapse_and_one_in_all_directions() -> None:
    assert spread(torch.eye(4)[[1, 1, 1]]) == 0
    assert spread(torch.cat([torch.eye(4), -torch.eye(4)])) == 1
    vectors, _, _ = batch(0)
    expected = (vectors - vectors.mean(0)).square().sum(1).mean().sqrt()
    torch.testing.assert_close(spread(vectors), expected)
