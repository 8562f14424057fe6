"""The losses against pytorch-metric-learning and slow loops, their gradients too."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.miners import BaseMiner, BatchEasyHardMiner, BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer

from train.distances import Pairs, distances
from train.losses import Mined, arcface, contrastive, supcon, triplet
from train.mining import MININGS

ALL = ["all", *MININGS]
MARGINS = [0.3, None]
KINDS = ["euclidean", "cosine"]
CLASSES = 3

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def batch(seed: int, count: int = 18, dim: int = 5) -> Batch:
    """Unit vectors (count, dim) in loose clusters, labels, patients, and draws for random mining."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    centres = torch.randn(CLASSES, dim, generator=draw)
    raw = centres[labels] + torch.randn(count, dim, generator=draw)
    groups = torch.randint(6, (count,), generator=draw)
    return F.normalize(raw, dim=1), labels, groups, torch.rand(count, 2, generator=draw)


def mined(
    vectors: torch.Tensor, given: Batch, mining: str, margin: float | None = 0.3, kind: str = "euclidean"
) -> Mined:
    """The triplet loss of vectors with a batch's labels, patients and draws."""
    _, labels, groups, uniform = given
    pairs = Pairs.of(labels, groups)
    return triplet(distances(vectors, kind), pairs, mining=mining, margin=margin, uniform_b2=uniform)


def slow_distance(one: torch.Tensor, other: torch.Tensor, kind: str) -> torch.Tensor:
    """As a textbook has it."""
    return (one - other).norm() if kind == "euclidean" else 1 - one @ other


def slow_triplets(vectors: torch.Tensor, given: Batch, mining: str, kind: str) -> list[tuple[int, int, int]]:
    """The mined (anchor, positive, negative), as the papers say it."""
    _, labels, groups, uniform = given
    count = len(labels)
    d = (torch.cdist(vectors, vectors) if kind == "euclidean" else 1 - vectors @ vectors.T).tolist()
    chosen = []
    for a in range(count):
        positives = [p for p in range(count) if p != a and labels[p] == labels[a]]
        negatives = [n for n in range(count) if labels[n] != labels[a]]
        own = [n for n in negatives if groups[n] == groups[a]]
        if not positives or not negatives:
            continue
        if mining == "random":
            drawn = zip((positives, negatives), uniform[a].tolist(), strict=True)
            p, n = (of[int(u * len(of))] for of, u in drawn)
            chosen.append((a, p, n))
        elif mining == "all":
            chosen += [(a, p, n) for p in positives for n in negatives]
        elif mining == "semi_hard":
            for p in positives:
                beyond = [n for n in negatives if d[a][n] > d[a][p]]
                n = min(beyond, key=d[a].__getitem__) if beyond else max(negatives, key=d[a].__getitem__)
                chosen.append((a, p, n))
        else:
            among = own if own and mining == "patient_hard" else negatives
            of = min if mining == "easy_positive" else max
            chosen.append((a, of(positives, key=d[a].__getitem__), min(among, key=d[a].__getitem__)))
    return chosen


def tangent(vectors: torch.Tensor) -> torch.Tensor:
    """Gradients (n, dim) without their part along the vectors: a unit vector moves along the sphere only."""
    assert vectors.grad is not None
    along = (vectors.grad * vectors).sum(1, keepdim=True)
    return (vectors.grad - along * vectors).detach().float()


