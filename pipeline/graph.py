"""The DALI graph, one for CPU and GPU: a pure function of encoded bytes and parameters.

    bytes ──► decode ──► warp (2×3) ──► colour (3×4) ──► normalise, CHW ──► images
                └─ CPU: one fused pass (pipeline.fused); GPU: DALI's kernels

No operator draws random numbers; every parameter comes in as a tensor from the host.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipeline.fused import FusedPass

# One rank's inputs of a step: encoded bytes, matrices (2, 3), colours (3, 4).
Inputs = tuple[list[NDArray[np.uint8]], NDArray[np.float32], NDArray[np.float32]]


def build(
    source: Callable[[], Inputs],
    *,
    batch: int,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    threads: int,
    prefetch: int,
    gpu: int | None = None,
    one_pass: bool | None = None,
) -> Pipeline:
    """A built pipeline whose `run()` gives images (batch, 3, size, size) float32.

    Args:
        source: called once a batch.
        mean, std: of pixels scaled to 0..1.
        gpu: ordinal of the GPU, None for the CPU.
        one_pass: the fused pass instead of DALI's operators; as the device is, if not given.
    """
    one_pass = gpu is None if one_pass is None else one_pass
    mean255, std255 = 255 * np.array(mean, np.float32), 255 * np.array(std, np.float32)

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=prefetch, seed=0
    )
    def graph() -> Any:
        encoded, matrix, colour = fn.external_source(
            source, num_outputs=3, batch=True, dtype=[types.UINT8, types.FLOAT, types.FLOAT], ndim=[1, 2, 2]
        )
        # The hardware decoder rounds differently and takes a varying part of a batch: off, for exact reruns.
        decoder = {"device": "cpu"} if gpu is None else {"device": "mixed", "hw_decoder_load": 0.0}
        images = fn.decoders.image(encoded, output_type=types.RGB, jpeg_fancy_upsampling=True, **decoder)
        if one_pass:
            normal = types.Constant(np.stack([1 / std255, -mean255 / std255], axis=1))
            return FusedPass(size)(images, matrix, colour, normal)
        images = fn.warp_affine(images, matrix=matrix, size=[size, size])
        images = fn.coord_transform(images, MT=colour, dtype=types.UINT8)
        return fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", mean=mean255.tolist(), std=std255.tolist()
        )

    pipeline: Pipeline = graph()
    pipeline.build()
    return pipeline
