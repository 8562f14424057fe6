"""Backbones of torchvision and timm: their projection, their stages, the images that they take."""

import sys
from functools import cache

import pytest
import torch

from configs.errors import UserError
from configs.training import Model
from train.model import Encoder, build

STAGES = {
    "resnet18": 5,
    "convnext_tiny": 8,
    "efficientnet_b0": 9,
    "vit_b_32": 13,
    "swin_t": 8,
    "regnet_y_400mf": 5,
    "mobilenet_v3_small": 13,
    "timm/resnet10t": 5,
    "timm/vit_tiny_patch16_224": 13,
    "timm/convnext_atto": 5,
    "timm/efficientnet_lite0": 8,
}


@cache
def encoder(name: str, size: int = 64) -> Encoder:
    """A fresh one, with embeddings of 7 numbers."""
    return build(Model(backbone=name, embedding_dim=7), size=size, seed=0)


@pytest.mark.parametrize("name", STAGES)
def test_a_backbone_of_any_family_gives_embeddings(name: str) -> None:
    of = encoder(name)
    vectors = of.eval()(torch.randn(2, 3, 64, 64))
    assert vectors.shape == (2, 7)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert len(of.stages) == STAGES[name]
    parts = [part for stage in of.stages for part in stage]
    for parameter, _ in of.backbone.named_parameters():
        homes = [part for part in parts if f"{parameter}.".startswith(f"{part}.")]
        assert len(homes) == (not parameter.startswith(tuple(projection(of)))), parameter


def projection(of: Encoder) -> list[str]:
    """The layer with as many outputs as an embedding has numbers."""
    layers = of.backbone.named_modules()
    return [name for name, layer in layers if getattr(layer, "out_features", 0) == 7]


def test_stages_go_from_the_input_to_the_projection() -> None:
    assert encoder("resnet18").stages == [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    vit = encoder("vit_b_32").stages
    assert vit[0] == ["class_token", "conv_proj", "encoder.pos_embedding"]
    assert vit[1] == ["encoder.layers.encoder_layer_0"]
    assert vit[12] == ["encoder.layers.encoder_layer_11", "encoder.ln"]


def test_a_vit_is_made_for_the_size_of_the_images() -> None:
    with torch.device("meta"):
        assert encoder("vit_b_32", size=96).backbone.encoder.pos_embedding.shape == (1, 10, 768)
        assert encoder("timm/vit_tiny_patch16_224", size=96).backbone.pos_embed.shape == (1, 37, 192)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_b_32", 100, r"vit_b_32 cannot take images of 100 × 100 \(.*patch size.*change loader\.size"),
        ("maxvit_t", 64, r"cannot take images of 64 × 64 \(.*partition size"),
        ("alexnet", 32, r"cannot take images of 32 × 32"),
        ("timm/vit_tiny_patch16_224", 100, None),  # which leaves out the last pixels
        ("googlenet", 64, "has 3 linear classifiers"),
        ("squeezenet1_0", 64, "has 0 linear classifiers"),
        ("resnet51", 64, r"no such backbone.*such as resnet.*"),
        ("fasterrcnn_resnet50_fpn", 64, "no such backbone"),
        ("timm/resnet10", 64, r"no such backbone.*such as timm/resnet10t"),
    ],
)
def test_what_cannot_be_built_is_explained(name: str, size: int, message: str | None) -> None:
    with torch.device("meta"):  # values take time, and none are looked at
        if message is None:
            encoder(name, size)
            return
        with pytest.raises(UserError, match=message):
            encoder(name, size)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'moleprint\[timm\]'"):
        encoder("timm/resnet14t")
