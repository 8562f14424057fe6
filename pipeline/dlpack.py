"""DALI's memory as torch's, without a copy."""

import torch
import torch.utils.dlpack
from nvidia.dali.backend import TensorCPU, TensorGPU

LEGACY_DEFAULT_STREAM = 1
"""What DLPack calls CUDA's stream 0."""


def shared(given: TensorCPU | TensorGPU) -> torch.Tensor:
    """A view of DALI's tensor that owns its memory; on a GPU the current stream waits until it is made.

    torch would call `__dlpack__` itself, but has pybind11 compare enums on the way, and that takes whatever
    is raised meanwhile for "no such attribute": a Ctrl-C of that moment was lost.
    """
    if isinstance(given, TensorGPU):
        stream = torch.cuda.current_stream(given.device_id()).cuda_stream
        return torch.utils.dlpack.from_dlpack(given.__dlpack__(stream=stream or LEGACY_DEFAULT_STREAM))
    return torch.utils.dlpack.from_dlpack(given.__dlpack__())
