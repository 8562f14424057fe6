"""A batch too large for the device's memory, in micro-batches, with the gradient of the whole.

GradCache, Gao 2021, arXiv 2101.06983: mining and losses need the features of the whole batch, but not what
they were computed from. So a first forward pass keeps the features alone; once their gradient is known, each
micro-batch goes forward again, and backward.

    forward      images ─► features        no activations kept
    backward     images ─► features ─► their gradient ─► the weights' gradient, summed over the micro-batches
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def in_micro_batches(
    run: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, images: torch.Tensor, count: int
) -> torch.Tensor:
    """`run(images)`, some at a time: (batch, …) -> (batch, dim).

    The second pass drops out the same and counts no batch statistics again; these are a micro-batch's. To
    autograd it is one operation, so that DDP reduces every gradient once, after the last micro-batch.

    Args:
        run: from images to features, through `module`, whose parameters alone it may train.
        count: images of a micro-batch, a divisor of the batch.
    """
    learning = [p for p in module.parameters() if p.requires_grad]
    features: torch.Tensor = _GradCache.apply(run, module, images, count, *learning)  # type: ignore[no-untyped-call]
    return features


class _GradCache(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        run: Callable[[torch.Tensor], torch.Tensor],
        module: nn.Module,
        images: torch.Tensor,
        count: int,
        *learning: torch.Tensor,
    ) -> torch.Tensor:
        features, context.random = [], []
        for piece in torch.split(images, count):
            context.random.append(_random_state(images.device))
            features.append(run(piece))
        context.run, context.module, context.images, context.count = run, module, images, count
        context.learning = learning
        return torch.cat(features)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, count = context.images, context.count
        pieces = zip(
            torch.split(images, count), torch.split(gradients[0], count), context.random, strict=True
        )
        sums: list[torch.Tensor] = []
        with torch.random.fork_rng(devices=_gpus(images.device)), _counted_already(context.module):
            for piece, gradient, random in pieces:
                _set_random_state(images.device, random)
                with torch.enable_grad():
                    features = context.run(piece)
                found = torch.autograd.grad(features, context.learning, gradient)
                if sums:
                    torch._foreach_add_(sums, found)
                else:
                    sums = [g.clone() for g in found]
        return None, None, None, None, *sums


def _gpus(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in _gpus(device))]


def _set_random_state(device: torch.device, state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    for gpu, of_gpu in zip(_gpus(device), state[1:], strict=True):
        torch.cuda.set_rng_state(of_gpu, gpu)


@contextlib.contextmanager
def _counted_already(module: nn.Module) -> Iterator[None]:
    """Batch norms that use a batch's statistics without keeping them."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    before = [count.clone() for count in counts]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, value in zip(counts, before, strict=True):
            count.copy_(value)
