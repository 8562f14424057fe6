"""The losses against pytorch-metric-learning and slow loops, their gradients too; compiled; in half types."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning.miners import BaseMiner, BatchEasyHardMiner, BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.training import Loss
from configs.training import Model as ModelSettings
from train.distances import Pairs, distances
from train.learner import Learner
from train.losses import Mined, arcface, contrastive, supcon, triplet
from train.mining import MININGS
from train.model import Encoder

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


OBJECTIVES = {
    **{name: Loss(triplet=1, mining=name, margin=0.2, classification=0) for name in ALL},  # type: ignore[arg-type]
    "soft": Loss(mining="all", margin="soft", classification=0),
    "cosine": Loss(mining="semi_hard", margin=0.2, distance="cosine", classification=0),
    "contrastive": Loss(triplet=0, contrastive=1, classification=0),
    "supcon": Loss(triplet=0, supcon=1, classification=0),
    "arcface": Loss(triplet=0, arcface=1, classification=0),
    "classification": Loss(triplet=0),
    "sum": Loss(mining="semi_hard", margin=0.2, contrastive=0.25, supcon=2, arcface=0.125, classification=3),
}


def learner(settings: Loss, dim: int = 5, classes: int = CLASSES) -> Learner:
    """A learner whose images are the features already."""
    encoder = Encoder(nn.Identity(), "", ModelSettings(embedding_dim=dim))
    return Learner(encoder, settings, embedding_dim=dim, class_weights=torch.linspace(1, 2, classes), seed=0)


def step(of: Learner, given: Batch, settings: Loss) -> torch.Tensor:
    """The loss of a batch of features."""
    loss: torch.Tensor = of(*given, torch.float32, settings.mining).loss
    return loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_identical_embeddings_have_finite_gradients(name: str) -> None:
    settings = OBJECTIVES[name]
    _, labels, groups, uniform = batch(0)
    raw = torch.ones(18, 5).requires_grad_()
    loss = step(learner(settings), (raw, labels, groups, uniform), settings)
    loss.backward()
    assert loss.isfinite() and raw.grad is not None and raw.grad.isfinite().all()
    if name in MININGS:
        torch.testing.assert_close(loss.detach(), torch.tensor(settings.margin), atol=1e-3, rtol=0)


@pytest.mark.parametrize("own", [1.0, -1.0])
def test_arcface_has_finite_gradients_at_and_opposite_the_centre(own: float) -> None:
    centres = torch.eye(3).requires_grad_()
    vectors = (own * torch.eye(3)).requires_grad_()
    loss = arcface(vectors, torch.arange(3), centres, margin=0.5, scale=30, class_weights_c=torch.ones(3))
    loss.backward()
    assert vectors.grad is not None and centres.grad is not None
    assert vectors.grad.isfinite().all() and centres.grad.isfinite().all()


@pytest.mark.parametrize("name", [*ALL, "soft", "contrastive", "supcon"])
@pytest.mark.parametrize(
    "labels", [torch.arange(6), torch.zeros(6, dtype=torch.long)], ids=["no positive", "no negative"]
)
def test_a_batch_without_triplets_gives_zero(name: str, labels: torch.Tensor) -> None:
    """Without pairs of one kind, the other losses go on with the other kind, if they can."""
    settings = OBJECTIVES[name]
    features, _, groups, uniform = batch(2, count=6)
    features.requires_grad_()
    outcome = learner(settings)(features, labels, groups, uniform, torch.float32, settings.mining)
    outcome.loss.backward()
    assert outcome.loss.isfinite() and features.grad is not None and features.grad.isfinite().all()
    if settings.triplet:
        triplets = ("triplet", "active_triplets", "distance_positive", "distance_negative")
        assert all(outcome.figures[name] == 0 for name in triplets) and (features.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_types_are_compared_in_full(name: str, dtype: torch.dtype) -> None:
    settings = OBJECTIVES[name]
    vectors, *rest = batch(3)
    half, full = (
        step(learner(settings), (v, *rest), settings)  # type: ignore[arg-type]
        for v in (vectors.to(dtype), vectors.to(dtype).float())
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_vectors_are_in_float32(dtype: torch.dtype) -> None:
    vectors, labels, groups, _ = batch(3)
    half, pairs = vectors.to(dtype), Pairs.of(labels, groups)
    settings = {"margin": 0.5, "scale": 9, "class_weights_c": torch.ones(CLASSES)}
    for loss in (
        distances,
        lambda v: supcon(v, pairs, temperature=0.1),
        lambda v: arcface(v, labels, torch.eye(CLASSES, 5, dtype=v.dtype), **settings),
    ):
        assert loss(half).dtype == torch.float32
        torch.testing.assert_close(loss(half), loss(half.float()))


class TensorFloat32(TorchDispatchMode):
    """Matrix products as such a GPU makes them of float32: of 10 bits of mantissa, rounded to even."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            args = [self._rounded(a) if a.dtype == torch.float32 else a for a in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _rounded(of: torch.Tensor) -> torch.Tensor:
        bits = of.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("name", ["soft", "supcon", "semi_hard"])
def test_a_backward_pass_in_tensorfloat32_keeps_the_gradient_of_near_embeddings(name: str) -> None:
    """Only the forward pass is under `exact_products`: the backbone's products may be rounded."""
    settings = OBJECTIVES[name]
    vectors, *rest = batch(3, count=48)
    raw = 0.01 * vectors + torch.ones(vectors.shape[1])
    gradients = []
    for mode in (contextlib.nullcontext(), TensorFloat32()):
        given = raw.clone().requires_grad_()
        loss = step(learner(settings), (given, *rest), settings)  # type: ignore[arg-type]
        with mode:
            loss.backward()
        assert given.grad is not None
        gradients.append(given.grad)
    exact, rounded = gradients
    assert 0 < (rounded - exact).norm() < 2e-3 * exact.norm()


class Watched(TorchDispatchMode):
    """Refuses whatever would make the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_never_makes_the_host_wait(name: str) -> None:
    settings = OBJECTIVES[name]
    vectors, *rest = batch(6)
    of = learner(settings)
    with Watched():
        step(of, (vectors.requires_grad_(), *rest), settings).backward()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*ALL, "soft", "sum"])
def test_an_objective_compiles_whole_and_once(name: str) -> None:
    """No graph breaks, and no other batch of the same shape compiles again."""
    settings = OBJECTIVES[name]
    of = learner(settings)

    def objective(
        metric: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor, draws: torch.Tensor
    ) -> Any:
        losses, figures = of._losses(metric, metric, labels, groups, draws, settings.mining)
        return sum(losses.values()), figures

    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(objective, fullgraph=True, backend=backend, dynamic=False)
    for seed in range(2):
        vectors, *rest = batch(seed)
        mine, plain = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
        stance = "default" if not seed else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            loss, figures = compiled(mine, *rest)
        expected, expected_figures = objective(plain, *rest)
        torch.testing.assert_close((loss, figures), (expected, expected_figures))
        loss.backward()
        expected.backward()
        torch.testing.assert_close(mine.grad, plain.grad, atol=1e-6, rtol=1e-5)
    assert len(graphs) == 1
