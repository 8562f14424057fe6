"""Images -> calibrated probabilities, a verdict, the nearest known lesions; by a run folder alone.

    from eval.predict import Predictor

    for prediction in Predictor("runs/isic2020").predict(["photographs/", "more/*.jpg"]):
        print(prediction.image, prediction.verdict, prediction.probabilities)

Encoding, graph and encoder are training's own: a packed image gets the embedding that `moleprint embed` gave
it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import Pipeline
from tqdm import tqdm

from configs.errors import UserError
from configs.fields import Dtype
from configs.load import load
from configs.packing import Encode
from eval.inputs import Image, Listing, listing
from eval.metrics import decide
from eval.neighbours import Known
from eval.network import Network
from pipeline import augment, graph
from shards.encode import Encoded, encode
from train import classifier
from train.embed import BATCH
from train.embed import encode as embed
from train.embeddings import read_embeddings
from train.metadata import Metadata
from train.runfolder import load_encoder

if TYPE_CHECKING:
    from eval.heatmap import HeatMaps

NEAREST = 3
"""Known lesions named with each prediction."""
ID_COLUMNS = ("isic_id", "image_id", "image_name", "id")
"""What tables of dermoscopy images call an id, besides the columns that the run was packed with."""


@dataclass(frozen=True)
class Neighbour:
    """A training image that lies near."""

    key: str
    label: str
    split: str
    distance: float
    """Euclidean distance of unit vectors, 0..2."""


@dataclass(frozen=True)
class Prediction:
    """What a run says of one image; without an embedding where `error` says why."""

    image: str
    """Its path, id, or name in an archive."""
    error: str = ""
    """Why there is no verdict; empty otherwise."""
    probabilities: dict[str, float] | None = None
    """Of each class, calibrated."""
    verdict: str = ""
    """The positive class where its probability reaches the threshold, else the likeliest other."""
    nearest: tuple[Neighbour, ...] = ()
    """Known lesions, nearest first."""
    distance: float | None = None
    """To the training set, as `eval.neighbours` says."""
    out_of_distribution: bool | None = None
    """Whether it lies farther from the training set than the run's limit: then the verdict is a guess."""
    embedding: NDArray[np.float32] | None = None
    """(dim,) unit vector."""
    heatmap: Path | None = None
    """Picture of what drove the verdict, where it was asked for."""


@dataclass(frozen=True)
class _Ready:
    """An image on its way: encoded as packing would have, or with the reason why it cannot be used."""

    image: Image
    encoded: Encoded | None
    error: str = ""


