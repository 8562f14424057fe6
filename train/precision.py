"""TensorFloat-32: faster float32 products on a GPU, with 10 bits of mantissa, where that many are enough."""

import contextlib
from collections.abc import Iterator

import torch


def allow_tf32(allowed: bool) -> None:
    """Whether convolutions and matrix products of float32 may take it, in this process; only GPUs can."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """All 24 bits for a block: TensorFloat-32 would put 0.03 on the distance of near embeddings."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