def assert_alike(
    given: torch.Tensor, fast: Callable[[torch.Tensor], Any], slow: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Two ways to write a loss of unit vectors agree, and so do their gradients on the sphere."""
    mine, theirs = given.clone().requires_grad_(), given.double().requires_grad_()
    one, other = fast(mine), slow(theirs)
    torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)
    one.backward()
    other.backward()
    assert tangent(mine).abs().max() > 1e-3
    torch.testing.assert_close(tangent(mine), tangent(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("mining", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_a_triplet_loss_and_its_gradient_equal_a_slow_loop(
    seed: int, mining: str, margin: float | None, kind: str
) -> None:
    given = batch(seed)
    chosen = slow_triplets(given[0].double(), given, mining, kind)

    def slow(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        near = torch.stack([slow_distance(vectors[a], vectors[p], kind) for a, p, _ in chosen])
        far = torch.stack([slow_distance(vectors[a], vectors[n], kind) for a, _, n in chosen])
        losses = (1 + (near - far).exp()).log() if margin is None else (near - far + margin).clamp(min=0)
        return losses[losses > 0] if mining == "all" else losses, near, far

    assert_alike(given[0], lambda v: mined(v, given, mining, margin, kind).loss, lambda v: slow(v)[0].mean())
    found, (_, near, far) = mined(given[0], given, mining, margin, kind), slow(given[0].double())
    active = (near - far + (margin or 0) > 0).double().mean()
    # Both sides of the hinge, but with the nearest negatives.
    assert 0 < active < 1 or mining in ("batch_hard", "easy_positive", "patient_hard")
    for value, expected in [
        (found.active, active),
        (found.positive, near.mean()),
        (found.negative, far.mean()),
    ]:
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("margin", MARGINS)
def test_triplet_losses_are_those_of_pytorch_metric_learning(margin: float | None) -> None:
    given = batch(7, count=24)
    labels, settings = given[1], {"margin": margin or 0, "smooth_loss": margin is None}
    every = pml.TripletMarginLoss(**settings)
    assert_alike(given[0], lambda v: mined(v, given, "all", margin).loss, lambda v: every(v, labels))


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(
    ("mining", "miner"),
    [("batch_hard", BatchHardMiner()), ("easy_positive", BatchEasyHardMiner("easy", "hard"))],
)
def test_mined_triplets_are_those_of_pytorch_metric_learning(
    mining: str, miner: BaseMiner, margin: float | None
) -> None:
    given = batch(7, count=24)
    theirs = pml.TripletMarginLoss(margin or 0, smooth_loss=margin is None, reducer=MeanReducer())
    assert_alike(
        given[0],
        lambda v: mined(v, given, mining, margin).loss,
        lambda v: theirs(v, given[1], miner(v, given[1])),
    )


def test_a_soft_margin_over_all_triplets_is_exact_from_end_to_end_of_the_distances() -> None:
    """It is summed through polynomials: also where they are at their ends, at 0 and 2."""
    d = torch.linspace(0, 2, 65 * 65, dtype=torch.float64).reshape(65, 65)
    d = d.flatten()[torch.randperm(65 * 65, generator=torch.Generator().manual_seed(0))].reshape(65, 65)
    pairs = Pairs.of(torch.arange(65) % 3, torch.arange(65))
    settings: dict[str, Any] = {"mining": "all", "margin": None, "uniform_b2": torch.zeros(65, 2)}
    mine, exact = d.clone().requires_grad_(), d.clone().requires_grad_()
    loss = triplet(mine, pairs, **settings).loss
    gap = (exact[:, :, None] - exact[:, None, :])[pairs.positive[:, :, None] & pairs.negative[:, None, :]]
    expected = F.softplus(gap).mean()
    torch.testing.assert_close(loss, expected, atol=0, rtol=2e-11)
    loss.backward()
    expected.backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, exact.grad, atol=0, rtol=1e-8)


def test_the_contrastive_loss_equals_a_slow_loop() -> None:
    given = batch(3)
    labels, count = given[1].tolist(), len(given[1])

    def slow(vectors: torch.Tensor) -> torch.Tensor:
        kinds: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for i in range(count):
            for j in range(i):
                d = (vectors[i] - vectors[j]).norm()
                apart = labels[i] != labels[j]
                kinds[apart].append((0.9 - d).clamp(min=0) ** 2 / 2 if apart else d**2 / 2)
        assert any(loss == 0 for loss in kinds[1]) and any(loss > 0 for loss in kinds[1])
        return torch.stack(kinds[0]).mean() + torch.stack(kinds[1]).mean()

    pairs = Pairs.of(given[1], given[2])
    assert_alike(given[0], lambda v: contrastive(distances(v), pairs, margin=0.9), slow)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_the_supervised_contrastive_loss_is_that_of_pytorch_metric_learning(temperature: float) -> None:
    given = batch(4)
    pairs, theirs = Pairs.of(given[1], given[2]), pml.SupConLoss(temperature)
    assert_alike(given[0], lambda v: supcon(v, pairs, temperature=temperature), lambda v: theirs(v, given[1]))


@pytest.mark.parametrize("margin", [0.0, 0.5, 2.5])
def test_arcface_is_that_of_pytorch_metric_learning(margin: float) -> None:
    """With the largest margin most angles pass π, where the loss goes on another way."""
    given = batch(5)
    centres = torch.randn(CLASSES, 5, generator=torch.Generator().manual_seed(1))
    theirs = pml.ArcFaceLoss(CLASSES, 5, margin=math.degrees(margin), scale=20).double()
    theirs.W.data = centres.T.double()
    mine = centres.clone().requires_grad_()

    def fast(vectors: torch.Tensor) -> torch.Tensor:
        weights = torch.ones(CLASSES)
        return arcface(vectors, given[1], mine, margin=margin, scale=20, class_weights_c=weights)

    assert_alike(given[0], fast, lambda v: theirs(v, given[1]))
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, theirs.W.grad.T.float(), atol=1e-5, rtol=1e-4)


def test_arcface_weighs_classes() -> None:
    vectors, labels, *_ = batch(5)
    weights = torch.tensor([0.0, 1.0, 3.0])
    each = [
        arcface(v[None], y[None], torch.eye(CLASSES, 5), margin=0.5, scale=9, class_weights_c=torch.ones(3))
        for v, y in zip(vectors, labels, strict=True)
    ]
    expected = (torch.stack(each) * weights[labels]).sum() / weights[labels].sum()
    found = arcface(vectors, labels, torch.eye(CLASSES, 5), margin=0.5, scale=9, class_weights_c=weights)
    torch.testing.assert_close(found, expected)


def test_a_semi_hard_negative_lies_strictly_beyond_the_positive() -> None:
    """Anchor x, positive y; of the negatives z is as far as y, so that −x is the one."""
    vectors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]])
    labels = torch.tensor([0, 0, 1, 2])
    found = mined(vectors, (vectors, labels, labels, torch.zeros(4, 2)), "semi_hard", 1)
    # From y, all negatives are as far as x: the farthest it is.
    expected = ((math.sqrt(2) - 2 + 1) + 1) / 2
    torch.testing.assert_close(found.loss, torch.tensor(expected))


def test_a_patients_own_negative_goes_first() -> None:
    """At angles 0, 10 (positives), 20 (another patient's negative), 90 (the own one)."""
    angles = torch.tensor([0.0, 10, 20, 90]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels, groups = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 0])
    d = distances(vectors)
    own = triplet(d, Pairs.of(labels, groups), mining="patient_hard", margin=9, uniform_b2=torch.zeros(4, 2))
    expected = (d[0, 3] + d[1, 2] + d[2, 1] + d[3, 0]) / 4
    torch.testing.assert_close(own.negative, expected)


def test_random_mining_reaches_every_positive_and_negative() -> None:
    """Also at the ends of the range of the draws, where rounding could step outside."""
    labels = torch.arange(130) % 2
    vectors = F.normalize(torch.randn(130, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    for edge in (0.0, 1 - 2**-24):
        given = (vectors, labels, labels, torch.full((130, 2), edge))
        a, p, n = torch.tensor(slow_triplets(vectors, given, "random", "euclidean")).T
        expected = F.triplet_margin_loss(vectors[a], vectors[p], vectors[n], margin=0.3)
        torch.testing.assert_close(mined(vectors, given, "random").loss, expected, atol=1e-5, rtol=0)
