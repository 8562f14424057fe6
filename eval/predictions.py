"""Predictions as CSV or JSON lines: written as they come, and under a file's name only when all are there."""

import contextlib
import csv
import io
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from configs.errors import UserError
from eval.neighbours import RULE
from eval.predict import NEAREST, Prediction
from shards.files import atomic, writing

Format = Literal["csv", "jsonl"]


@dataclass
class Outcome:
    """What became of the images that were asked for."""

    images: int = 0
    failed: int = 0
    strange: int = 0
    """Out of distribution."""

    def said(self) -> list[str]:
        """Lines to print."""
        lines = []
        if self.failed:
            lines.append(f"{self.failed:,} of {self.images:,} images have no verdict: `error` says why")
        if self.strange:
            lines.append(f"{self.strange:,} of {self.images:,} images are out of distribution: {RULE}")
        return lines


def format_of(output: Path | None, asked: Format | None = None) -> Format:
    """What was asked for, else what the output's ending says, else CSV."""
    if asked:
        return asked
    return "jsonl" if output and output.suffix.lower() in (".jsonl", ".ndjson", ".json") else "csv"


def check_output(output: Path | None) -> None:
    """Refuse a file that `write` could not write, before time is spent on predictions for it.

    Raises:
        UserError: if something that is no file has its name, or nothing can be written where it would lie.
    """
    if output is None:
        return
    with writing(output):
        if output.exists() and not output.is_file():
            raise UserError(f"{output}: is there already and is not a file; name a file to write")
        folder = next(parent for parent in output.parents if parent.exists())
        tempfile.TemporaryFile(dir=folder).close()  # tried: rights alone mean nothing to root


def write(
    predictions: Iterable[Prediction],
    classes: Sequence[str],
    output: Path | None,
    kind: Format,
    *,
    threshold: float,
    limit: float,
) -> Outcome:
    """Write predictions to a file, or to standard output as they come.

    Args:
        threshold: of the positive class, repeated in every line: a verdict means nothing without it.
        limit: distance beyond which an image is out of distribution, likewise.

    Raises:
        UserError: if the file cannot be written; then there is none, nor is the one before it changed.
    """
    outcome = Outcome()
    with _open(output) as file:
        if kind == "csv":
            file.write(_csv_line(_header(classes)))
        for prediction in predictions:
            row = (
                _csv_line(_cells(prediction, classes, threshold, limit))
                if kind == "csv"
                else _json_line(prediction, threshold, limit)
            )
            # A file's name may hold bytes that are no text.
            file.write(row.encode(errors="backslashreplace").decode())
            outcome.images += 1
            outcome.failed += bool(prediction.error)
            outcome.strange += bool(prediction.out_of_distribution)
    return outcome


@contextlib.contextmanager
def _open(output: Path | None) -> Iterator[IO[str]]:
    if output is None:
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read has seen enough
            raise
        except OSError as error:
            raise UserError(
                f"standard output: cannot be written ({error.strerror}); make room there"
            ) from error
        return
    with atomic(output) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        yield text
        text.flush()
        text.detach()


def _header(classes: Sequence[str]) -> list[str]:
    nearest = [f"nearest.{n}.{what}" for n in range(1, NEAREST + 1) for what in ("key", "label", "distance")]
    probabilities = [f"probability.{name}" for name in classes]
    return [
        *("image", "verdict", "threshold", *probabilities),
        *("out_of_distribution", "distance", "distance_limit", *nearest, "heatmap", "error"),
    ]


def _cells(prediction: Prediction, classes: Sequence[str], threshold: float, limit: float) -> list[str]:
    if prediction.probabilities is None:
        empty = [""] * (len(_header(classes)) - 2)
        return [prediction.image, *empty, prediction.error]
    nearest = [[n.key, n.label, f"{n.distance:.6f}"] for n in prediction.nearest]
    nearest += [["", "", ""]] * (NEAREST - len(nearest))
    return [
        *(prediction.image, prediction.verdict, f"{threshold:.6f}"),
        *(f"{prediction.probabilities[name]:.6f}" for name in classes),
        "yes" if prediction.out_of_distribution else "no",
        *(f"{prediction.distance:.6f}", f"{limit:.6f}"),
        *(cell for cells in nearest for cell in cells),
        *(str(prediction.heatmap or ""), ""),
    ]


def _csv_line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _json_line(prediction: Prediction, threshold: float, limit: float) -> str:
    said: dict[str, Any] = {"image": prediction.image}
    if prediction.error:
        said["error"] = prediction.error
    else:
        said |= {
            "verdict": prediction.verdict,
            "threshold": threshold,
            "probabilities": prediction.probabilities,
            "out_of_distribution": prediction.out_of_distribution,
            "distance": prediction.distance,
            "distance_limit": limit,
            "nearest": [vars(neighbour) for neighbour in prediction.nearest],
        }
        if prediction.heatmap:
            said["heatmap"] = str(prediction.heatmap)
    return json.dumps(said, ensure_ascii=False) + "\n"
