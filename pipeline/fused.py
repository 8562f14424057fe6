"""Warp, colour, clamp, normalise, layout and type in one pass over the pixels, compiled by numba.

On a CPU the separate operators cost several times what decoding does, because each reads and writes the
whole image; here a pixel is sampled, multiplied and stored while it is in a register. Blur and cutout follow
at once for the images that drew them, before the next image is begun. The compiled kernels are cached beside
this file, or in the user's cache, so only the first run on a machine waits for them.
"""

import atexit
import math
import shutil
import tempfile
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types as nb
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction

from configs.fields import Dtype

# Neither numba nor DALI's operator for it has half types on a CPU: an integer type says whose bits they are.
STORED: dict[Dtype, type[np.generic]] = {"float32": np.float32, "float16": np.uint16, "bfloat16": np.int16}


def _may_cache() -> None: ...


try:
    numba.njit(cache=True)(_may_cache)
except RuntimeError:  # neither can be written, as in some containers: each process compiles for itself
    numba.config.CACHE_DIR = tempfile.mkdtemp(prefix="moleprint-numba-")
    atexit.register(shutil.rmtree, numba.config.CACHE_DIR, ignore_errors=True)


@intrinsic  # type: ignore[untyped-decorator]
def _stored(typing_context: Any, value: Any, out: Any) -> Any:
    """A float32 as `out`, an array of a type in `STORED`, holds it: the nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, short, word = arguments[0], ir.IntType(16), ir.IntType(32)
        if out.dtype == nb.float32:
            return number
        if out.dtype == nb.uint16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), short)
        bits = builder.bitcast(number, word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(builder.add(bits, word(0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, word(16)), short)

    return out.dtype(nb.float32, out), generate


@intrinsic  # type: ignore[untyped-decorator]
def _eight(typing_context: Any, image: Any, first: Any) -> Any:
    """Eight bytes of an image from byte `first` on, as one number: the lowest is the first."""
    assert image.layout == "C", "bytes are counted in memory order"

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(builder.bitcast(array.data, cgutils.voidptr_t), [arguments[1]])
        number = builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()))
        number.align = 1
        return number

    return nb.uint64(image, first), generate


@numba.njit(cache=True, fastmath=True, boundscheck=False)  # type: ignore[untyped-decorator]
def warp_colour_normalise(
    out: NDArray[Any],
    image: NDArray[np.uint8],
    matrix: NDArray[np.float32],
    colour: NDArray[np.float32],
    normal: NDArray[np.float32],
) -> None:
    """Fill `out` (3, H, W) from `image` (h, w, 3).

    A row at a time, in loops that each do one thing, so that all but the one that fetches pixels become
    vector instructions: six times as fast as one loop that does everything.

    Args:
        out: written in place, in any memory layout, of a type in `STORED`.
        image: RGB, fewer than 2**31 bytes.
        matrix: (2, 3), output position -> source position, pixel centres at +0.5; bilinear, edges repeated.
        colour: (3, 4), RGB in 0..255 -> RGB, then clamped to 0..255.
        normal: (3, 2), scale and offset of each channel, applied last.
    """
    if image.shape[0] < 2 or image.shape[1] < 2:  # four neighbours are read, whatever their weights
        image = _repeated(image)
    height, width = image.shape[0], image.shape[1]
    columns = out.shape[2]
    spot = np.empty(columns, np.int32)
    wx, wy = np.empty(columns, np.float32), np.empty(columns, np.float32)
    upper, lower = np.empty(columns, np.uint64), np.empty(columns, np.uint64)
    r, g, b = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.float32)
    for y in range(out.shape[1]):
        _aim(spot, wx, wy, matrix, np.float32(y) + np.float32(0.5), width, height)
        for x in range(columns):
            first = np.int64(spot[x])
            upper[x] = _eight(image, first)
            # From two bytes before: the last pixel's eight would end beyond the image.
            lower[x] = _eight(image, first + 3 * width - 2) >> 16
        _blend(r, g, b, upper, lower, wx, wy)
        for channel in range(3):
            _finish(out[channel, y], r, g, b, colour[channel], normal[channel])


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _repeated(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image of a single row or column, made two of it."""
    height, width = image.shape[0], image.shape[1]
    wider = np.empty((max(height, 2), max(width, 2), 3), np.uint8)
    for y in range(wider.shape[0]):
        for x in range(wider.shape[1]):
            wider[y, x] = image[min(y, height - 1), min(x, width - 1)]
    return wider


