"""The DALI graph against a loop over pixels, PIL, and DALI's own operators."""

import io

import numpy as np
import pytest
from PIL import Image

from configs.schema import Augment
from pipeline import augment, graph
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


def run(plan: augment.Plan, jpegs: list[np.ndarray], *, one_pass: bool, size: int = SIZE) -> np.ndarray:
    """Images (batch, 3, size, size) out of the graph, as grey levels 0..255."""
    shapes = np.array([decoded(data).shape for data in jpegs])
    matrices = plan.matrices(shapes[:, 1], shapes[:, 0], size)
    pipeline = graph.build(
        lambda: (jpegs, matrices, np.ascontiguousarray(plan.colour)),
        batch=len(jpegs),
        size=size,
        mean=MEAN,
        std=STD,
        threads=1,
        prefetch=1,
        one_pass=one_pass,
    )
    (images,) = pipeline.run()
    mean, std = np.array(MEAN)[:, None, None], np.array(STD)[:, None, None]
    return (np.asarray(images.as_tensor()) * std + mean) * 255


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
    images = run(plan, JPEGS, one_pass=True)
    matrices = plan.matrices(WIDTHS, HEIGHTS, SIZE)
    for i, data in enumerate(JPEGS):
        expected = slow(decoded(data), matrices[i], plan.colour[i], SIZE)
        np.testing.assert_allclose(images[i], expected, atol=0.05)


def test_the_fused_pass_equals_dalis_operators() -> None:
    for step in range(4):
        plan = augment.draw(STRONG, len(JPEGS), seed=1, epoch=0, step=step)
        fused, separate = run(plan, JPEGS, one_pass=True), run(plan, JPEGS, one_pass=False)
        difference = np.abs(fused - separate).mean((1, 2, 3))
        assert difference.max() < 1, difference  # the operators round to whole grey levels twice
        assert np.ptp(fused, axis=0).mean() > 20  # the pictures do differ


@pytest.mark.parametrize("one_pass", [True, False])
def test_identity_is_the_central_square_as_pil_decodes_it(one_pass: bool) -> None:
    square = [data for data, shape in zip(JPEGS, SHAPES, strict=True) if min(shape) == SIZE]
    images = run(augment.identity(len(square)), square, one_pass=one_pass)
    assert len(square) == 2
    for image, data in zip(images, square, strict=True):
        pixels = decoded(data)
        left = (pixels.shape[1] - SIZE) // 2
        np.testing.assert_allclose(image.transpose(1, 2, 0), pixels[:, left : left + SIZE], atol=1e-3)


def test_a_grey_jpeg_becomes_rgb() -> None:
    data = encoded(picture(SIZE, SIZE, 9)[..., 0])
    (image,) = run(augment.identity(1), [data], one_pass=True)
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
    plan = augment.Plan(
        augment.identity(1).linear, np.array([[9.0, 0]], np.float32), augment.identity(1).colour
    )
    for one_pass in (True, False):
        (image,) = run(plan, JPEGS[:1], one_pass=one_pass)
        edge = decoded(JPEGS[0])[:, -1].T[:, :, None]
        np.testing.assert_allclose(image, np.broadcast_to(edge, image.shape), atol=1e-2)
