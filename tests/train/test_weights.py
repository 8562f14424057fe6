"""What a backbone starts from: names, files of torchvision and timm, prefixes, wrappers, errors."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from configs.errors import UserError
from configs.training import Model
from train.model import Encoder, build
from train.weights import _fitted

SMALL = Model(backbone="resnet18", embedding_dim=8)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """What files are made of."""
    return build(SMALL, size=40, seed=3)


def start(weights: str | Path, backbone: str = "resnet18", size: int = 64) -> Encoder:
    """An encoder that starts from these weights."""
    settings = Model(backbone=backbone, embedding_dim=8, weights=str(weights))
    return build(settings, size=size, seed=8)


@pytest.mark.parametrize(
    ("suffix", "wrapper", "prefix"),
    [
        (".pth", None, ""),
        (".pt", "state_dict", ""),
        (".pth", "model", "module."),
        (".safetensors", None, ""),
        (".safetensors", None, "backbone."),
        (".pth", "state_dict", "module.encoder_q."),
    ],
)
def test_a_backbone_starts_from_a_file(
    suffix: str, wrapper: str | None, prefix: str, encoder: Encoder, tmp_path: Path
) -> None:
    own = encoder.backbone.state_dict()
    state = own | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    state = {prefix + k: v.contiguous() for k, v in state.items()}
    if prefix:
        state["neck.weight"] = torch.ones(8)
    path = tmp_path / f"backbone{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    loaded = start(path)
    for name, tensor in loaded.backbone.state_dict().items():
        assert torch.equal(tensor, own[name]) != name.startswith("fc.")


def test_a_run_starts_from_another_runs_encoder(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    encoder.save(path)
    assert torch.equal(start(path).backbone.conv1.weight, encoder.backbone.conv1.weight)


FAMILIES = {
    "resnet18": "resnet18",
    "convnext_tiny": "convnext_tiny",
    "efficientnet_b0": "efficientnet_b0",
    "mobilenet_v2": "mobilenetv2_100",
    "vit_b_32": "vit_base_patch32_224",
}


def shaken(network: nn.Module) -> nn.Module:
    """No two tensors alike: norms and scales begin as ones, and could change places unseen."""
    draw = torch.Generator().manual_seed(2)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            spread = 1 if "var" in name else max(1, tensor[0].numel()) ** -0.5
            tensor.uniform_(0.5 if "var" in name else -0.3 * spread, spread, generator=draw)
    return network.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_timms_weights_compute_the_same_under_torchvisions_names(name: str, tmp_path: Path) -> None:
    assert_taken(timm.create_model(FAMILIES[name], num_classes=1000), name, tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvisions_weights_compute_the_same_under_timms_names(name: str, tmp_path: Path) -> None:
    giver = torchvision.models.get_model(name)
    assert_taken(giver, f"timm/{FAMILIES[name]}", tmp_path / "weights.pth")


def assert_taken(giver: nn.Module, taker: str, path: Path) -> None:
    """A backbone that starts from another's file computes what that one does."""
    torch.save(shaken(giver).state_dict(), path)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found, expected = (
        features(network, images) for network in (start(path, taker, 224).backbone.eval(), giver)
    )
    assert expected.std() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What enters the last linear layer."""
    found: list[torch.Tensor] = []
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    network(images)
    hook.remove()
    return found[0].flatten(1)


def test_positions_are_fitted_to_the_grid() -> None:
    """A plane stays a plane, inside; the class token has no place."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    given = torch.cat([torch.full((1, 1, 2), 9.0), torch.stack([y, x], dim=2).reshape(1, 64, 2)], dim=1)
    found = _fitted(given, torch.zeros(1, 1 + 16 * 16, 2))
    assert (found[:, 0] == 9).all()
    inside = found[0, 1:].reshape(16, 16, 2)[4:-4, 4:-4]
    expected = (torch.arange(16.0) / 2 - 0.25)[4:-4]
    torch.testing.assert_close(inside[:, 0, 0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(inside[0, :, 1], expected, atol=1e-4, rtol=0)
    assert _fitted(given, given) is given


def test_a_vit_of_another_size_starts_from_a_file(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "vit.pth")
    assert start(tmp_path / "vit.pth", f"timm/{name}", 96).backbone.pos_embed.shape == (1, 37, 192)


def test_weights_are_taken_by_torchvisions_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get_state_dict(self: Any, **_: Any) -> Any:
        asked.append(str(self))
        return dict(torchvision.models.resnet50().state_dict())

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", get_state_dict)
    for name in ("IMAGENET1K_V1", "imagenet", "IMAGENET1K_V2"):
        start(name, "resnet50")
    assert asked == [f"ResNet50_Weights.IMAGENET1K_V{version}" for version in (1, 2, 2)]


def test_weights_that_cannot_be_downloaded_can_be_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    def create(*_: Any, pretrained: bool = False, **__: Any) -> nn.Module:
        return offline() if pretrained else real()  # type: ignore[return-value, func-returns-value]

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    remedy = r"no route.*pass model\.weights=FILE\.pth"
    with pytest.raises(UserError, match=r"cannot download https://.*resnet18.*" + remedy):
        start("imagenet")
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match=r"cannot download \(" + remedy):
        start("imagenet", "timm/resnet10t")


def real() -> nn.Module:
    """A small model of timm's."""
    model: nn.Module = timm.models.resnet.resnet10t(num_classes=1000)
    return model


def test_weights_that_cannot_be_used_are_explained(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match=r"cannot be read \(.*No such file.*expected none, imagenet"):
        start(path)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        start(path)
    torch.save({"head.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"does not fit resnet18.*conv1\.weight"):
        start(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="cannot be read"):
        start(path)
    state = dict(encoder.backbone.state_dict())
    torch.save(state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, path)
    with pytest.raises(UserError, match=r"1 tensors differ, first conv1\.weight"):
        start(path)
    torch.save(torchvision.models.resnet34().state_dict(), path)  # which has all that resnet18 has, and more
    with pytest.raises(UserError, match=r"does not fit resnet18.*layer1\.2"):
        start(path)
    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=1000).state_dict(), path)
    with pytest.raises(UserError, match=r"does not fit mobilenet_v3_small"):
        start(path, "mobilenet_v3_small")
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(UserError, match=r"does not fit convnext_tiny"):
        start(path, "convnext_tiny")


def test_names_that_are_not_known_are_listed() -> None:
    listed = "none, imagenet, IMAGENET1K_V1, IMAGENET1K_V2"
    with pytest.raises(UserError, match=f"IMAGENET1K_V3: not known for resnet50; expected {listed}"):
        start("IMAGENET1K_V3", "resnet50")
    with pytest.raises(UserError, match=r"a tag of timm's is part of the backbone's name"):
        start("IMAGENET1K_V1", "timm/resnet10t")
