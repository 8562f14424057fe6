"""The encoder: a torchvision ResNet with a linear projection to unit vectors."""

from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from configs.errors import UserError
from configs.training import Model as Settings
from shards.files import atomic


class Encoder(nn.Module):
    """Images (batch, 3, H, W) -> L2-normalised embeddings (batch, embedding_dim), float32."""

    def __init__(self, backbone: str, embedding_dim: int) -> None:
        super().__init__()
        self.backbone = torchvision.models.get_model(backbone, weights=None)
        self.backbone.fc = nn.Linear(self.backbone.fc.in_features, embedding_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(images.device.type):
            images = images.float()  # the loader may give half types, which then fit no weights
        return F.normalize(self.backbone(images).float(), dim=1)

    def save(self, path: Path) -> None:
        """Write the weights atomically as safetensors."""
        with atomic(path) as file:
            file.write(save({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}))

    def load(self, path: Path) -> None:
        """Read weights that `save` wrote.

        Raises:
            UserError: if they are missing, damaged, or of another architecture.
        """
        try:
            self.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: no weights of this encoder ({reason}); train again") from None


def build(settings: Settings, *, seed: int) -> Encoder:
    """A fresh encoder: random by seed, or with backbone weights from torchvision or a file.

    Raises:
        UserError: if the weights cannot be had or do not fit the backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(settings.backbone, settings.embedding_dim)
    if settings.weights != "none":
        _load_backbone(encoder.backbone, settings)
    return encoder


def _load_backbone(backbone: nn.Module, settings: Settings) -> None:
    state = _imagenet(settings.backbone) if settings.weights == "imagenet" else _file(Path(settings.weights))
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}  # the projection takes its place
    own = {k: v for k, v in backbone.state_dict().items() if not k.startswith("fc.")}
    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape]
    wrong += [k for k in state if k not in own]
    if wrong:
        raise UserError(
            f"model.weights={settings.weights}: does not fit {settings.backbone}, {len(wrong)} tensors "
            f"differ, first {wrong[0]}; give a torchvision state dict of this backbone, or model.weights=none"
        )
    backbone.load_state_dict(state, strict=False)


def _imagenet(backbone: str) -> dict[str, torch.Tensor]:
    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights=imagenet: cannot download {weights.url} ({error}); fetch it elsewhere and pass "
            "model.weights=FILE.pth, or start from model.weights=none"
        ) from None


def _file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
        return dict(state.get("state_dict", state))
    except Exception as error:  # torch.load raises whatever the bytes provoke
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model.weights={path}: cannot be read ({reason}); expected none, imagenet, or a state dict "
            "(.pth, .safetensors)"
        ) from None


def place(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, its kernels channels-last: the layout that convolutions are fastest in."""
    module.to(device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that `train.precision` means on a device."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16
