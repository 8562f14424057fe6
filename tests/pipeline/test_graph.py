"""The DALI graph against a loop over pixels, PIL, and DALI's own operators."""

import ctypes
import importlib.util
import io
import mmap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
import pytest
import torch
from numba.core import caching
from PIL import Image

from configs.loading import Augment
from pipeline import augment, fused, graph
from pipeline.fused import warp_colour_normalise

SIZE = 32
SHAPES = [(32, 32), (64, 64), (48, 70), (81, 50), (32, 40)]  # height, width
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth RGB image (height, width, 3), uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray) -> np.ndarray:
    """JPEG bytes, (n,) uint8."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return np.frombuffer(file.getvalue(), np.uint8)


def decoded(data: np.ndarray) -> np.ndarray:
    """What PIL makes of the bytes: (h, w, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))


JPEGS = [encoded(picture(*shape, seed)) for seed, shape in enumerate(SHAPES)]
HEIGHTS, WIDTHS = np.array(SHAPES).T
STRONG = Augment(
    rotation=180, scale=(0.6, 1.6), shift=0.1, brightness=0.3, contrast=0.3, saturation=0.4, hue=25
)
FLAWED = STRONG.model_copy(update={"jpeg": 60, "blur": 2, "cutout": 0.5, "occasional": 0.6})


def run(
    plan: augment.Plan, jpegs: list[np.ndarray], *, size: int = SIZE, decode: bool = True, **options: Any
) -> torch.Tensor:
    """What the graph makes of images: (batch, 3, size, size), normalised."""
    shapes = np.array([decoded(data).shape for data in jpegs])
    given = jpegs if decode else [decoded(data) for data in jpegs]
    inputs = given, *plan.parameters(shapes[:, 1], shapes[:, 0], size)
    layout = {name: options[name] for name in ("dtype", "channels_last") if name in options}
    pipeline = graph.build(
        lambda: inputs,
        batch=len(jpegs),
        size=size,
        mean=MEAN,
        std=STD,
        threads=1,
        prefetch=1,
        decoded=not decode,
        **options,
    )
    (images,) = pipeline.run()
    return graph.tensor(images, **layout).clone()


def grey_levels(plan: augment.Plan, jpegs: list[np.ndarray], **options: Any) -> np.ndarray:
    """Images (batch, 3, size, size) out of the graph, as grey levels 0..255."""
    mean, std = np.array(MEAN)[:, None, None], np.array(STD)[:, None, None]
    levels: np.ndarray = (run(plan, jpegs, **options).double().numpy() * std + mean) * 255
    return levels


def slow(image: np.ndarray, matrix: np.ndarray, colour: np.ndarray, size: int) -> np.ndarray:
    """(3, size, size) grey levels, a pixel at a time: bilinear with repeated edges, colour, clamp."""
    height, width, _ = image.shape
    out = np.empty((3, size, size))
    for y in range(size):
        for x in range(size):
            sx, sy = matrix.astype(float) @ [x + 0.5, y + 0.5, 1] - 0.5
            sx, sy = np.clip(sx, 0, width - 1), np.clip(sy, 0, height - 1)
            x0, y0 = int(sx), int(sy)
            x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
            top = image[y0, x0] * (1 - (sx - x0)) + image[y0, x1] * (sx - x0)
            bottom = image[y1, x0] * (1 - (sx - x0)) + image[y1, x1] * (sx - x0)
            rgb = top * (1 - (sy - y0)) + bottom * (sy - y0)
            out[:, y, x] = np.clip(colour[:, :3].astype(float) @ rgb + colour[:, 3], 0, 255)
    return out


@pytest.mark.parametrize("step", range(3))
def test_the_fused_pass_equals_a_loop_over_pixels(step: int) -> None:
    plan = augment.draw(STRONG, len(JPEGS), seed=0, epoch=0, step=step)
    images = grey_levels(plan, JPEGS, one_pass=True)
    matrices = plan.matrices(WIDTHS, HEIGHTS, SIZE)
    for i, data in enumerate(JPEGS):
        expected = slow(decoded(data), matrices[i], plan.colour[i], SIZE)
        np.testing.assert_allclose(images[i], expected, atol=0.05)


@pytest.fixture
def fenced() -> Iterator[np.ndarray]:
    """A page of memory, and on both sides of it a page that ends the process if read."""
    pages = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    memory = np.frombuffer(pages, np.uint8)
    fences = [memory.ctypes.data, memory.ctypes.data + 2 * mmap.PAGESIZE]
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for fence in fences:
        assert not protect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0), ctypes.get_errno()
    yield memory[mmap.PAGESIZE : 2 * mmap.PAGESIZE]
    for fence in fences:
        protect(ctypes.c_void_p(fence), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (2, 3), (3, 2), (7, 11)])
def test_the_fused_pass_reads_nothing_beside_the_image(shape: tuple[int, int], fenced: np.ndarray) -> None:
    """It fetches pixels by eight bytes, which are more than two pixels."""
    size = 3 * shape[0] * shape[1]
    plan = augment.draw(STRONG, 4, seed=5, epoch=0, step=0)
    matrices = plan.matrices(np.full(4, shape[1]), np.full(4, shape[0]), SIZE)
    for place in (slice(0, size), slice(len(fenced) - size, len(fenced))):
        image = fenced[place].reshape(*shape, 3)
        image[:] = np.random.default_rng(0).integers(0, 256, image.shape)
        for matrix, colour in zip(matrices, plan.colour, strict=True):
            out = np.empty((3, SIZE, SIZE), np.float32)
            warp_colour_normalise(out, image, matrix, colour, np.array([[1, 0]] * 3, np.float32))
            np.testing.assert_allclose(out, slow(image, matrix, colour, SIZE), atol=0.05)


