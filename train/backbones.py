"""Backbones by name, from torchvision or timm, their classifier replaced by a projection."""

import difflib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
from torch import nn

from configs.errors import UserError
from configs.training import Model as Settings

TIMM = "timm/"
_CLASSES = 1000  # of ImageNet: how the classifier is known
_HOLDS_THE_STAGES = 0.9  # a block with more than this share of the blocks beside it is no stage itself


def create(name: str, size: int) -> nn.Module:
    """A backbone with random weights and its ImageNet classifier, for images of size × size.

    Raises:
        UserError: if there is none of this name, timm is not installed, or it cannot have this size.
    """
    try:
        return of_timm(name, size) if name.startswith(TIMM) else _torchvision(name, size)
    except UserError:
        raise
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(unfit(name, size, error)) from None


def _torchvision(name: str, size: int) -> nn.Module:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UserError(_unknown(name, names, "torchvision's, or timm/NAME"))
    backbone: nn.Module = torchvision.models.get_model(name, weights=None)
    # Architectures of a fixed input size say so in their constructor: ViT and MaxViT.
    for keyword, value in (("image_size", size), ("input_size", (size, size))):
        if keyword in inspect.signature(type(backbone)).parameters:
            backbone = torchvision.models.get_model(name, weights=None, **{keyword: value})
    return backbone


def of_timm(name: str, size: int, **options: Any) -> nn.Module:
    """A model of timm's by `timm/NAME`, with an ImageNet classifier; `pretrained=True` has timm download it.

    Raises:
        UserError: if timm is not installed or has none of this name.
    """
    timm = _import_timm()
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        raise UserError(_unknown(name, [TIMM + known for known in timm.list_models()], "timm's"))
    about = timm.get_pretrained_cfg(short)
    if about is not None and about.fixed_input_size:
        options["img_size"] = size
    backbone: nn.Module = timm.create_model(short, num_classes=_CLASSES, **options)
    return backbone


def _import_timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError(
            "model.backbone=timm/… needs timm, which is not installed: pip install 'moleprint[timm]', or "
            "choose a backbone of torchvision"
        ) from None
    return timm


def _unknown(name: str, names: list[str], whose: str) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"model.backbone={name}: no such backbone; a classification model of {whose} was expected" + (
        f", such as {', '.join(near)}" if near else ""
    )


def unfit(name: str, size: int, error: Exception) -> str:
    """What to tell of a backbone that cannot take images of a size."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"model.backbone={name} cannot take images of {size} × {size} ({reason}); change loader.size "
        "(224 suits nearly all, a multiple of 32 most) or the backbone"
    )


def classifier(name: str, backbone: nn.Module) -> str:
    """Where the final linear layer lies in a backbone that `create` made.

    Raises:
        UserError: if there is not exactly one.
    """
    found = [
        path
        for path, layer in backbone.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == _CLASSES
    ]
    if len(found) != 1:
        raise UserError(
            f"model.backbone={name}: has {len(found)} linear classifiers, where one is needed that the "
            "projection can replace; choose another backbone"
        )
    return str(found[0])


def project(backbone: nn.Module, classifier: str, settings: Settings) -> None:
    """Put a projection of features to embeddings in the classifier's place."""
    width = backbone.get_submodule(classifier).in_features
    assert isinstance(width, int)
    projection: nn.Module = nn.Linear(width, settings.embedding_dim)
    if settings.projection == "mlp":
        hidden = nn.Linear(width, width, bias=False)  # the norm has one
        projection = nn.Sequential(hidden, nn.BatchNorm1d(width), nn.ReLU(inplace=True), projection)
    parent, _, last = classifier.rpartition(".")
    setattr(backbone.get_submodule(parent), last, projection)


def check_size(backbone: nn.Module, name: str, size: int) -> None:
    """Raise UserError unless a backbone takes images of size × size: on shapes alone, without arithmetic."""
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    shapes = {key: tensor.detach().to("meta") for key, tensor in tensors.items()}
    images = torch.empty(2, 3, size, size, device="meta")
    was_training = backbone.training
    backbone.eval()
    try:
        torch.func.functional_call(backbone, shapes, (images,))
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(unfit(name, size, error)) from None
    finally:
        backbone.train(was_training)


def stages(backbone: nn.Module, projection: str) -> list[list[str]]:
    """The stages of a backbone from its input on: names of the modules and parameters of each.

    A stage is what the architecture keeps together: the blocks of one resolution in a ResNet, one block of a
    ViT. Lone layers before the first are the stem, later ones belong to the stage before them:

        ResNet    conv1 bn1 │ layer1 │ layer2 │ layer3 │ layer4 ViT       class_token conv_proj
        encoder.pos_embedding │ …encoder_layer_0 │ … │ …encoder_layer_11 encoder.ln

    Args:
        projection: name of the module that is no stage.
    """
    found: list[list[str]] = []
    bare = False  # whether the last stage has parameters of no module alone, such as positions
    for name, kind in _parts(backbone, "", projection):
        if not found or (kind == "block" and not bare):
            found.append([])
            bare = True
        found[-1].append(name)
        bare = bare and kind == "parameter"
    return found


def _parts(module: nn.Module, prefix: str, projection: str) -> Iterator[tuple[str, str]]:
    """(name, `parameter`, `layer` or `block`) of what a backbone is made of, in its own order."""
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name, "parameter"
    children = {prefix + name: child for name, child in module.named_children()}
    sizes = {path: _size(child) for path, child in children.items() if path != projection}
    blocks = {
        path: size
        for path, size in sizes.items()
        if any(map(_size, children[path].children())) and not projection.startswith(f"{path}.")
    }
    for path, size in sizes.items():
        if projection.startswith(f"{path}.") or blocks.get(path, 0) > _HOLDS_THE_STAGES * sum(
            blocks.values()
        ):
            yield from _parts(children[path], f"{path}.", projection)
        elif size:
            yield path, "block" if path in blocks else "layer"


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
