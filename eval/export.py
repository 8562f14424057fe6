"""A run's encoder, preprocessing, classifier and calibration as one bundle that loads without moleprint.

    bundle/  model.onnx | model.pt2 | model.safetensors     pixels -> probabilities, embeddings
             bundle.json    classes, threshold, how images are prepared, checks, sums
             prepare.py     an image file -> pixels, by NumPy, Pillow and simplejpeg
             predict.py     image files -> probabilities, an example that runs as it is
             README.md

ONNX and safetensors hold no code. A .pt2 holds none either as it is written here, but PyTorch's reader would
run what a forged one holds: moleprint reads back only the one that it has just written.
"""

import importlib
import io
import json
import logging
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
import numpy as np
import safetensors.torch
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from configs.load import load
from eval.inputs import listing
from eval.network import Whole
from eval.predict import Predictor
from shards.encode import Encoded
from shards.files import replacing, sha256, write_json, write_text
from shards.shardset import MANIFEST
from train.embed import BATCH

Format = Literal["onnx", "torch-export", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)
FILES: dict[Format, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "safetensors": "model.safetensors",
}
ABOUT = "bundle.json"
VERSION = 1
CHECKED = 16
"""Images of each kind that a bundle is checked on."""
TOLERANCE = 1e-3
"""Largest difference in a probability that passes: rounding stays far below."""
OF_FILES = 2e-2
"""The same of real files, whose colour profile may be read by a shade otherwise."""
KINDS = {
    "random": "{} random images",
    "files": "{} random files, read by the bundle's own prepare.py",
    "real": "{} real images",
    "real_files": "{} real files, read by prepare.py",
}
DRAWN = ("RGB", "turned", "CMYK", "deep", "clear", "L")
"""Kinds of the random files: JPEGs in colour, on their side, for print, grey; PNGs deep and transparent."""
TEMPLATES = Path(__file__).parent / "bundle"

Pixels = NDArray[np.uint8]
Run = Callable[[Pixels], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Pixels (n, height, width, 3) -> probabilities (n, classes), embeddings (n, dim)."""


@dataclass(frozen=True)
class Difference:
    """The largest differences between a bundle and the run it was made from."""

    images: int
    probability: float
    embedding: float
    """Of any of an embedding's numbers."""


@dataclass(frozen=True)
class _Checked:
    """An image to check a bundle on."""

    data: bytes
    """As its file holds it."""
    encoded: Encoded
    """As packing would have."""


def export(run: Path, kind: Format, output: Path, *, images: Sequence[str] = ()) -> dict[str, Difference]:
    """Write a bundle, checked against the run on random images and real ones.

    Args:
        images: real images to check on, as for `moleprint predict`; those of the run's shard set, where it
            is at hand, if not given.

    Returns:
        `random` and, where there are any, `real` (the same pixels given to both), and of each the files,
        `files` and `real_files` (prepared by the bundle itself) -> difference.

    Raises:
        UserError: if the run is not finished, a package is missing, the output holds something else, or the
            bundle does not give what the run gives.
    """
    _check_packages(kind)
    _check_output(output)
    # The bundle's numbers are a CPU's, so that the check does not depend on this machine's GPU.
    predictor = Predictor(run, device="cpu")
    _refuse_metadata(predictor)
    random, real = _random(predictor), _real(predictor, images)
    whole = Whole(predictor.network, **predictor.about["preprocessing"]).eval()
    with replacing(output) as folder:
        about = _about(predictor, kind)
        WRITERS[kind](whole, folder / FILES[kind], about)
        _write_scripts(folder, kind, about)
        write_json(folder / ABOUT, about)
        with _scripts(folder) as (load, prepare):
            run_bundle = load(folder)
            found = {}
            for name, files, checked in (("random", "files", random), ("real", "real_files", real)):
                if checked:
                    found[name] = _difference(predictor, run_bundle, checked, _decoded)
                    found[files] = _difference(predictor, run_bundle, checked, lambda one: prepare(one.data))
            _refuse_difference(found, kind)
        about["checks"] = {name: vars(difference) for name, difference in found.items()}
        about["sha256"] = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != ABOUT}
        write_json(folder / ABOUT, about)
    return found