class Predictor:
    """The encoder and classifier of a run folder, ready to be asked."""

    def __init__(self, run: Path | str, *, device: torch.device | str | None = None) -> None:
        """
        Args:
            run: folder of a finished run: encoder, embeddings and classifier are read, nothing is written.
            device: a GPU if there is one, if not given.

        Raises:
            UserError: naming what is missing, or does not belong together.
        """
        self.run = Path(run)
        default = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.device = torch.device(device) if device is not None else default
        self.encoder, self.about = load_encoder(self.run, self.device)
        self.classifier = classifier.load(self.run)
        if self.classifier.made_from["encoder_sha256"] != self.about["encoder_sha256"]:
            raise UserError(
                f"{self.run}: its classifier was made for another encoder; run `moleprint embed` and "
                "`moleprint classify` again"
            )
        self.classes, self.threshold = self.classifier.classes, self.classifier.threshold
        train, val = (read_embeddings(self.run, split) for split in ("train", "val"))
        self.known = Known(train, val, self.device)
        # Decoded in full first, and strictly: one image that the graph cannot decode would end it.
        self._encoding = Encode(**{**self.about["encoding"], "check": "decode"})
        self._loader = self.about.get("made_from", {}).get("loader", {})
        self._pipeline: Pipeline | None = None
        self._feed: list[Encoded] = []

    def predict(
        self,
        images: Sequence[Path | str] | Path | str | Listing,
        *,
        heatmaps: Path | None = None,
        progress: bool = False,
    ) -> Iterator[Prediction]:
        """A prediction for every image, in order, as they are ready; memory does not grow with their number.

        Args:
            images: what `eval.inputs.listing` takes, or gives.
            heatmaps: folder for a heat map of each image (`eval.heatmap`).

        Raises:
            UserError: for a table or a glob that means no images, or where heat maps cannot be had. An image
                that cannot be used is none: its prediction says why.
        """
        if isinstance(images, Path | str):
            images = [images]
        wanted = images if isinstance(images, Listing) else listing(images, id_columns=self.id_columns)
        return self._predict(wanted, self._heat_maps(heatmaps) if heatmaps else None, progress)

    @property
    def remarks(self) -> list[str]:
        """What must be known of all its predictions: lines to print."""
        names = ", ".join(field.name for field in self.classifier.verdict.inputs.fields)
        takes = f"the classifier takes {names} too, from tables and shards; of other images they are unknown"
        return [line for line in (names and takes, str(self.about.get("notice", ""))) if line]

    @property
    def id_columns(self) -> tuple[str, ...]:
        """Columns that may hold an image's id in a table, those of the run's own tables first."""
        config = self.run / "config.yaml"
        sources = load(config, of_run=True).pack.each_source.values() if config.exists() else ()
        return tuple(dict.fromkeys([*(source.id_column for source in sources), *ID_COLUMNS]))

    def encode(self, data: bytes, *, name: str = "") -> Encoded:
        """An image's bytes as packing would have written them.

        Raises:
            UserError: the reason why it cannot be used.
        """
        return encode(data, self._encoding, name=name)

    def embed(self, encoded: Sequence[Encoded]) -> NDArray[np.float32]:
        """Embeddings (n, dim) of at most BATCH images, as `moleprint embed` makes and keeps them."""
        images = self.pixels(encoded)
        with torch.inference_mode():
            vectors = embed(self.encoder, images, symmetries=self.classifier.symmetries)
        kept = np.float16 if self.classifier.half else np.float32
        return vectors[: len(encoded)].cpu().numpy().astype(kept).astype(np.float32)

    def pixels(self, encoded: Sequence[Encoded]) -> torch.Tensor:
        """What the encoder sees of at most BATCH images: (BATCH, 3, size, size), the last one repeated."""
        self._feed = [encoded[min(slot, len(encoded) - 1)] for slot in range(BATCH)]
        self._pipeline = self._pipeline or self._build()
        (batch,) = self._pipeline.run()
        dtype, channels_last = self._layout
        return graph.tensor(batch, dtype, channels_last=channels_last)

    @property
    def _layout(self) -> tuple[Dtype, bool]:
        return self._loader.get("dtype", "float32"), self._loader.get("channels_last", False)

    def _build(self) -> Pipeline:
        dtype, channels_last = self._layout
        return graph.build(
            self._inputs,
            batch=BATCH,
            **self.about["preprocessing"],
            threads=torch.get_num_threads(),
            prefetch=1,
            dtype=dtype,
            channels_last=channels_last,
            gpu=self.device.index if self.device.type == "cuda" else None,
        )

    def _inputs(self) -> graph.Inputs:
        sizes = np.array([(image.width, image.height) for image in self._feed])
        plan = augment.identity(BATCH)
        data = [np.frombuffer(image.jpeg, np.uint8) for image in self._feed]
        return data, *plan.parameters(sizes[:, 0], sizes[:, 1], self.about["preprocessing"]["size"])

    @property
    def network(self) -> Network:
        """Encoder, classifier and calibration as one module."""
        return Network(self.encoder, self.classifier)

    def _heat_maps(self, folder: Path) -> "HeatMaps":
        from eval.heatmap import HeatMaps

        return HeatMaps(self.network.to(self.device).eval(), folder=folder, **self.about["preprocessing"])

    def _predict(self, wanted: Listing, heat_maps: "HeatMaps | None", progress: bool) -> Iterator[Prediction]:
        with tqdm(total=wanted.count, desc="predict", unit="image", disable=not progress) as bar:
            for batch in self._batches(wanted.images):
                yield from self._judge(batch, heat_maps)
                bar.update(len(batch))

    def _batches(self, images: Iterable[Image]) -> Iterator[list[_Ready]]:
        """Encoded as packing would have, a few batches ahead of the encoder."""
        batch: list[_Ready] = []
        with ThreadPoolExecutor(torch.get_num_threads(), "moleprint-predict") as pool:
            ahead: deque[Future[_Ready]] = deque()
            try:
                for image in images:
                    ahead.append(pool.submit(self._prepare, image))
                    if len(ahead) > 2 * BATCH:
                        batch.append(ahead.popleft().result())
                    if len(batch) == BATCH:
                        yield batch
                        batch = []
                for future in ahead:
                    batch.append(future.result())
                    if len(batch) == BATCH:
                        yield batch
                        batch = []
            finally:  # of a caller who stops early, too
                for future in ahead:
                    future.cancel()
        if batch:
            yield batch

    def _prepare(self, image: Image) -> _Ready:
        try:
            return _Ready(image, self.encode(image.read(), name=image.file_name))
        except UserError as error:
            return _Ready(image, None, str(error))

    def _judge(self, batch: list[_Ready], heat_maps: "HeatMaps | None") -> list[Prediction]:
        """The predictions of a batch, in order."""
        sound = [(ready.image, ready.encoded) for ready in batch if ready.encoded is not None]
        if not sound:
            return [Prediction(ready.image.name, ready.error) for ready in batch]
        images, encoded = zip(*sound, strict=True)
        vectors, metadata = self.embed(encoded), _columns(images)
        probabilities = self.classifier.probabilities(vectors, metadata)
        called = decide(probabilities, self.classifier.positive, self.threshold)
        rows, distances = self.known.nearest(vectors, max(NEAREST, self.known.rank))
        pictures: list[Path | None] = [None] * len(vectors)
        if heat_maps:
            seen = self.pixels(encoded)[: len(sound)].float()
            extra = self.classifier.verdict.inputs.encode(metadata, len(sound))
            pictures = [*heat_maps.write(seen, called, extra, [image.name for image in images])]
        predictions, slot = [], 0
        for ready in batch:
            if ready.encoded is None:
                predictions.append(Prediction(ready.image.name, ready.error))
                continue
            away = float(distances[slot, self.known.rank - 1])
            predictions.append(
                Prediction(
                    ready.image.name,
                    probabilities=dict(zip(self.classes, probabilities[slot].tolist(), strict=True)),
                    verdict=self.classes[called[slot]],
                    nearest=self._neighbours(rows[slot, :NEAREST], distances[slot, :NEAREST]),
                    distance=away,
                    out_of_distribution=away > self.known.limit,
                    embedding=vectors[slot],
                    heatmap=pictures[slot],
                )
            )
            slot += 1
        return predictions

    def _neighbours(self, rows: NDArray[np.int64], distances: NDArray[np.float64]) -> tuple[Neighbour, ...]:
        train = self.known.train
        return tuple(
            Neighbour(train.keys[row], self.classes[train.labels[row]], "train", distance)
            for row, distance in zip(rows.tolist(), distances.tolist(), strict=True)
        )


def _columns(images: Sequence[Image]) -> Metadata:
    """What tables and shards say of images, column by column; a blank is null."""
    names = dict.fromkeys(name for image in images for name in image.metadata)
    return {
        name: pa.chunked_array(
            [pa.array([image.metadata.get(name) or None for image in images], pa.string())]
        )
        for name in names
    }