# The parts of a row. Numbers are kept to 32 bits by hand: numba widens them, and LLVM then halves vectors.
@numba.njit(cache=True, fastmath=True, boundscheck=False)  # type: ignore[untyped-decorator]
def _aim(
    spot: NDArray[np.int32],
    wx: NDArray[np.float32],
    wy: NDArray[np.float32],
    matrix: NDArray[np.float32],
    fy: np.float32,
    width: int,
    height: int,
) -> None:
    """Where each pixel of a row looks: first byte of the upper left neighbour, weights of the others."""
    zero, half = np.float32(0), np.float32(0.5)
    right, bottom = np.float32(width - 1), np.float32(height - 1)
    last_x, last_y, stride = np.int32(width - 2), np.int32(height - 2), np.int32(3 * width)
    a, c = matrix[0, 0], matrix[0, 1] * fy + matrix[0, 2] - half
    d, f = matrix[1, 0], matrix[1, 1] * fy + matrix[1, 2] - half
    for x in range(len(spot)):
        fx = np.float32(np.int32(x)) + half
        sx = min(max(a * fx + c, zero), right)
        sy = min(max(d * fx + f, zero), bottom)
        x0, y0 = min(np.int32(sx), last_x), min(np.int32(sy), last_y)
        wx[x], wy[x] = sx - np.float32(x0), sy - np.float32(y0)
        spot[x] = np.int32(y0 * stride + np.int32(3) * x0)


@numba.njit(cache=True, fastmath=True, boundscheck=False)  # type: ignore[untyped-decorator]
def _blend(
    r: NDArray[np.float32],
    g: NDArray[np.float32],
    b: NDArray[np.float32],
    upper: NDArray[np.uint64],
    lower: NDArray[np.uint64],
    wx: NDArray[np.float32],
    wy: NDArray[np.float32],
) -> None:
    """Bilinear mean of four neighbours, of which each number holds two: R, G, B, R, G, B from its low end."""
    for x in range(len(r)):
        w11 = wx[x] * wy[x]
        w10, w01 = wy[x] - w11, wx[x] - w11
        w00 = np.float32(1) - wx[x] - wy[x] + w11
        p, q = upper[x], lower[x]
        r[x] = w00 * _byte(p) + w01 * _byte(p >> 24) + w10 * _byte(q) + w11 * _byte(q >> 24)
        g[x] = w00 * _byte(p >> 8) + w01 * _byte(p >> 32) + w10 * _byte(q >> 8) + w11 * _byte(q >> 32)
        b[x] = w00 * _byte(p >> 16) + w01 * _byte(p >> 40) + w10 * _byte(q >> 16) + w11 * _byte(q >> 40)


@numba.njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _byte(number: np.uint64) -> np.float32:
    return np.float32(np.int32(number & 255))


@numba.njit(cache=True, fastmath=True, boundscheck=False)  # type: ignore[untyped-decorator]
def _finish(
    out: NDArray[Any],
    r: NDArray[np.float32],
    g: NDArray[np.float32],
    b: NDArray[np.float32],
    colour: NDArray[np.float32],
    normal: NDArray[np.float32],
) -> None:
    """One channel of a row: colour, clamped, normalised."""
    zero, full = np.float32(0), np.float32(255)
    m0, m1, m2, m3, scale, offset = colour[0], colour[1], colour[2], colour[3], normal[0], normal[1]
    for x in range(len(out)):
        value = min(max(m0 * r[x] + m1 * g[x] + m2 * b[x] + m3, zero), full)
        out[x] = _stored(value * scale + offset, out)


@numba.njit(cache=True, fastmath=True, boundscheck=False)  # type: ignore[untyped-decorator]
def blur(out: NDArray[Any], sharp: NDArray[np.float32], sigma: float) -> None:
    """Fill `out` (3, H, W) with `sharp` (3, H, W) under a Gaussian; edges mirrored, not repeated.

    Args:
        sigma: pixels, above 0; the kernel ends at 3 sigma, before the image's side.
    """
    height, width = sharp.shape[1], sharp.shape[2]
    radius = math.ceil(3 * sigma)
    taps = 2 * radius + 1
    # Plain loops: array expressions take numba seconds to compile.
    weights = np.empty(taps, np.float32)
    total = 0.0
    for k in range(taps):
        total += math.exp(-0.5 * ((k - radius) / sigma) ** 2)
    for k in range(taps):
        weights[k] = math.exp(-0.5 * ((k - radius) / sigma) ** 2) / total
    padded = np.empty(width + 2 * radius, np.float32)
    across = np.empty((height, width), np.float32)
    row = np.empty(width, np.float32)
    for channel in range(3):
        for y in range(height):
            for x in range(width + 2 * radius):
                source = abs(x - radius)
                padded[x] = sharp[channel, y, min(source, 2 * (width - 1) - source)]
            for x in range(width):
                across[y, x] = 0
            for k in range(taps):
                for x in range(width):
                    across[y, x] += weights[k] * padded[x + k]
        for y in range(height):
            for x in range(width):
                row[x] = 0
            for k in range(taps):
                source = abs(y + k - radius)
                source = min(source, 2 * (height - 1) - source)
                for x in range(width):
                    row[x] += weights[k] * across[source, x]
            for x in range(width):
                out[channel, y, x] = _stored(row[x], out)


