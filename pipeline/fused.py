"""Warp, colour, clamp, normalise and HWC -> CHW in one pass over the pixels, compiled by numba.

On a CPU the separate operators cost several times what decoding does, because each reads and writes the
whole image; here a pixel is sampled, multiplied and stored while it is in a register. The compiled kernel is
cached beside this file, so only the first run on a machine waits for it.
"""

from typing import Any

import numba
import numpy as np
from numba import types as nb
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from nvidia.dali import types
from nvidia.dali.plugin.numba import NumbaFunction


@numba.njit(cache=True, fastmath=True, boundscheck=False)  # type: ignore[untyped-decorator]
def warp_colour_normalise(
    out: NDArray[np.float32],
    image: NDArray[np.uint8],
    matrix: NDArray[np.float32],
    colour: NDArray[np.float32],
    normal: NDArray[np.float32],
) -> None:
    """Fill `out` (3, H, W) from `image` (h, w, 3).

    Args:
        out: written in place.
        image: RGB.
        matrix: (2, 3), output position -> source position, pixel centres at +0.5; bilinear, edges repeated.
        colour: (3, 4), RGB in 0..255 -> RGB, then clamped to 0..255.
        normal: (3, 2), scale and offset of each channel, applied last.
    """
    height, width = image.shape[0], image.shape[1]
    right, bottom = np.float32(width - 1), np.float32(height - 1)
    zero, half, full = np.float32(0), np.float32(0.5), np.float32(255)
    a, b, c = matrix[0, 0], matrix[0, 1], matrix[0, 2] - half
    d, e, f = matrix[1, 0], matrix[1, 1], matrix[1, 2] - half
    m00, m01, m02, m03 = colour[0, 0], colour[0, 1], colour[0, 2], colour[0, 3]
    m10, m11, m12, m13 = colour[1, 0], colour[1, 1], colour[1, 2], colour[1, 3]
    m20, m21, m22, m23 = colour[2, 0], colour[2, 1], colour[2, 2], colour[2, 3]
    s0, s1, s2 = normal[0, 0], normal[1, 0], normal[2, 0]
    o0, o1, o2 = normal[0, 1], normal[1, 1], normal[2, 1]
    for y in range(out.shape[1]):
        fy = np.float32(y) + half
        for x in range(out.shape[2]):
            fx = np.float32(x) + half
            sx = min(max(a * fx + b * fy + c, zero), right)
            sy = min(max(d * fx + e * fy + f, zero), bottom)
            x0, y0 = np.int32(sx), np.int32(sy)
            x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
            wx, wy = sx - np.float32(x0), sy - np.float32(y0)
            w11 = wx * wy
            w10, w01 = wy - w11, wx - w11
            w00 = np.float32(1) - wx - wy + w11
            r = w00 * image[y0, x0, 0] + w01 * image[y0, x1, 0]
            r += w10 * image[y1, x0, 0] + w11 * image[y1, x1, 0]
            g = w00 * image[y0, x0, 1] + w01 * image[y0, x1, 1]
            g += w10 * image[y1, x0, 1] + w11 * image[y1, x1, 1]
            v = w00 * image[y0, x0, 2] + w01 * image[y0, x1, 2]
            v += w10 * image[y1, x0, 2] + w11 * image[y1, x1, 2]
            out[0, y, x] = min(max(m00 * r + m01 * g + m02 * v + m03, zero), full) * s0 + o0
            out[1, y, x] = min(max(m10 * r + m11 * g + m12 * v + m13, zero), full) * s1 + o1
            out[2, y, x] = min(max(m20 * r + m21 * g + m22 * v + m23, zero), full) * s2 + o2


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing_context: Any, address: Any) -> Any:
    """A 64-bit address as a pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return nb.voidptr(address), generate


# DALI hands over arrays of addresses: of each tensor's data and of each tensor's shape.
_RUN = nb.void(*[nb.uint64, nb.uint64, nb.uint64, nb.int32] * 2)
_SETUP = nb.void(nb.uint64, nb.uint64, nb.int32, nb.uint64, nb.uint64, nb.int32, nb.int32)


@numba.cfunc(_RUN, cache=True)
def _run(outs, out_shapes, _out_ndims, _n_out, ins, in_shapes, _in_ndims, _n_in):  # type: ignore[no-untyped-def]
    out, out_shape = (
        numba.carray(_pointer(outs), 1, np.uint64),
        numba.carray(_pointer(out_shapes), 1, np.uint64),
    )
    data, in_shape = (
        numba.carray(_pointer(ins), 4, np.uint64),
        numba.carray(_pointer(in_shapes), 4, np.uint64),
    )
    _, height, width = numba.carray(_pointer(out_shape[0]), 3, np.int64)
    source_height, source_width, _ = numba.carray(_pointer(in_shape[0]), 3, np.int64)
    warp_colour_normalise(
        numba.carray(_pointer(out[0]), (3, height, width), np.float32),
        numba.carray(_pointer(data[0]), (source_height, source_width, 3), np.uint8),
        numba.carray(_pointer(data[1]), (2, 3), np.float32),
        numba.carray(_pointer(data[2]), (3, 4), np.float32),
        numba.carray(_pointer(data[3]), (3, 2), np.float32),
    )


def _setup(size: int) -> Any:
    @numba.cfunc(_SETUP, cache=True)
    def setup(out_shapes, _out_ndims, _n_out, _in_shapes, _in_ndims, _n_in, samples):  # type: ignore[no-untyped-def]
        for address in numba.carray(_pointer(out_shapes), samples, np.uint64):
            shape = numba.carray(_pointer(address), 3, np.int64)
            shape[0], shape[1], shape[2] = 3, size, size

    return setup


class FusedPass(NumbaFunction):  # type: ignore[misc]
    """DALI's numba operator with the functions above, which are compiled once a machine.

    The operator compiles its own wrapping of a Python function anew in every process and pipeline, four
    seconds each time; here it is handed the addresses of functions that numba has cached on disk.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        super().__init__(
            run_fn=_run,
            setup_fn=_setup,
            in_types=[types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT],
            ins_ndim=[3, 2, 2, 2],
            out_types=[types.FLOAT],
            outs_ndim=[3],
        )

    def _get_run_fn_cpu(self, run_fn: Any, *_: Any) -> int:
        return int(run_fn.address)

    def _get_setup_fn_cpu(self, setup_fn: Any) -> int:
        self._setup_function = setup_fn(self._size)  # kept alive as long as the operator
        return int(self._setup_function.address)
