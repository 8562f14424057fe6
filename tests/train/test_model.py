"""The encoder: unit vectors, weights by seed, frozen stages, saved, read back and rebuilt."""

from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.training import Model
from train import model
from train.model import Encoder, autocast_dtype, place, rebuild

SMALL = Model(backbone="resnet18", embedding_dim=8)


def build(settings: Model, *, seed: int, size: int = 40) -> Encoder:
    """A fresh encoder of small images."""
    return model.build(settings, size=size, seed=seed)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """A small encoder, in evaluation mode."""
    return build(SMALL, seed=3).eval()


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules hold the same tensors."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_embeddings_are_unit_vectors(encoder: Encoder) -> None:
    images = torch.randn(3, 3, 40, 40)
    vectors = encoder(images)
    assert vectors.shape == (3, 8) and vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(images)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=1), torch.ones(3))
    assert (half - vectors).norm(dim=1).max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_images_of_half_types_are_taken(encoder: Encoder, dtype: torch.dtype, autocast: bool) -> None:
    images = torch.randn(3, 3, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        half = encoder(images.to(dtype))
    assert (half - encoder(images)).norm(dim=1).max() < 0.05


def test_weights_are_a_function_of_the_seed_alone(encoder: Encoder) -> None:
    before = torch.get_rng_state()
    torch.manual_seed(99)
    assert equal(build(SMALL, seed=3), encoder)
    assert not equal(build(SMALL, seed=4), encoder)
    torch.set_rng_state(before)
    build(SMALL, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_channels_last_changes_nothing(encoder: Encoder) -> None:
    images, placed = torch.randn(2, 3, 32, 32), build(SMALL, seed=3).eval()
    place(placed, torch.device("cpu"))
    assert placed.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        placed(images.contiguous(memory_format=torch.channels_last)), encoder(images), atol=1e-5, rtol=1e-4
    )


def test_saved_weights_are_read_back(encoder: Encoder, tmp_path: Path) -> None:
    place(encoder, torch.device("cpu"))
    encoder.save(tmp_path / "encoder.safetensors")
    other = build(SMALL, seed=4)
    other.load(tmp_path / "encoder.safetensors")
    assert equal(other, encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_unfit_weights_are_the_users_error(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(UserError, match="train again"):
        encoder.load(path)
    encoder.save(path)
    with pytest.raises(UserError, match="no weights of this encoder"):
        build(SMALL.model_copy(update={"embedding_dim": 9}), seed=0).load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="no weights of this encoder"):
        encoder.load(path)


@pytest.mark.parametrize("backbone", ["resnet18", "timm/vit_tiny_patch16_224"])
def test_an_encoder_is_rebuilt_from_what_is_said_of_it(backbone: str, tmp_path: Path) -> None:
    settings = Model(backbone=backbone, embedding_dim=8, projection="mlp", bnneck=True, freeze=1)
    encoder = build(settings, size=64, seed=1)
    encoder.save(tmp_path / "encoder.safetensors")
    about = settings.model_dump(include=set(model.ARCHITECTURE)) | {"preprocessing": {"size": 64}}
    other = rebuild(about)
    other.load(tmp_path / "encoder.safetensors")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(other.eval()(images), encoder.eval()(images))


def test_an_encoder_of_before_these_options_is_rebuilt(encoder: Encoder) -> None:
    older = rebuild({"backbone": "resnet18", "embedding_dim": 8, "preprocessing": {"size": 40}})
    older.load_state_dict(encoder.state_dict())
    assert equal(older, encoder)


def test_a_projection_of_two_layers_has_the_features_width() -> None:
    fc = build(SMALL.model_copy(update={"projection": "mlp"}), seed=0).backbone.fc
    assert [type(layer).__name__ for layer in fc] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert fc[0].weight.shape == (512, 512) and fc[0].bias is None and fc[3].weight.shape == (8, 512)


def test_frozen_stages_learn_nothing_and_count_nothing() -> None:
    frozen = build(SMALL.model_copy(update={"freeze": 3}), seed=0).train()
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    frozen(torch.randn(4, 3, 40, 40)).sum().backward()
    torch.optim.SGD([p for p in frozen.parameters() if p.grad is not None], lr=1).step()
    for name, tensor in frozen.state_dict().items():
        still = name.startswith(tuple(f"backbone.{part}." for part in ("conv1", "bn1", "layer1", "layer2")))
        assert torch.equal(tensor, before[name]) == still, name
    assert not frozen.backbone.layer2.training and frozen.backbone.layer3.training
    frozen.eval().train()
    assert not frozen.backbone.bn1.training and frozen.backbone.fc.training


def test_no_more_stages_are_frozen_than_there_are() -> None:
    build(SMALL.model_copy(update={"freeze": 5}), seed=0)
    with pytest.raises(UserError, match=r"freeze=6: the backbone has 5 stages \(conv1 bn1 │ layer1 │"):
        build(SMALL.model_copy(update={"freeze": 6}), seed=0)


@pytest.mark.parametrize(
    ("asked", "expected"), [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_precision_on_a_cpu(asked: str, expected: torch.dtype) -> None:
    assert autocast_dtype(asked, torch.device("cpu")) == expected