@numba.njit(cache=True, boundscheck=False)  # type: ignore[untyped-decorator]
def augment(
    out: NDArray[Any],
    image: NDArray[np.uint8],
    matrix: NDArray[np.float32],
    colour: NDArray[np.float32],
    flaws: NDArray[np.float32],
    normal: NDArray[np.float32],
) -> None:
    """`warp_colour_normalise`, then blur and cutout as `flaws` (6,) says (`Plan.parameters`)."""
    sigma = flaws[1]
    if sigma > 0:
        sharp = np.empty(out.shape, np.float32)
        warp_colour_normalise(sharp, image, matrix, colour, normal)
        blur(out, sharp, sigma)
    else:
        warp_colour_normalise(out, image, matrix, colour, normal)
    left, top, right, bottom = int(flaws[2]), int(flaws[3]), int(flaws[4]), int(flaws[5])
    for channel in range(3):
        for y in range(top, bottom):
            for x in range(left, right):
                out[channel, y, x] = 0  # zero is all bits zero in every type


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:
    """A 64-bit address as a pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return nb.voidptr(address), generate


# DALI hands over arrays of addresses: of each tensor's data and of each tensor's shape.
_RUN = nb.void(*[nb.uint64, nb.uint64, nb.uint64, nb.int32] * 2)
_SETUP = nb.void(nb.uint64, nb.uint64, nb.int32, nb.uint64, nb.uint64, nb.int32, nb.int32)


@numba.njit(cache=True)
def _augment_into(out, ins, in_shapes):  # type: ignore[no-untyped-def]
    data = numba.carray(_pointer(ins), 5, np.uint64)
    shapes = numba.carray(_pointer(in_shapes), 5, np.uint64)
    shape = numba.carray(_pointer(shapes[0]), 3, np.int64)
    augment(
        out,
        numba.carray(_pointer(data[0]), (shape[0], shape[1], 3), np.uint8),
        numba.carray(_pointer(data[1]), (2, 3), np.float32),
        numba.carray(_pointer(data[2]), (3, 4), np.float32),
        numba.carray(_pointer(data[3]), 6, np.float32),
        numba.carray(_pointer(data[4]), (3, 2), np.float32),
    )


# What numba caches of an inner function is kept apart by the plain values that it closes over.
def kernel(dtype: Dtype, *, channels_last: bool) -> Any:
    """The function that DALI calls for each image, compiled the first time on a machine: some seconds."""
    stored = STORED[dtype]

    @numba.cfunc(_RUN, cache=True)
    def run(outs, out_shapes, _out_ndims, _n_out, ins, in_shapes, _in_ndims, _n_in):  # type: ignore[no-untyped-def]
        address = numba.carray(_pointer(outs), 1, np.uint64)[0]
        shape = numba.carray(_pointer(numba.carray(_pointer(out_shapes), 1, np.uint64)[0]), 3, np.int64)
        out = numba.carray(_pointer(address), (shape[0], shape[1], shape[2]), stored)
        if channels_last:
            _augment_into(out.transpose(2, 0, 1), ins, in_shapes)
        else:
            _augment_into(out, ins, in_shapes)

    return run


def _setup(first: int, second: int, third: int) -> Any:
    @numba.cfunc(_SETUP, cache=True)
    def setup(out_shapes, _out_ndims, _n_out, _in_shapes, _in_ndims, _n_in, samples):  # type: ignore[no-untyped-def]
        for address in numba.carray(_pointer(out_shapes), samples, np.uint64):
            shape = numba.carray(_pointer(address), 3, np.int64)
            shape[0], shape[1], shape[2] = first, second, third

    return setup


class FusedPass(NumbaFunction):  # type: ignore[misc]
    """DALI's numba operator with the functions above, which are compiled once a machine.

    The operator compiles its own wrapping of a Python function anew in every process and pipeline, four
    seconds each time; here it is handed the addresses of functions that numba has cached on disk.
    """

    def __init__(self, size: int, dtype: Dtype, *, channels_last: bool) -> None:
        shape = (size, size, 3) if channels_last else (3, size, size)
        self._functions = (
            kernel(dtype, channels_last=channels_last),
            _setup(*shape),
        )  # kept alive as long as the operator
        super().__init__(
            run_fn=self._functions[0],
            setup_fn=self._functions[1],
            in_types=[types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT, types.FLOAT],
            ins_ndim=[3, 2, 2, 1, 2],
            out_types=[types.FLOAT if dtype == "float32" else types.INT16],
            outs_ndim=[3],
        )

    def _get_run_fn_cpu(self, run_fn: Any, *_: Any) -> int:
        return int(run_fn.address)

    def _get_setup_fn_cpu(self, setup_fn: Any) -> int:
        return int(setup_fn.address)
