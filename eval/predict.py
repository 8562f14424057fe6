"""Image files -> probabilities, by a run folder alone: encoding, graph and encoder are training's own."""

import csv
import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configs.errors import UserError
from configs.packing import Encode as Settings
from eval.metrics import decide
from pipeline import augment, graph
from shards.encode import Encoded, encode
from shards.files import write_text, writing
from shards.images import SUFFIXES
from train import classifier
from train.embed import encode as encode_images
from train.runfolder import load_encoder

BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one file."""

    file: Path
    probabilities: dict[str, float]
    """Of each class, temperature-scaled."""
    called: str
    """The positive class where its probability reaches the threshold, else the likeliest other."""


def predict(run: Path, images: Sequence[Path], *, progress: bool = True) -> list[Prediction]:
    """Classify image files, and those in folders, in the order given.

    Raises:
        UserError: naming what is missing, or every file that is not a usable image.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    encoder, about = load_encoder(run, device)
    verdict = classifier.load(run)
    if verdict.made_from["encoder_sha256"] != about["encoder_sha256"]:
        raise UserError(
            f"{run}: its classifier was made for another encoder; run `moleprint embed` and "
            "`moleprint classify` again"
        )
    files = _files(images)
    encoded = _encode(files, Settings(**about["encoding"]))
    vectors = np.empty((len(files), about["embedding_dim"]), np.float32)
    feed = _Feed(encoded, about["preprocessing"]["size"])
    pipeline = graph.build(
        feed,
        batch=BATCH,
        **about["preprocessing"],
        threads=torch.get_num_threads(),
        prefetch=1,
        gpu=device.index,
    )
    for start in tqdm(range(0, len(files), BATCH), desc="predict", unit="batch", disable=not progress):
        (batch,) = pipeline.run()
        with torch.inference_mode():
            out = encode_images(encoder, graph.tensor(batch), symmetries=verdict.symmetries).cpu().numpy()
        vectors[start : start + BATCH] = out[: len(files) - start]
    probabilities = verdict.probabilities(vectors)
    called = decide(probabilities, verdict.positive, verdict.threshold)
    return [
        Prediction(file, dict(zip(verdict.classes, map(float, row), strict=True)), verdict.classes[call])
        for file, row, call in zip(files, probabilities, called, strict=True)
    ]


def check_output(output: Path | None) -> None:
    """Refuse a file that `write` could not write, before time is spent on predictions for it.

    Raises:
        UserError: if something that is no file has its name, or nothing can be written where it would lie.
    """
    if output is None:
        return
    with writing(output):
        if output.exists() and not output.is_file():
            raise UserError(f"{output}: is there already and is not a file; name a CSV file to write")
        folder = next(parent for parent in output.parents if parent.exists())
        tempfile.TemporaryFile(dir=folder).close()  # tried: rights alone mean nothing to root


def write(predictions: Sequence[Prediction], output: Path | None) -> None:
    """CSV of file, called class and probabilities: to a file, or printed."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "called", *predictions[0].probabilities])
    for p in predictions:
        rows.writerow([p.file, p.called, *(f"{value:.6f}" for value in p.probabilities.values())])
    if output:
        write_text(output, text.getvalue())
    else:
        sys.stdout.write(text.getvalue())


def _files(given: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        else:
            files.append(path)
    if not files:
        raise UserError(
            f"{', '.join(map(str, given))}: no images here; endings looked for: {', '.join(SUFFIXES)}"
        )
    return files


def _encode(files: Sequence[Path], encoding: Settings) -> list[Encoded]:
    """Every file as packing would have written it."""
    encoded, wrong = [], []
    for file in files:
        try:
            data = file.read_bytes()
            encoded.append(encode(data, encoding, name=file.name))
        except (OSError, UserError) as error:
            wrong.append(f"{file}: {getattr(error, 'strerror', None) or error}")
    if wrong:
        raise UserError("\n".join(wrong))
    return encoded


class _Feed:
    """Batches of encoded images for the graph, the last one filled up with its last image."""

    def __init__(self, encoded: Sequence[Encoded], size: int) -> None:
        self._encoded, self._size, self._done = encoded, size, 0

    def __call__(self) -> graph.Inputs:
        chosen = [self._encoded[min(self._done + i, len(self._encoded) - 1)] for i in range(BATCH)]
        self._done += BATCH
        plan = augment.identity(BATCH)
        sizes = np.array([(image.width, image.height) for image in chosen])
        data = [np.frombuffer(image.jpeg, np.uint8) for image in chosen]
        return data, *plan.parameters(sizes[:, 0], sizes[:, 1], self._size)
