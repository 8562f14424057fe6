"""The whole objective: its sum, neck and heads, its schedule, and micro-batches that change nothing."""

from typing import Any
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from configs.errors import UserError
from configs.training import Loss, Model
from train.distances import Pairs, distances
from train.learner import Learner
from train.losses import arcface, contrastive, supcon, triplet
from train.mining import mining_at
from train.model import Encoder

DIM = 6
WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


def given(count: int = 16) -> dict[str, Any]:
    """Images, labels, patients and draws, as a step of the learner takes them."""
    draw = torch.Generator().manual_seed(3)
    return {
        "images": torch.randn(count, 3, 8, 8, generator=draw),
        "labels": torch.randint(3, (count,), generator=draw),
        "groups": torch.randint(5, (count,), generator=draw),
        "uniform": torch.rand(count, 2, generator=draw),
        "precision": torch.float32,
        "mining": "semi_hard",
    }


class Small(nn.Module):
    """Layers in a module of our own: torch.compile passes over those that are torch's through and through."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(images)
        return features


def learner(
    settings: Loss, *, micro_batch: int = 0, bnneck: bool = False, norm: bool = False, dropout: float = 0
) -> Learner:
    """A small network; without `norm`, a slice of a batch means in it what it means in the whole."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 5, 3), *([nn.BatchNorm2d(5)] if norm else []), nn.GELU(), nn.Dropout(dropout)]
        backbone = Small(*layers, nn.Flatten(), nn.Linear(5 * 36, DIM))
    encoder = Encoder(backbone, f"layers.{len(layers) + 1}", Model(embedding_dim=DIM, bnneck=bnneck))
    return Learner(
        encoder, settings, embedding_dim=DIM, class_weights=WEIGHTS, seed=0, micro_batch=micro_batch
    )


SUM = Loss(triplet=0.5, contrastive=0.25, supcon=2, arcface=0.125, classification=3, margin=0.3)


