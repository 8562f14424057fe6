"""What every objective keeps to: finite at the edges, in full precision, without waiting, compiled once."""

import contextlib
from typing import Any

import pytest
import torch
from test_losses import ALL, CLASSES, Batch, batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.training import Loss
from configs.training import Model as ModelSettings
from train.distances import Pairs, distances
from train.learner import Learner
from train.losses import arcface, supcon
from train.mining import MININGS
from train.model import Encoder

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
    """Its figures are no numbers. Losses of pairs go on with the other kind, if they can."""
    settings = OBJECTIVES[name]
    features, _, groups, uniform = batch(2, count=6)
    features.requires_grad_()
    outcome = learner(settings)(features, labels, groups, uniform, torch.float32, settings.mining)
    outcome.loss.backward()
    assert outcome.loss.isfinite() and features.grad is not None and features.grad.isfinite().all()
    if settings.triplet:
        assert outcome.figures["triplet"] == 0 and (features.grad == 0).all()
        watched = ("active_triplets", "distance_positive", "distance_negative")
        assert all(outcome.figures[name].isnan() for name in watched)


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
