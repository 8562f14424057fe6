"""Prediction: the embeddings are training's, every image has its line, nothing half-written remains."""

import csv
import io
import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture
from sklearn.neighbors import NearestNeighbors

from configs.errors import UserError
from configs.load import load
from eval import neighbours
from eval.export import export
from eval.inputs import Image, Listing, listing
from eval.neighbours import Known
from eval.predict import Prediction, Predictor
from eval.predictions import check_output, format_of, write
from launch import cli
from shards.images import Ref
from shards.shardset import SPLITS, ShardSet
from train.classify import fit
from train.embed import BATCH
from train.embeddings import Embeddings, read_embeddings

CLASSES = ["benign", "melanoma"]


@pytest.fixture(scope="session")
def predictor(finished: Path) -> Predictor:
    return Predictor(finished, device="cpu")


@pytest.fixture(scope="session")
def few(tiny_images: Path) -> list[Path]:
    return sorted((tiny_images / "images").glob("*.jpg"))[:6]


def known(finished: Path) -> dict[str, np.ndarray]:
    embeddings = [read_embeddings(finished, split) for split in SPLITS]
    return {key: vector for e in embeddings for key, vector in zip(e.keys, e.vectors, strict=True)}


def test_a_packed_image_gets_the_embedding_that_embed_gave_it(
    predictor: Predictor, finished: Path, tiny_shards: ShardSet, tiny_images: Path
) -> None:
    """To the bit, from the shards and from the files they were packed from."""
    expected = known(finished)
    for place in (tiny_shards.folder, tiny_images / "images"):
        found = {Path(p.image).stem: p.embedding for p in predictor.predict(place)}
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_probabilities_and_verdict_are_the_classifiers(
    predictor: Predictor, finished: Path, few: list[Path]
) -> None:
    vectors = np.stack([known(finished)[path.stem] for path in few])
    expected = predictor.classifier.probabilities(vectors)
    for prediction, row in zip(predictor.predict(few), expected, strict=True):
        assert prediction.probabilities == pytest.approx(dict(zip(CLASSES, row, strict=True)))
        assert prediction.verdict == CLASSES[int(row[1] >= predictor.threshold)]


def test_a_prediction_does_not_depend_on_the_others(predictor: Predictor, few: list[Path]) -> None:
    (alone,) = predictor.predict([few[3]])
    together = list(predictor.predict([*few, *few, *few, *few, *few, *few]))
    assert len(together) > BATCH
    assert all(np.array_equal(alone.embedding, p.embedding) for p in together[3::6])


def places(folder: Path, few: list[Path]) -> Iterator[tuple[list[str], dict]]:
    """The same images in every guise that is taken."""
    (folder / "deep/er").mkdir(parents=True)
    for number, path in enumerate(few):
        shutil.copy(path, folder / "deep" / ("er" if number % 2 else "."))
    yield [str(folder / "deep")], {}
    yield [str(folder / "deep" / "**" / "TINY_*.jpg")], {}
    yield [str(folder / "deep" / "**")], {}
    yield [f"{folder}/deep/**/"], {}
    yield [f"{folder}/deep/*.jpg", f"{folder}/deep/**/er"], {}
    yield [str(path) for path in few], {}
    ids = [path.stem for path in few]
    (folder / "paths.csv").write_text("path\n" + "".join(f"{path}\n" for path in few))
    yield [str(folder / "paths.csv")], {}
    (folder / "ids.tsv").write_text("isic_id\tage\n" + "".join(f"{key}\t\n" for key in ids))
    yield [str(folder / "ids.tsv")], {}  # found below the table's own folder
    pq.write_table(pa.table({"image_id": ids}), folder / "ids.parquet")
    yield [str(folder / "ids.parquet")], {"images": str(few[0].parent)}
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for path in few:
            archive.write(path, path.name)
    yield [str(folder / "set.zip")], {}
    with h5py.File(folder / "set.hdf5", "w") as file:
        for path in few:
            file[path.stem] = np.void(path.read_bytes())
    yield [str(folder / "set.hdf5")], {}
    for name, half in (("s-0.tar", few[:3]), ("s-1.tar", few[3:]), ("all.tar.gz", few)):
        with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as tar:
            for path in half:
                tar.add(path, path.name)
    yield [str(folder / "s-{0..1}.tar")], {}
    yield [f"file:{folder}/s-0.tar::file:{folder}/s-1.tar"], {}
    yield [str(folder / "s-?.tar")], {}
    yield [str(folder / "all.tar.gz")], {}


