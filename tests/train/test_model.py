"""The encoder: unit vectors, weights by seed or from a file, saved and read back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.errors import UserError
from configs.training import Model
from train.model import Encoder, autocast_dtype, build, place

SMALL = Model(backbone="resnet18", embedding_dim=8)


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


@pytest.mark.parametrize(("suffix", "nested"), [(".pth", False), (".pth", True), (".safetensors", False)])
def test_a_backbone_starts_from_a_file(suffix: str, nested: bool, encoder: Encoder, tmp_path: Path) -> None:
    state = dict(encoder.backbone.state_dict()) | {
        "fc.weight": torch.zeros(1000, 512),
        "fc.bias": torch.zeros(1000),
    }
    path = tmp_path / f"backbone{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state} if nested else state, path)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    loaded = build(SMALL.model_copy(update={"weights": str(path)}), seed=8)
    for name, tensor in loaded.backbone.state_dict().items():
        assert torch.equal(tensor, encoder.backbone.state_dict()[name]) != name.startswith("fc.")


def test_weights_that_cannot_be_used_are_explained(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    settings = SMALL.model_copy(update={"weights": str(path)})
    with pytest.raises(UserError, match=r"cannot be read \(.*No such file.*expected none, imagenet"):
        build(settings, seed=0)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        build(settings, seed=0)
    torch.save({"head.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"does not fit resnet18.*conv1\.weight"):
        build(settings, seed=0)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="cannot be read"):
        build(settings, seed=0)
    state = dict(encoder.backbone.state_dict())
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, path)
    with pytest.raises(UserError, match=r"1 tensors differ, first conv1\.weight"):
        build(settings, seed=0)


@pytest.mark.parametrize(
    ("asked", "expected"), [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_precision_on_a_cpu(asked: str, expected: torch.dtype) -> None:
    assert autocast_dtype(asked, torch.device("cpu")) == expected