def gradients(of: Learner, **changes: Any) -> dict[str, torch.Tensor]:
    """Figures and every parameter's gradient of a step."""
    of.zero_grad()
    outcome = of(**given() | changes)
    outcome.loss.backward()
    return outcome.figures | {name: p.grad for name, p in of.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bnneck", [False, True])
def test_the_objective_is_the_weighted_sum(bnneck: bool) -> None:
    of, step = learner(SUM, bnneck=bnneck), given()
    outcome = of(**step)
    features = of.encoder.features(step["images"])
    metric = embeddings = F.normalize(features, dim=1)
    if bnneck:
        deviation = features.var(0, unbiased=False).add(1e-5).sqrt()
        embeddings = F.normalize((features - features.mean(0)) / deviation, dim=1)
    labels, pairs, d = step["labels"], Pairs.of(step["labels"], step["groups"]), distances(metric)
    logits = 10 * (embeddings @ of.head.weight.T + of.head.bias / 10)
    chance = logits.softmax(1)[range(16), labels]
    expected = {
        "triplet": triplet(d, pairs, mining="semi_hard", margin=0.3, uniform_b2=step["uniform"]).loss,
        "contrastive": contrastive(d, pairs, margin=0.5),
        "supcon": supcon(metric, pairs, temperature=0.1),
        "arcface": arcface(
            embeddings, labels, of.centres.weight, margin=0.5, scale=30, class_weights_c=WEIGHTS
        ),
        "classification": -(WEIGHTS[labels] * chance.log()).sum() / WEIGHTS[labels].sum(),
    }
    for name, loss in expected.items():
        torch.testing.assert_close(outcome.figures[name], loss.detach())
    total = sum(getattr(SUM, name) * loss for name, loss in expected.items())
    torch.testing.assert_close(outcome.loss, total)
    torch.testing.assert_close(outcome.embeddings, embeddings.detach())
    assert torch.equal(outcome.labels, labels)


def test_what_weighs_nothing_is_not_there() -> None:
    for name in ("triplet", "contrastive", "supcon", "arcface", "classification"):
        alone = {"triplet": 0.0, "classification": 0.0, name: 1.0}
        of = learner(Loss(**alone))
        assert hasattr(of, "head") == (name == "classification") and hasattr(of, "centres") == (
            name == "arcface"
        )
        outcome = of(**given())
        assert outcome.figures.keys() & SUM.model_dump().keys() == {name}
        assert ("active_triplets" in outcome.figures) == (name == "triplet")


def test_heads_are_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    encoder = learner(SUM).encoder
    heads = [
        Learner(encoder, SUM, embedding_dim=DIM, class_weights=torch.ones(2), seed=seed) for seed in (0, 0, 1)
    ]
    for name in ("head", "centres"):
        one, same, other = (getattr(head, name).weight for head in heads)
        assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_neck_keeps_distances_from_classes() -> None:
    """Losses of distances act before it, and so are blind to it; embeddings come from behind it."""
    before, behind = learner(Loss(classification=0)), learner(Loss(classification=0), bnneck=True)
    one, other = before(**given()), behind(**given())
    torch.testing.assert_close(one.loss, other.loss)
    assert not torch.allclose(one.embeddings, other.embeddings)
    assert [name for name, p in behind.named_parameters() if not p.requires_grad] == ["encoder.neck.bias"]
    behind.eval()
    features = behind.encoder.features(given()["images"])
    neck = behind.encoder.neck
    assert (neck.running_mean != 0).all()
    expected = F.normalize((features - neck.running_mean) / (neck.running_var + 1e-5).sqrt(), dim=1)
    torch.testing.assert_close(behind.encoder(given()["images"]), expected)


@pytest.mark.parametrize("bnneck", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_micro_batches_learn_what_the_whole_batch_does(micro_batch: int, bnneck: bool) -> None:
    whole = gradients(learner(SUM, bnneck=bnneck))
    parts = gradients(learner(SUM, bnneck=bnneck, micro_batch=micro_batch))
    assert whole.keys() == parts.keys() and whole["encoder.backbone.layers.0.weight"].abs().max() > 1e-3
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-5)


def in_turn(of: Learner, count: int) -> dict[str, torch.Tensor]:
    """The step with the encoder called on one micro-batch after another, all activations kept."""
    step, features = given(), of.encoder.features
    calls = torch.cat([features(images) for images in step["images"].split(count)])
    of.encoder.features = lambda images: calls  # type: ignore[method-assign]
    of._micro_batch = 0
    found = gradients(of)
    del of.encoder.features
    return found


def test_dropout_falls_on_the_same_in_both_passes() -> None:
    torch.manual_seed(5)
    expected = in_turn(learner(SUM, dropout=0.5), 4)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    found = gradients(learner(SUM, dropout=0.5, micro_batch=4))
    assert torch.equal(torch.get_rng_state(), after)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("across_ranks", [False, True])
def test_batch_statistics_are_a_micro_batchs_and_count_once(across_ranks: bool) -> None:
    one, other = learner(SUM, norm=True), learner(SUM, norm=True, micro_batch=4)
    if across_ranks:  # one rank alone: a CPU's ranks cannot share them
        nn.SyncBatchNorm.convert_sync_batchnorm(other.encoder.backbone)
    expected, found = in_turn(one, 4), gradients(other)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(dict(other.named_buffers())[name], buffer)
    norm = other.encoder.backbone.layers[1]
    assert isinstance(norm, nn.SyncBatchNorm) == across_ranks
    assert norm.num_batches_tracked == 4 and norm.momentum == 0.1
    whole = gradients(learner(SUM, norm=True))
    assert not torch.allclose(whole["loss"], found["loss"])


def test_activations_of_one_micro_batch_are_held_at_a_time() -> None:
    most = {}
    for micro_batch in (0, 4):
        of, outputs, alive = learner(SUM, micro_batch=micro_batch), [], []

        def note(*args: Any, outputs: list[Any] = outputs, alive: list[int] = alive) -> None:
            outputs.append(ref(args[2]))
            alive.append(sum(len(kept()) for kept in outputs if kept() is not None))

        of.encoder.backbone.layers[0].register_forward_hook(note)
        gradients(of)
        assert len(alive) == (8 if micro_batch else 1)  # each of four goes forward twice
        most[micro_batch] = max(alive)
    assert most == {0: 16, 4: 4}


def test_a_batch_norm_needs_more_than_one_image() -> None:
    alone = learner(SUM, micro_batch=1)
    alone.encoder.backbone.layers.append(nn.BatchNorm1d(DIM))
    with pytest.raises(UserError, match=r"batch norm cannot learn of one image .* train\.micro_batch"):
        alone(**given())


def test_micro_batches_must_share_the_batch() -> None:
    with pytest.raises(UserError, match=r"train\.micro_batch=5 does not divide the 16 images of a rank"):
        learner(SUM, micro_batch=5)(**given())
    gradients(learner(SUM, micro_batch=32))  # all of them fit


def test_a_compiled_backbone_takes_micro_batches_without_compiling_again() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        compiled.append(len(graph.graph.nodes))
        return graph

    expected = gradients(learner(SUM, micro_batch=4, norm=True))
    of = learner(SUM, micro_batch=4, norm=True)
    torch.compiler.reset()
    of.encoder.backbone.compile(backend=backend, fullgraph=True, dynamic=False)
    found = gradients(of)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)
    assert len(compiled) == 2  # one for each pass
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(of)


def test_mining_goes_from_easy_to_hard_by_the_schedule() -> None:
    settings = Loss(mining="random", schedule={"batch_hard": 0.5, "semi_hard": 0.2})
    minings = [mining_at(settings, step / 10) for step in range(11)]
    assert minings == 2 * ["random"] + 3 * ["semi_hard"] + 6 * ["batch_hard"]
    assert mining_at(Loss(mining="all"), 0.9) == "all"
    figures = [
        float(gradients(learner(settings), mining=name)["triplet"]) for name in ("random", "batch_hard")
    ]
    assert figures[0] < figures[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"triplet": 0, "classification": 0},
            "one of triplet, contrastive, supcon, arcface and classification",
        ),
        ({"schedule": {"all": 0.5, "batch_hard": 0.5}}, "two minings begin together"),
        ({"schedule": {"all": 0.5}, "triplet": 0}, "whose weight is 0"),
        ({"schedule": {"hard": 0.5}}, "schedule.hard"),
        ({"schedule": {"all": 1.5}}, "less than 1"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Loss(**settings)
