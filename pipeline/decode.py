"""Encoded bytes to pixels, by the decoder of the graph, and who cannot be decoded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from pipeline import dlpack
from pipeline.reading import Bytes


class UndecodableError(Exception):
    """Some of the images cannot be decoded."""

    def __init__(self, positions: list[int]) -> None:
        """Args: positions: of these among the images given."""
        super().__init__(f"images at {positions} cannot be decoded")
        self.positions = positions


class Decoder:
    """JPEG bytes -> RGB pixels (h, w, 3), equal to the graph's on the same device to the byte."""

    def __init__(self, batch: int, threads: int, gpu: int | None = None) -> None:
        self._batch, self._threads, self._gpu = batch, threads, gpu
        self._given: Sequence[Bytes] = ()
        self._pipeline: Pipeline | None = None

    def __call__(self, data: Sequence[Bytes]) -> list[torch.Tensor]:
        """Pixels of each image, at most `batch` of them, on the device; views of one memory.

        Raises:
            UndecodableError: naming all that cannot be decoded.
        """
        self._given = data
        self._pipeline = self._pipeline or self._build()
        try:
            (images,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # whatever state the error left it in
            raise UndecodableError(undecodable(data, self._gpu)) from None
        finally:
            self._given = ()
        return [dlpack.shared(images[slot]) for slot in range(len(data))]

    def close(self) -> None:
        """End DALI's threads."""
        self._pipeline = None

    def _build(self) -> Pipeline:
        return _pipeline(lambda: list(self._given), self._batch, self._threads, self._gpu)


def undecodable(data: Sequence[Bytes], gpu: int | None = None) -> list[int]:
    """Positions of the images that DALI cannot decode, found by decoding one at a time: not for every day.

    Raises:
        RuntimeError: if it can decode none, such as after a CUDA error: then no image is to blame.
    """
    sound = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    one: list[Bytes] = [np.frombuffer(sound, np.uint8)]
    _pipeline(lambda: list(one), 1, 1, gpu).run()
    pipeline, found = None, []
    for position, image in enumerate(data):
        one[:] = [image]
        pipeline = pipeline or _pipeline(lambda: list(one), 1, 1, gpu)
        try:
            pipeline.run()
        except RuntimeError:
            found.append(position)
            pipeline = None  # whatever state the error left it in
    return found


def _pipeline(source: Any, batch: int, threads: int, gpu: int | None) -> Pipeline:
    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=1
    )
    def decode() -> Any:
        encoded = fn.external_source(source, batch=True, dtype=types.UINT8, ndim=1)
        decoder = {"device": "cpu"} if gpu is None else {"device": "mixed", "hw_decoder_load": 0.0}
        return fn.decoders.image(encoded, output_type=types.RGB, jpeg_fancy_upsampling=True, **decoder)

    pipeline: Pipeline = decode()
    pipeline.build()
    return pipeline