def test_kernels_are_compiled_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Package and home may both be read-only: then numba refuses to cache."""
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [caching.UserProvidedCacheLocator])
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    spec = importlib.util.spec_from_file_location("fused_again", fused.__file__)
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    folder = Path(numba.config.CACHE_DIR)
    assert folder.is_dir() and folder.name.startswith("moleprint-numba-")


def test_the_fused_pass_equals_dalis_operators() -> None:
    for step in range(4):
        plan = augment.draw(STRONG, len(JPEGS), seed=1, epoch=0, step=step)
        fused, separate = grey_levels(plan, JPEGS, one_pass=True), grey_levels(plan, JPEGS, one_pass=False)
        difference = np.abs(fused - separate).mean((1, 2, 3))
        assert difference.max() < 1, difference  # the operators round to whole grey levels twice
        assert np.ptp(fused, axis=0).mean() > 20  # the pictures do differ


@pytest.mark.parametrize("one_pass", [True, False])
def test_identity_is_the_central_square_as_pil_decodes_it(one_pass: bool) -> None:
    square = [data for data, shape in zip(JPEGS, SHAPES, strict=True) if min(shape) == SIZE]
    images = grey_levels(augment.identity(len(square)), square, one_pass=one_pass)
    assert len(square) == 2
    for image, data in zip(images, square, strict=True):
        pixels = decoded(data)
        left = (pixels.shape[1] - SIZE) // 2
        np.testing.assert_allclose(image.transpose(1, 2, 0), pixels[:, left : left + SIZE], atol=1e-3)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("flawed", [False, True])
def test_decoded_images_give_the_same_batch_to_the_byte(one_pass: bool, flawed: bool) -> None:
    settings = FLAWED if flawed else STRONG
    plan = augment.draw(settings, len(JPEGS), seed=3, epoch=0, step=0)
    options: dict[str, Any] = {"one_pass": one_pass, "augmentation": settings}
    assert torch.equal(run(plan, JPEGS, decode=False, **options), run(plan, JPEGS, **options))


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_and_memory_orders_hold_the_same_pixels(
    one_pass: bool, channels_last: bool, dtype: Literal["float32", "float16", "bfloat16"]
) -> None:
    plan = augment.draw(FLAWED, len(JPEGS), seed=2, epoch=0, step=0)
    options: dict[str, Any] = {"one_pass": one_pass, "augmentation": FLAWED}
    plain = run(plan, JPEGS, **options)
    images = run(plan, JPEGS, **options, dtype=dtype, channels_last=channels_last)
    order = torch.channels_last if channels_last else torch.contiguous_format
    assert images.dtype == getattr(torch, dtype) and images.is_contiguous(memory_format=order)
    # The compiler may order a sum otherwise, so that one rounding in thousands falls to the other side.
    step = torch.finfo(images.dtype).eps * plain.abs().clamp(min=1)
    assert ((images.float() - plain).abs() <= step).all()
    assert (images == plain.to(images.dtype)).float().mean() > 0.999


def test_images_are_a_view_of_what_dali_made() -> None:
    inputs = JPEGS[:1], *augment.identity(1).parameters(WIDTHS[:1], HEIGHTS[:1], SIZE)
    for dtype in ("float32", "float16", "bfloat16"):
        pipeline = graph.build(
            lambda: inputs,
            batch=1,
            size=SIZE,
            mean=MEAN,
            std=STD,
            threads=1,
            prefetch=1,
            dtype=dtype,
            channels_last=True,
        )
        (images,) = pipeline.run()
        assert graph.tensor(images, dtype, channels_last=True).data_ptr() == images.as_tensor().data_ptr()


def test_a_grey_jpeg_becomes_rgb() -> None:
    data = encoded(picture(SIZE, SIZE, 9)[..., 0])
    (image,) = grey_levels(augment.identity(1), [data], one_pass=True)
    np.testing.assert_allclose(image.transpose(1, 2, 0), decoded(data), atol=1e-3)


def test_symmetries_are_those_of_the_square() -> None:
    off = Augment(rotation=0, scale=(1, 1), shift=0, brightness=0, contrast=0, saturation=0, hue=0)
    plan = augment.draw(off, 64, seed=0, epoch=0, step=0)
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    squares = [np.rot90(side, turns) for side in (image, np.fliplr(image)) for turns in range(4)]
    grey_levels = np.array([[1, 0]] * 3, np.float32)
    met = set()
    for matrix, colour in zip(plan.matrices(*[np.full(64, SIZE)] * 2, SIZE), plan.colour, strict=True):
        out = np.empty((3, SIZE, SIZE), np.float32)
        warp_colour_normalise(out, image, matrix, colour, grey_levels)
        np.testing.assert_allclose(out, out.round(), atol=0.01)
        (which,) = [
            i for i, square in enumerate(squares) if np.array_equal(out.round(), square.transpose(2, 0, 1))
        ]
        met.add(which)
    assert met == set(range(8))


def test_the_image_far_outside_repeats_its_edge() -> None:
    plan = replace(augment.identity(1), shift=np.array([[9.0, 0]], np.float32))
    for one_pass in (True, False):
        (image,) = grey_levels(plan, JPEGS[:1], one_pass=one_pass)
        edge = decoded(JPEGS[0])[:, -1].T[:, :, None]
        np.testing.assert_allclose(image, np.broadcast_to(edge, image.shape), atol=1e-2)
