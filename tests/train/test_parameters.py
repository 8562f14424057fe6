"""The optimiser's groups: which parameters learn, how fast, and which decay."""

from typing import Any

import pytest
import torch
from torch import nn

from configs.training import Loss, Model
from train.learner import Learner
from train.model import build
from train.parameters import parameter_groups


def learner(backbone: str = "resnet18", **changes: Any) -> Learner:
    """A learner with every head; its tensors have names and shapes, but no values."""
    with torch.device("meta"):
        encoder = build(Model(backbone=backbone, embedding_dim=8, **changes), size=64, seed=0)
        return Learner(encoder, Loss(arcface=1), embedding_dim=8, class_weights=torch.ones(2), seed=0)


def named(of: Learner, group: dict[str, Any]) -> set[str]:
    """Names of a group's parameters."""
    return {name for name, p in of.named_parameters() if any(p is q for q in group["params"])}


def test_biases_norms_and_scales_do_not_decay() -> None:
    of = learner(bnneck=True, projection="mlp")
    decayed, spared = parameter_groups(of, lr=0.1, weight_decay=0.3, layer_decay=1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0)
    assert all(group["lr"] == 0.1 and group["lr_scale"] == 1 for group in (decayed, spared))
    norms = {
        f"{path}.{name}"
        for path, module in of.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        for name in ("weight", "bias")
    }
    biases = {name for name, _ in of.named_parameters() if name.endswith("bias")}
    assert named(of, spared) == (norms | biases | {"log_scale"}) - {"encoder.neck.bias"}
    learning = {name for name, p in of.named_parameters() if p.requires_grad}
    assert named(of, decayed) == learning - named(of, spared)


def test_positions_and_layer_scales_do_not_decay() -> None:
    vit, convnext = learner("vit_b_32"), learner("convnext_tiny")
    spared = [
        named(of, parameter_groups(of, lr=1, weight_decay=1, layer_decay=1)[1]) for of in (vit, convnext)
    ]
    assert spared[0] >= {"encoder.backbone.class_token", "encoder.backbone.encoder.pos_embedding"}
    assert "encoder.backbone.features.1.0.layer_scale" in spared[1]
    assert "encoder.backbone.encoder.layers.encoder_layer_0.self_attention.in_proj_weight" not in spared[0]


def test_each_stage_learns_slower_than_the_next() -> None:
    of = learner()
    groups = parameter_groups(of, lr=0.1, weight_decay=0.3, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name in named(of, group)}
    assert rates.keys() == dict(of.named_parameters()).keys()
    powers = {"conv1": 5, "bn1": 5, "layer1": 4, "layer2": 3, "layer3": 2, "layer4": 1, "fc": 0}
    for part, power in powers.items():
        own = [rate for name, rate in rates.items() if name.startswith(f"encoder.backbone.{part}.")]
        assert own == pytest.approx([0.1 * 0.5**power] * len(own)) and own
    assert all(rates[name] == 0.1 for name in ("head.weight", "head.bias", "log_scale", "centres.weight"))
    assert all(group["lr"] == pytest.approx(0.1 * group["lr_scale"]) for group in groups)
    assert {group["weight_decay"] for group in groups} == {0, 0.3}


def test_what_is_frozen_is_in_no_group() -> None:
    of = learner(freeze=2)
    groups = parameter_groups(of, lr=0.1, weight_decay=0.3, layer_decay=0.9)
    names = set().union(*(named(of, group) for group in groups))
    assert names == {name for name, p in of.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("encoder.backbone.conv1", "encoder.backbone.layer1")) for name in names)