def said(found: dict[str, Difference]) -> str:
    """The differences in a line."""
    parts = [
        f"{d.probability:.1e} in probability, {d.embedding:.1e} in embedding ({KINDS[kind].format(d.images)})"
        for kind, d in found.items()
    ]
    return f"largest difference from the run: {'; '.join(parts)}"


def _check_packages(kind: Format) -> None:
    missing = []
    for name in {"onnx": ("onnx", "onnxruntime", "onnxscript")}.get(kind, ()):
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(
            f"--format {kind} needs {', '.join(missing)}: pip install 'moleprint[export]', or choose another "
            f"of {', '.join(FORMATS)}"
        )


def _refuse_metadata(predictor: Predictor) -> None:
    names = [field.name for field in predictor.classifier.verdict.inputs.fields]
    if names:
        raise UserError(
            f"{predictor.run}: its classifier takes {', '.join(names)} beside the image, and a bundle takes "
            "images alone; classify again with classifier.metadata=[], in another run.folder"
        )


def _check_output(output: Path) -> None:
    if output.exists() and not (output / ABOUT).is_file():
        if output.is_dir() and not any(output.iterdir()):
            return
        raise UserError(f"{output}: is there already and is no bundle; name another folder with --output")


def _about(predictor: Predictor, kind: Format) -> dict[str, Any]:
    """What a user of the bundle must know."""
    about, judged = predictor.about, predictor.classifier
    return {
        "format": "moleprint bundle",
        "version": VERSION,
        "model": FILES[kind],
        "input": {"pixels": "uint8 (n, height, width, 3), RGB, as prepare.py makes them"},
        "output": {
            "probabilities": "float32 (n, classes), calibrated",
            "embeddings": "float32 (n, dim), of length 1",
        },
        "classes": judged.classes,
        "positive": judged.classes[judged.positive],
        "threshold": judged.threshold,
        "rule": "the positive class where its probability reaches the threshold, else the likeliest other",
        "encoding": about["encoding"],
        "preprocessing": about["preprocessing"],
        "symmetries": judged.symmetries,
        "half": judged.half,
        "classifier": judged.name,
        "backbone": about["backbone"],
        "embedding_dim": about["embedding_dim"],
        "temperature": judged.temperature,
        "encoder_sha256": about["encoder_sha256"],
        "classifier_sha256": judged.sha256,
        "shards_sha256": about["shards_sha256"],
        "notice": about.get("notice", ""),
    }


def _write_scripts(folder: Path, kind: Format, about: dict[str, Any]) -> None:
    shutil.copyfile(TEMPLATES / "prepare.py", folder / "prepare.py")
    shutil.copyfile(TEMPLATES / f"predict_{kind.replace('-', '_')}.py", folder / "predict.py")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    write_text(folder / "README.md", environment.get_template("README.md").render(about, kind=kind))


def _write_onnx(whole: Whole, path: Path, about: dict[str, Any]) -> None:
    with _quiet():
        program = torch.onnx.export(
            whole,
            (_example(),),
            dynamic_shapes={"pixels": _dynamic()},
            input_names=["pixels"],
            output_names=["probabilities", "embeddings"],
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.metadata_props.add(key="moleprint", value=json.dumps(about))
    path.write_bytes(model.SerializeToString())


def _write_torch(whole: Whole, path: Path, about: dict[str, Any]) -> None:
    with _quiet():
        program = torch.export.export(whole, (_example(),), dynamic_shapes={"pixels": _dynamic()})
        torch.export.save(program, path, extra_files={"moleprint.json": json.dumps(about)})


def _write_safetensors(whole: Whole, path: Path, about: dict[str, Any]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in whole.network.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors, metadata={"moleprint": json.dumps(about)}))


WRITERS: dict[Format, Callable[[Whole, Path, dict[str, Any]], None]] = {
    "onnx": _write_onnx,
    "torch-export": _write_torch,
    "safetensors": _write_safetensors,
}


