"""Bundles: they load without moleprint, give what the run gives, and say by how much they differ."""

import hashlib
import importlib
import io
import json
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from configs.errors import UserError
from configs.packing import Encode
from eval import export as module
from eval.export import FILES, FORMATS, Difference, export, said
from eval.predict import Predictor
from shards.encode import encode

# -I: neither this folder nor PYTHONPATH; and no editable install of moleprint either.
ALONE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("configs", "shards", "pipeline", "train", "eval", "launch"):
            raise ImportError(f"{name} is moleprint's")
sys.meta_path.insert(0, Refuse())
folder, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, folder)
runpy.run_path(folder + "/predict.py", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECKED", 6)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files that packing would change: a large JPEG, one lying on its side, a PNG with transparency, grey."""
    folder = tmp_path_factory.mktemp("photographs")
    draw = np.random.default_rng(3)
    pixels = draw.integers(0, 256, (50, 70, 3), dtype=np.uint8).repeat(12, 0).repeat(12, 1)
    picture = Image.fromarray(pixels)
    picture.save(folder / "large.jpg", quality=90)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(folder / "turned.jpg", quality=90, exif=turned)
    picture.putalpha(Image.fromarray(pixels[:, :, 0]))
    picture.save(folder / "clear.png")
    Image.fromarray(pixels[:, :, 0]).save(folder / "grey.jpg")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_bundle_gives_the_runs_probabilities_without_moleprint(
    kind: str, finished: Path, photographs: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    found = export(finished, kind, output)
    assert all(d.probability < 1e-5 and d.embedding < 1e-5 and d.images == 6 for d in found.values())
    assert list(found) == ["random", "files", "real", "real_files"]  # the run's shard set is at hand
    about = json.loads((output / "bundle.json").read_text())
    assert about["checks"]["real"] == vars(found["real"])
    assert about["sha256"].keys() == {FILES[kind], "README.md", "prepare.py", "predict.py"}
    for name, expected in about["sha256"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == expected
    assert {path.name for path in output.iterdir()} == {*about["sha256"], "bundle.json"}

    damaged, images = tmp_path / "damaged.jpg", [str(path) for path in photographs]
    damaged.write_bytes(photographs[0].read_bytes()[:2000])
    command = [sys.executable, "-I", "-c", ALONE, str(output)]
    (tmp_path / "program.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    (tmp_path / "empty.jpg").touch()
    bad = [
        str(damaged),
        *(str(tmp_path / name) for name in ("no.jpg", "program.jpg", "empty.jpg", "\udcff.jpg")),
    ]
    done = subprocess.run([*command, *bad, *images], cwd="/", capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1, done.stderr
    assert [line["image"] for line in lines] == [*bad, *images]
    assert all(line.keys() == {"image", "error"} and line["error"] for line in lines[: len(bad)])
    assert lines[2]["error"].startswith("not an image of a known format")  # no reader that runs it
    predictions = Predictor(finished, device="cpu").predict(photographs)
    for line, prediction in zip(lines[len(bad) :], predictions, strict=True):
        assert line["verdict"] == prediction.verdict
        assert line["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)


@pytest.mark.parametrize("resize", ["short_side", "pad", "crop", "stretch", "none"])
def test_a_bundle_sees_the_pixels_that_packing_would_have_made(resize: str, tmp_path: Path) -> None:
    settings = Encode(size=48, resize=resize)
    (tmp_path / "bundle.json").write_text(json.dumps({"encoding": settings.model_dump(mode="json")}))
    shutil.copy(module.TEMPLATES / "prepare.py", tmp_path)
    prepare = runpy.run_path(str(tmp_path / "prepare.py"))["pixels"]
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8).repeat(12, 0).repeat(11, 1)
    rgb = Image.fromarray(pixels)
    deep, clear = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 251), rgb.copy()
    clear.putalpha(rgb.getchannel(0))
    for image, kind, options in (
        (deep, "PNG", {}),
        (deep, "TIFF", {}),
        (clear, "PNG", {}),
        (clear.convert("LA"), "PNG", {}),
        (rgb.quantize(20), "GIF", {"transparency": 3}),
        (rgb.convert("1"), "PNG", {}),
        (rgb.convert("CMYK"), "JPEG", {}),
        *((rgb.resize(size), "JPEG", {}) for size in ((48, 30), (30, 48), (48, 48), (20, 12), (60, 48))),
    ):
        file = io.BytesIO()
        image.save(file, kind, **options)
        expected = simplejpeg.decode_jpeg(encode(file.getvalue(), settings).jpeg)
        assert np.array_equal(prepare(file.getvalue())[0], expected), (image.mode, kind, *options)
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0].astype(np.float32)).save(file, "TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        prepare(file.getvalue())


def test_a_bundles_script_ends_quietly_without_work_or_a_reader(tmp_path: Path) -> None:
    shutil.copy(module.TEMPLATES / "prepare.py", tmp_path)
    about = {
        "encoding": {"resize": "none", "size": 8},
        "classes": ["a", "b"],
        "positive": "b",
        "threshold": 0.5,
    }
    (tmp_path / "bundle.json").write_text(json.dumps(about))
    (tmp_path / "a.jpg").write_bytes(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8)))
    script = "import sys, numpy; sys.path.insert(0, '.'); import prepare; "
    script += "sys.exit(prepare.tell(lambda p: [numpy.eye(2)], sys.argv[1:]))"
    command = shlex.join([sys.executable, "-W", "error", "-c", script])

    def done(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)

    usage = "usage: python predict.py IMAGE …\n"
    assert (none := done(command)).returncode == 2 and (none.stdout, none.stderr) == ("", usage)
    line = {"image": "a.jpg", "verdict": "a", "probabilities": {"a": 1.0, "b": 0.0}}
    head = done(f"{command} {'a.jpg ' * 3000} | head -1")
    assert (json.loads(head.stdout), head.stderr) == (line, "")


def test_embeddings_kept_in_half_are_judged_as_kept(finished: Path) -> None:
    predictor = Predictor(finished, device="cpu")
    predictor.classifier.made_from["embed"]["dtype"] = "float16"
    (_, vectors) = predictor.network(torch.rand(2, 3, 64, 64))
    assert predictor.classifier.half and torch.equal(vectors, vectors.half().float())


def test_so_does_the_safetensors_script(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((finished / "classifier.json").read_text())
    record["made_from"]["embed"]["dtype"] = "float16"
    (tmp_path / "run/classifier.json").write_text(json.dumps(record))
    export(tmp_path / "run", "safetensors", tmp_path / "bundle")
    with module._scripts(tmp_path / "bundle") as (load, _):
        vectors = load(tmp_path / "bundle")(np.zeros((1, 64, 64, 3), np.uint8))[1]
    assert np.array_equal(vectors, vectors.astype(np.float16))


def test_the_differences_are_said() -> None:
    assert said({"random": Difference(16, 1.5e-7, 2e-6), "real": Difference(3, 0.25, 0)}) == (
        "largest difference from the run: 1.5e-07 in probability, 2.0e-06 in embedding (16 random images); "
        "2.5e-01 in probability, 0.0e+00 in embedding (3 real images)"
    )


def test_a_bundle_that_differs_is_not_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    export(finished, "safetensors", output)
    before = (output / "bundle.json").read_bytes()

    def spoil(whole, path, about):  # type: ignore[no-untyped-def]
        whole.network.temperature.mul_(3)
        module._write_safetensors(whole, path, about)

    monkeypatch.setitem(module.WRITERS, "safetensors", spoil)
    with pytest.raises(UserError, match=r"differ from the run's by .* so it was not written"):
        export(finished, "safetensors", output)
    assert (output / "bundle.json").read_bytes() == before and list(tmp_path.iterdir()) == [output]


def test_what_is_no_bundle_is_left_alone(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    for output in (tmp_path / "mine", tmp_path / "mine/thesis.txt"):
        with pytest.raises(UserError, match="is no bundle"):
            export(finished, "safetensors", output)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years"


def test_a_missing_package_is_named(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> object:
        if name == "onnxscript":
            raise ImportError
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'moleprint\[export\]'"):
        export(finished, "onnx", tmp_path / "bundle")


def test_images_to_check_on_that_cannot_be_used_are_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg: .*check the bundle on other images"):
        export(finished, "safetensors", tmp_path / "bundle", images=[str(tmp_path / "gone.jpg")])
    assert not any(tmp_path.iterdir())
