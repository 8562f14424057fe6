"""What a backbone starts from: weights of its library, or a file of torchvision, timm, or an earlier run."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import nn

from configs.errors import UserError
from configs.training import Model as Settings
from train import backbones

State = dict[str, torch.Tensor]
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema")
_IN_ONE_ORDER = re.compile(r"(timm/)?(convnext_|efficientnet_b[0-4]|mobilenet_?v2|vit_)")
"""Families that torchvision and timm name differently and hold in the same order, as the tests show.
MobileNet v3 and the larger EfficientNets are not among them: the libraries' norms have another epsilon, 1 %
in the features."""


def load_backbone(backbone: nn.Module, projection: str, settings: Settings, size: int) -> None:
    """Give a backbone the weights that `model.weights` names, but for the projection.

    In a file the tensors may be wrapped (`state_dict`, `model`) and have a prefix (DDP's `module.`,
    `backbone.` of a run's encoder.safetensors); a classifier in it is passed over, and a ViT's positions are
    fitted to its size.

    Raises:
        UserError: if they cannot be had, or do not fit.
    """
    own = {k: v for k, v in backbone.state_dict().items() if not k.startswith(f"{projection}.")}
    given = _from_library(settings, size) if _of_library(settings) else _from_file(Path(settings.weights))
    state = _by_name(given, own, projection) or _by_order(given, own, settings.backbone) or given
    state = {k: _fitted(v, own[k]) if k in own else v for k, v in state.items()}
    wrong = [k for k in own if not _counter(k) and (k not in state or state[k].shape != own[k].shape)]
    wrong += [k for k in state if k not in own]
    if wrong:
        raise UserError(
            f"model.weights={settings.weights}: does not fit {settings.backbone}, {len(wrong)} tensors "
            f"differ, first {wrong[0]}; give a state dict of this backbone, or model.weights=none"
        )
    backbone.load_state_dict(state, strict=False)


def _of_library(settings: Settings) -> bool:
    if settings.weights == "imagenet":
        return True
    path = Path(settings.weights)
    if path.suffix in _SUFFIXES or path.exists():
        return False
    if settings.backbone.startswith(backbones.TIMM):
        names = "imagenet (a tag of timm's is part of the backbone's name, as in timm/resnet50.a1_in1k)"
    else:
        known = torchvision.models.get_model_weights(settings.backbone).__members__
        if settings.weights in known:
            return True
        names = ", ".join(["imagenet", *known])
    raise UserError(
        f"model.weights={settings.weights}: not known for {settings.backbone}; expected none, {names}, or a "
        f"state dict ({', '.join(_SUFFIXES)})"
    )


def _from_library(settings: Settings, size: int) -> State:
    """Downloaded, or from torchvision's or timm's cache. The library builds the model itself: it knows what
    its older files need."""
    name, weights = settings.backbone, settings.weights
    try:
        if name.startswith(backbones.TIMM):
            return dict(backbones.of_timm(name, size, pretrained=True).state_dict())
        known = torchvision.models.get_model_weights(name)
        chosen = known.DEFAULT if weights == "imagenet" else known[weights]
        return dict(torchvision.models.get_model(name, weights=chosen, progress=False).state_dict())
    except Exception as error:  # the libraries raise whatever a network provokes
        address = "" if name.startswith(backbones.TIMM) else f" {chosen.url}"
        raise UserError(
            f"model.weights={weights}: cannot download{address} ({_reason(error)}); fetch it elsewhere and "
            "pass model.weights=FILE.pth (or .safetensors), or start from model.weights=none"
        ) from None


def _from_file(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
        wrapped = (state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping))
        return {k: v for k, v in next(wrapped, state).items() if isinstance(v, torch.Tensor)}
    except Exception as error:  # torch.load raises whatever the bytes provoke
        raise UserError(
            f"model.weights={path}: cannot be read ({_reason(error)}); expected none, imagenet, or a state "
            f"dict ({', '.join(_SUFFIXES)})"
        ) from None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _by_name(given: State, own: State, projection: str) -> State:
    """The tensors under the shortest prefix that has all of a backbone's names; none if no prefix has."""
    first = next(iter(own))
    prefixes = {k.removesuffix(first) for k in given if f".{k}".endswith(f".{first}")}
    for prefix in sorted(prefixes, key=len):
        if all(prefix + k in given or _counter(k) for k in own):
            under = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
            return {k: v for k, v in under.items() if not k.startswith(f"{projection}.")}
    return {}


def _by_order(given: State, own: State, name: str) -> State:
    """The other library's tensors under a backbone's names; none if the shapes are not the same in order.

    What comes last in `given` and is too many is its classifier.
    """
    if not _IN_ONE_ORDER.match(name):
        return {}
    names, theirs = _in_order(own), _in_order(given)[: len(_in_order(own))]
    alike = len(names) == len(theirs) and all(
        _slim(own[k]) == _slim(given[t]) or _is_positions(own[k], given[t])
        for k, t in zip(names, theirs, strict=True)
    )
    if not alike or len(given) > len(own) + 2:
        return {}
    moved = {k: given[t] for k, t in zip(names, theirs, strict=True)}
    return {k: v if _is_positions(own[k], v) else v.reshape(own[k].shape) for k, v in moved.items()}


def _in_order(state: State) -> list[str]:
    """Names, those of class tokens and positions first, where timm has them."""
    return sorted(state, key=lambda k: not (state[k].ndim == 3 and len(state[k]) == 1))


def _slim(tensor: torch.Tensor) -> list[int]:
    """A shape without its ones: a 1 × 1 convolution is a linear layer, a scale may be (C, 1, 1)."""
    return [length for length in tensor.shape if length != 1]


def _is_positions(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are a ViT's positions (1, tokens, width), of images of whatever sizes."""
    return own.ndim == other.ndim == 3 and len(own) == len(other) == 1 and own.shape[2] == other.shape[2]


def _fitted(given: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Positions of a ViT interpolated to its own grid, anything else as it is."""
    if not _is_positions(own, given) or own.shape == given.shape:
        return given
    old, new = (int(t.shape[1] ** 0.5) for t in (given, own))
    extra = own.shape[1] - new**2  # class tokens, which have no place
    if given.shape[1] - old**2 != extra:
        return given
    grid = given[:, extra:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    return torch.cat([given[:, :extra], grid.permute(0, 2, 3, 1).reshape(1, new**2, -1).to(given)], dim=1)


def _counter(name: str) -> bool:
    """BatchNorm's count of batches, which old files lack and which nothing depends on."""
    return name.endswith("num_batches_tracked")