def test_images_are_found_in_every_guise(predictor: Predictor, few: list[Path], tmp_path: Path) -> None:
    expected = {Path(p.image).stem: p.embedding.tobytes() for p in predictor.predict(few)}
    for words, options in places(tmp_path, few):
        images = listing(words, id_columns=predictor.id_columns, **options)
        found = list(predictor.predict(images))
        assert not [p.error for p in found if p.error], words
        assert {Path(p.image).stem: p.embedding.tobytes() for p in found} == expected, words
        assert images.count in (None, len(few))


def test_paths_come_from_standard_input(few: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"\n".join([*(bytes(path) for path in few), b"", b"caf\xe9.jpg"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    names = [image.name for image in listing(["-"], id_columns=()).images]
    assert names == [*map(str, few), "caf\udce9.jpg"]


def test_metadata_come_along_from_tables_and_shards(
    tiny_images: Path, tiny_shards: ShardSet, predictor: Predictor
) -> None:
    by_table, by_shard = (
        {Path(i.name).stem: i.metadata for i in listing([str(p)], id_columns=predictor.id_columns).images}
        for p in (tiny_images / "metadata.csv", tiny_shards.folder)
    )
    assert by_table.keys() == by_shard.keys()
    assert by_table["TINY_0001"]["sex"] == by_shard["TINY_0001"]["sex"] == "female"


def test_what_cannot_be_used_has_its_line_and_the_rest_go_on(
    predictor: Predictor, few: list[Path], tmp_path: Path
) -> None:
    whole = few[0].read_bytes()
    wrong = {
        "empty.jpg": b"",
        "text.png": b"no image",
        "short.jpg": whole[: len(whole) // 2],
        "lies.png": whole,
    }
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "none").mkdir()
    table = tmp_path / "ids.csv"
    table.write_text(f"isic_id,age\nUNKNOWN,5\n,6\n{few[0].stem},7\n")
    words = [
        few[0],
        *(tmp_path / name for name in wrong),
        tmp_path / "gone.jpg",
        tmp_path / "bad.tar",
        tmp_path / "none",
        table,
        few[1],
    ]
    images = listing(words, images=str(few[0].parent), id_columns=predictor.id_columns)
    found = list(predictor.predict(images))
    assert [bool(p.error) for p in found] == [False, *[True] * 9, False, False]
    reasons = [p.error for p in found if p.error]
    for reason, said in zip(
        (
            *("empty", "not an image", "truncated", "is a JPEG", "No such file", "shard", "no images"),
            *("no image", "its id is blank"),
        ),
        reasons,
        strict=True,
    ):
        assert reason in said
    assert found[-3].image == f"{table} row 2"
    assert found[-1].embedding is not None and found[1].probabilities is None


def test_memory_holds_a_few_batches(predictor: Predictor, few: list[Path]) -> None:
    """Images are asked for as predictions are taken."""
    drawn = 0

    def endless() -> Iterator[Image]:
        nonlocal drawn
        while True:
            drawn += 1
            yield Image(str(few[0]), Ref(str(few[0]), few[0].name, ""))

    predictions = predictor.predict(Listing(endless(), None))
    for _ in range(2 * BATCH):
        next(predictions)
    predictions.close()
    assert drawn <= 5 * BATCH


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["no/such/*.jpg"], "nothing has such a name"),
        (["absent.csv"], "table not found"),
        (["other.csv"], "no column that names images.*one of path, isic_id"),
    ],
)
def test_words_that_mean_no_images_are_refused(
    words: list[str], reason: str, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.csv").write_text("age,sex\n1,male\n")
    with pytest.raises(UserError, match=reason):
        predictor.predict(words)


def test_a_place_of_ids_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("isic_id\nISIC_1\n")
    with pytest.raises(UserError, match="gone: no such folder or file; correct --images"):
        listing([tmp_path / "ids.csv"], images=str(tmp_path / "gone"), id_columns=["isic_id"])


def some(vectors: np.ndarray, name: str) -> Embeddings:
    n = len(vectors)
    keys = [f"{name}{i}" for i in range(n)]
    return Embeddings(np.arange(n), keys, keys, np.zeros(n, np.int64), vectors, {})


def unit(n: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_neighbours_are_scikit_learns(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    train, val, new = unit(60, 0), unit(30, 1), unit(9, 2)
    here = Known(some(train, "t"), some(val, "v"), predictor_device())
    oracle = NearestNeighbors(algorithm="brute").fit(train.astype(float))
    distances, rows = oracle.kneighbors(new.astype(float), 12)
    found = here.nearest(new, 12)
    assert np.array_equal(found[0], rows) and found[1] == pytest.approx(distances, abs=1e-6)
    tenth = oracle.kneighbors(val.astype(float), 10)[0][:, -1]
    assert here.limit == pytest.approx(np.quantile(tenth, 0.99), abs=1e-6)
    assert here.nearest(train[:1], 1)[1] == 0  # a copy is at distance 0, not nearly


def predictor_device():  # type: ignore[no-untyped-def]
    import torch

    return torch.device("cpu")


def test_few_training_images_have_as_many_neighbours() -> None:
    here = Known(some(unit(4, 0), "t"), some(unit(3, 1), "v"), predictor_device())
    assert here.rank == 4 and here.nearest(unit(2, 2), 10)[0].shape == (2, 4) and here.limit > 0


def test_only_what_is_unlike_the_training_images_is_out_of_distribution(
    predictor: Predictor, finished: Path, few: list[Path]
) -> None:
    for prediction in predictor.predict(few):
        assert prediction.out_of_distribution == (prediction.distance > predictor.known.limit)
        assert [n.distance for n in prediction.nearest] == sorted(n.distance for n in prediction.nearest)
    train = read_embeddings(finished, "train")
    key = next(path.stem for path in few if path.stem in train.keys)
    nearest = next(predictor.predict(few[0].with_name(f"{key}.jpg"))).nearest[0]
    label = CLASSES[train.labels[train.keys.index(key)]]
    assert (nearest.key, nearest.label, nearest.split, nearest.distance) == (key, label, "train", 0)
    assert predictor.known.distance(-train.vectors[:1])[0] > predictor.known.limit


def test_csv_and_json_lines_say_the_same(predictor: Predictor, few: list[Path], tmp_path: Path) -> None:
    predictions = [*predictor.predict(few), Prediction('caf\udce9, "x".jpg', "is empty")]
    for kind in ("csv", "jsonl"):
        outcome = write(predictions, CLASSES, tmp_path / kind, kind, threshold=0.25, limit=0.5)
        assert (outcome.images, outcome.failed) == (7, 1)
    with (tmp_path / "csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
    for row, line, prediction in zip(rows[:6], lines[:6], predictions[:6], strict=True):
        assert row["image"] == line["image"] == prediction.image
        assert float(row["probability.melanoma"]) == pytest.approx(
            line["probabilities"]["melanoma"], abs=1e-6
        )
        assert row["verdict"] == line["verdict"] and row["nearest.2.key"] == line["nearest"][1]["key"]
        assert float(row["threshold"]) == line["threshold"] == 0.25
        assert (row["out_of_distribution"] == "yes") == line["out_of_distribution"]
    assert rows[6]["error"] == lines[6]["error"] == "is empty" and not rows[6]["verdict"]
    assert lines[6]["image"] == 'caf\udce9, "x".jpg' and rows[6]["image"] == r'caf\udce9, "x".jpg'


def test_an_interrupted_output_leaves_the_old_file_and_no_other(
    predictor: Predictor, few: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out.csv"
    output.write_text("old")

    def interrupted() -> Iterator[Prediction]:
        yield from predictor.predict(few)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(interrupted(), CLASSES, output, "csv", threshold=0.5, limit=1)
    assert output.read_text() == "old" and list(tmp_path.iterdir()) == [output]


def test_the_format_is_that_of_the_ending() -> None:
    assert (
        format_of(None) == "csv"
        and format_of(Path("a.csv")) == "csv"
        and format_of(Path("a.jsonl")) == "jsonl"
    )
    assert format_of(None, "jsonl") == "jsonl" and format_of(Path("a.jsonl"), "csv") == "csv"


def test_the_command_tells_by_its_status_whether_all_have_a_verdict(
    finished: Path, few: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for names, status in ((few[:2], 0), ([few[0], Path("gone.jpg"), few[1]], 1)):
        with pytest.raises(SystemExit) as end:
            cli.main(["predict", str(finished), *map(str, names), "--format", "jsonl"])
        said = capfd.readouterr()
        assert end.value.code == status
        assert [json.loads(line)["image"] for line in said.out.splitlines()] == [str(name) for name in names]
        assert ("1 of 3 images have no verdict" in said.err) == bool(status)
        assert "not a medical device" in said.err


def test_a_classifier_of_another_encoder_is_refused(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    record = json.loads((run / "classifier.json").read_text())
    record["made_from"]["encoder_sha256"] = "other"
    (run / "classifier.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="made for another encoder"):
        Predictor(run)


def test_outputs_that_can_be_written_pass_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "old.csv").touch()
    for output in (None, Path("out.csv"), tmp_path / "old.csv", tmp_path / "new" / "deeper" / "out.csv"):
        check_output(output)
    assert [path.name for path in tmp_path.iterdir()] == ["old.csv"]


def test_outputs_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, reason in {
        tmp_path: "is not a file",
        Path(): "is not a file",
        Path("/dev/null"): "is not a file",
        tmp_path / "file" / "out.csv": "cannot be written .Not a directory",
        tmp_path / "file" / "deeper" / "out.csv": "cannot be written .Not a directory",
        Path("/proc/out.csv"): "cannot be written",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        with pytest.raises(UserError, match=reason):
            check_output(output)


def test_a_picture_shows_the_image_and_its_heat(
    predictor: Predictor, few: list[Path], tmp_path: Path
) -> None:
    twice = list(predictor.predict([few[0], few[0], few[1]], heatmaps=tmp_path / "heat"))
    assert [p.heatmap.name for p in twice] == [
        f"{few[0].stem}.png",
        f"{few[0].stem}-2.png",
        f"{few[1].stem}.png",
    ]
    with Picture.open(twice[0].heatmap) as picture:
        assert picture.size == (2 * 256 + 8, 256)
    assert twice[0].heatmap.read_bytes() == twice[1].heatmap.read_bytes() != twice[2].heatmap.read_bytes()


def test_metadata_that_the_classifier_takes_come_from_tables_and_their_lack_is_told(
    finished: Path, tiny_images: Path, few: list[Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    experiment = load(run / "config.yaml", [f"run.folder={run}", "classifier.metadata=[age, sex]"])
    fit(experiment, progress=False)
    predictor = Predictor(run, device="cpu")
    table = {Path(p.image).stem: p for p in predictor.predict(tiny_images / "metadata.csv")}
    data = [read_embeddings(run, split) for split in SPLITS]
    for of in data:
        expected = predictor.classifier.probabilities(of.vectors, of.metadata)
        assert [table[key].probabilities["melanoma"] for key in of.keys] == pytest.approx(expected[:, 1])
    alone = next(predictor.predict(few[1]))
    assert alone.probabilities != pytest.approx(table[few[1].stem].probabilities, abs=1e-9)
    assert "takes age, sex too" in predictor.remarks[0]
    with pytest.raises(UserError, match="takes age, sex beside the image"):
        export(run, "safetensors", tmp_path / "bundle")