def _example() -> torch.Tensor:
    """Pixels to trace the network with; two sides, lest they be taken for one."""
    return torch.zeros(2, 90, 120, 3, dtype=torch.uint8)


def _dynamic() -> dict[int, Any]:
    names = ("n", "height", "width")
    return {axis: torch.export.Dim(name, min=1) for axis, name in enumerate(names)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporters from telling of their own affairs."""
    logger = logging.getLogger("torch.onnx._internal.exporter._schemas")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _scripts(folder: Path) -> Iterator[tuple[Callable[[Path], Run], Callable[[bytes], Pixels]]]:
    """`load` and `pixels` of the bundle's own scripts, the very files that its user will run."""
    sys.path.insert(0, str(folder))
    try:
        with _quiet():
            script = runpy.run_path(str(folder / "predict.py"), run_name="bundle")
            yield script["load"], sys.modules["prepare"].pixels
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("prepare", None)
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def _decoded(one: "_Checked") -> Pixels:
    return np.asarray(simplejpeg.decode_jpeg(one.encoded.jpeg))[None]


def _random(predictor: Predictor) -> list[_Checked]:
    """Noise of all sizes and shapes; the same each time."""
    draw = np.random.default_rng(0)
    drawn = []
    for number in range(CHECKED):
        height, width = draw.integers(32, 400, 2)
        coarse = draw.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
        pixels = np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1)[:height, :width])
        data = _file(pixels, DRAWN[number % len(DRAWN)])
        drawn.append(_Checked(data, predictor.encode(data)))
    return drawn


def _file(pixels: Pixels, kind: str) -> bytes:
    """Pixels (height, width, 3) as a file of one of the kinds DRAWN."""
    image, file, exif = Image.fromarray(pixels), io.BytesIO(), Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6  # EXIF's orientation
    if kind == "deep":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    elif kind == "clear":
        image.putalpha(image.getchannel(0))
    elif kind in ("CMYK", "L"):
        image = image.convert(kind)
    image.save(file, "PNG" if kind in ("deep", "clear") else "JPEG", quality=95, exif=exif)
    return file.getvalue()


def _real(predictor: Predictor, images: Sequence[str]) -> list[_Checked]:
    """The first of the images given, or of the run's shard set where it is at hand."""
    if not images:
        config = predictor.run / "config.yaml"
        shards = load(config, of_run=True).pack.output if config.exists() else ""
        images = [shards] if (Path(shards) / MANIFEST).is_file() else []
    found = []
    for image in islice(listing(images, id_columns=predictor.id_columns).images, CHECKED):
        try:
            data = image.read()
            found.append(_Checked(data, predictor.encode(data, name=image.file_name)))
        except UserError as error:
            raise UserError(f"{image.name}: {error}; check the bundle on other images") from None
    return found


def _difference(
    predictor: Predictor, run: Run, checked: Sequence[_Checked], prepare: Callable[[_Checked], Pixels]
) -> Difference:
    assert len(checked) <= BATCH
    embeddings = predictor.embed([one.encoded for one in checked])
    probabilities = predictor.classifier.probabilities(embeddings)
    pairs = [run(prepare(one)) for one in checked]  # one at a time: their sizes differ
    return Difference(
        len(checked),
        float(np.abs(np.concatenate([pair[0] for pair in pairs]) - probabilities).max()),
        float(np.abs(np.concatenate([pair[1] for pair in pairs]) - embeddings).max()),
    )


def _refuse_difference(found: dict[str, Difference], kind: Format) -> None:
    for name, difference in found.items():
        most = OF_FILES if name == "real_files" else TOLERANCE
        if not difference.probability <= most:  # nan does not pass either
            others = f"try another of {', '.join(FORMATS)}"
            remedy = "check it on other images" if name == "real_files" else others
            raise UserError(
                f"--format {kind}: on {KINDS[name].format(difference.images)} the bundle's probabilities "
                f"differ from the run's by {difference.probability:.2g}, more than {most:g}, so it was "
                f"not written; {remedy}"
            )
