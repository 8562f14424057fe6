"""The DALI graph, one for CPU and GPU: a pure function of encoded bytes and parameters.

    bytes ──► decode ──► JPEG artefacts ──► warp (2×3) ──► colour (3×4) ──► blur ──► normalise ──► cutout
                         (who drew them)    └─ CPU: one fused pass (pipeline.fused); GPU: DALI's kernels ─┘

No operator draws random numbers; every parameter comes in as a tensor from the host. What an image did not
draw costs it nothing: DALI's conditionals pass it by.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.backend import TensorListCPU, TensorListGPU
from nvidia.dali.pipeline import Pipeline, do_not_convert

from configs.fields import Dtype
from configs.loading import Augment
from pipeline import dlpack
from pipeline.augment import Parameters
from pipeline.fused import FusedPass

# One rank's images of a step, encoded (n,) or decoded (h, w, 3), and what `Plan.parameters` gives.
Inputs = tuple[Sequence[NDArray[np.uint8] | torch.Tensor], *Parameters]


def build(
    source: Callable[[], Inputs],
    *,
    batch: int,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    threads: int,
    prefetch: int,
    augmentation: Augment | None = None,
    decoded: bool = False,
    resident: bool = False,
    dtype: Dtype = "float32",
    channels_last: bool = False,
    gpu: int | None = None,
    one_pass: bool | None = None,
) -> Pipeline:
    """A built pipeline whose `run()` gives what `tensor` makes images (batch, 3, size, size) of.

    Args:
        source: called once a batch.
        mean, std: of pixels scaled to 0..1.
        augmentation: what the parameters were drawn by, and so which operators are needed; None is neither.
        decoded: the source gives RGB pixels (h, w, 3), nothing is decoded here. What it gives is not copied:
            all of it must stay as it is until its batch has come out.
        resident: the pixels lie on the device already.
        gpu: ordinal of the GPU, None for the CPU.
        one_pass: the fused pass instead of DALI's operators; as the device is, if not given.
    """
    one_pass = gpu is None if one_pass is None else one_pass
    drawn = augmentation or Augment(preset="none")
    occasional = {name for name in ("jpeg", "blur", "cutout") if getattr(drawn, name) * drawn.occasional}
    wanted = 3 if one_pass or occasional else 2
    mean255, std255 = 255 * np.array(mean, np.float32), 255 * np.array(std, np.float32)

    # DALI asks for images and for parameters apart, as they may lie on different devices.
    data: deque[Any] = deque()
    parameters: deque[Any] = deque()

    def part(waiting: deque[Any]) -> Callable[[], Any]:
        @do_not_convert  # type: ignore[untyped-decorator] # or conditionals rewrite all that the source calls
        def given() -> Any:
            if not waiting:
                encoded, *others = source()
                data.append(encoded)
                parameters.append(tuple(others[:wanted]))  # DALI warns of inputs that nothing reads
            return waiting.popleft()

        return given  # type: ignore[no-any-return]

    images_given, parameters_given = part(data), part(parameters)

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch,
        num_threads=threads,
        device_id=gpu,
        prefetch_queue_depth=prefetch,
        seed=0,
        enable_conditionals=bool(occasional),
    )
    def graph() -> Any:
        given = fn.external_source(
            images_given,
            device="gpu" if resident and gpu is not None else "cpu",
            batch=True,
            dtype=types.UINT8,
            ndim=3 if decoded else 1,
            layout="HWC" if decoded else "",
            # Copying pixels takes as long as decoding them would, in one thread that holds the interpreter.
            no_copy=decoded,
        )
        matrix, colour, *rest = fn.external_source(
            parameters_given,
            num_outputs=wanted,
            batch=True,
            dtype=types.FLOAT,
            ndim=[2, 2, 1][:wanted],
        )
        flaws = rest[0] if rest else None
        images = _pixels(given, decoded, resident, gpu)
        if "jpeg" in occasional:
            images = _saved_again(images, flaws)
        if one_pass:
            normal = types.Constant(np.stack([1 / std255, -mean255 / std255], axis=1))
            fused = FusedPass(size, dtype, channels_last=channels_last)
            return fused(images, matrix, colour, flaws, normal)
        images = fn.warp_affine(images, matrix=matrix, size=[size, size])
        images = fn.coord_transform(images, MT=colour, dtype=types.UINT8)
        if "blur" in occasional:
            images = _blurred(images, flaws)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT16 if dtype == "float16" else types.FLOAT,
            output_layout="HWC" if channels_last else "CHW",
            mean=mean255.tolist(),
            std=std255.tolist(),
        )
        return _cut(images, flaws) if "cutout" in occasional else images

    pipeline: Pipeline = graph()
    pipeline.build()
    return pipeline


def tensor(
    images: TensorListCPU | TensorListGPU, dtype: Dtype = "float32", *, channels_last: bool = False
) -> torch.Tensor:
    """A pipeline's images as (batch, 3, size, size) of the type and memory order that it was built for.

    A view that owns DALI's memory for as long as it lives; only bfloat16 from DALI's own operators, which do
    not have it, is a copy.
    """
    given = dlpack.shared(images.as_tensor())
    wanted: torch.dtype = getattr(torch, dtype)
    # The fused pass hands out a half type's bits as integers.
    given = given.view(wanted) if given.dtype == torch.int16 else given.to(wanted)
    return given.permute(0, 3, 1, 2) if channels_last else given


def _pixels(given: Any, decoded: bool, resident: bool, gpu: int | None) -> Any:
    """RGB (h, w, 3) on the device."""
    if decoded:
        return given if resident or gpu is None else given.gpu()
    # The hardware decoder rounds differently and takes a varying part of a batch: off, for exact reruns.
    decoder = {"device": "cpu"} if gpu is None else {"device": "mixed", "hw_decoder_load": 0.0}
    return fn.decoders.image(given, output_type=types.RGB, jpeg_fancy_upsampling=True, **decoder)


# DALI rewrites these: each `if` on a tensor splits the batch, and joins it again.
def _saved_again(images: Any, flaws: Any) -> Any:
    quality = fn.cast(flaws[0], dtype=types.INT32)
    if quality > 0:
        images = fn.jpeg_compression_distortion(images, quality=quality)
    return images


def _blurred(images: Any, flaws: Any) -> Any:
    sigma = flaws[1]
    if sigma > 0:
        images = fn.gaussian_blur(images, sigma=sigma)
    return images


def _cut(images: Any, flaws: Any) -> Any:
    left, top, right, bottom = flaws[2], flaws[3], flaws[4], flaws[5]
    if right > left:
        anchor, shape = fn.stack(top, left), fn.stack(bottom - top, right - left)
        images = fn.erase(images, anchor=anchor, shape=shape, axis_names="HW", fill_value=0.0)
    return images
