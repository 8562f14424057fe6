"""The page: its pictures follow light and dark, its lesions are the shards', it claims only what holds."""

import base64
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.load import load
from configs.schema import Experiment
from eval import gallery, lineage, projection, report
from eval.evaluate import evaluate
from shards.shardset import SPLITS, ShardSet
from train.embeddings import Embeddings, read_embeddings


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A run with a report, its shard set at hand."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("reported") / "run"))
    experiment = load(folder / "config.yaml", [f"run.folder={folder}"])
    evaluate(experiment, progress=False)
    return experiment


@pytest.fixture(scope="module")
def page(run: Experiment) -> str:
    return (run.run.folder / "report/index.html").read_text()


def lesions(page: str) -> list[dict]:
    return json.loads(re.search(r'id="lesions">(.*?)</script>', page, re.DOTALL)[1])


def test_the_map_shows_the_test_split_with_its_pictures(
    page: str, run: Experiment, tiny_shards: ShardSet
) -> None:
    test, shown = read_embeddings(run.run.folder, "test"), lesions(page)
    assert [one["key"] for one in shown] == test.keys and [one["group"] for one in shown] == test.groups
    assert page.count("<circle") == 2 * len(shown)
    for one, index in zip(shown, test.index, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(one["picture"]))) as picture:
            assert max(picture.size) <= gallery.THUMBNAIL
            shape = tiny_shards.widths[index] / tiny_shards.heights[index]
            assert picture.width / picture.height == pytest.approx(shape, rel=0.05)
    assert "data:image/jpeg" in page and "no picture" not in page


def test_mistakes_are_the_most_confident_with_their_nearest(run: Experiment, tiny_shards: ShardSet) -> None:
    train, test = (read_embeddings(run.run.folder, split) for split in ("train", "test"))
    scores = np.linspace(0, 1, len(test.keys))
    probabilities, called = np.stack([1 - scores, scores], axis=1), (scores >= 0.5).astype(np.int64)
    pictures = gallery.Pictures(tiny_shards)
    found = gallery.mistakes(train, test, probabilities, called, ["benign", "melanoma"], 1, pictures)
    missed = [row for row in range(len(test.keys)) if test.labels[row] and scores[row] < 0.5]
    assert [one.lesion.key for one in found["missed"]] == [test.keys[row] for row in missed][
        : gallery.MISTAKES
    ]
    alarms = [row for row in reversed(range(len(test.keys))) if not test.labels[row] and scores[row] >= 0.5]
    assert [one.lesion.key for one in found["alarms"]] == [test.keys[row] for row in alarms][
        : gallery.MISTAKES
    ]
    for row, one in zip(missed, found["missed"], strict=False):
        away = np.linalg.norm(train.vectors - test.vectors[row], axis=1)
        nearest = np.sort(away)[: gallery.NEIGHBOURS]
        assert [near.distance for near in one.nearest] == pytest.approx(nearest.tolist(), abs=1e-6)
    pictures.close()


def test_pictures_end_with_the_budget(tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "BUDGET", 3000)
    pictures = gallery.Pictures(tiny_shards)
    given = [pictures(index, gallery.THUMBNAIL) for index in range(40)]
    assert 0 < sum(map(len, given)) < 3000 + max(map(len, given)) and given[-1] == ""


def test_without_its_shards_a_report_names_lesions_and_says_so(run: Experiment, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.run.folder, tmp_path / "run"))
    (folder / "encoder.json").unlink()
    (folder / "environment.json").unlink()
    alone = load(folder / "config.yaml", [f"run.folder={folder}", "pack.output=gone"])
    evaluate(alone, progress=False)
    page = (folder / "report/index.html").read_text()
    assert 'src="data:image' not in page and lesions(page)[0]["picture"] == ""
    assert "is not at hand, so where it came from is not told" in page and "no picture" in page


def test_the_page_tells_where_the_data_came_from(page: str, tiny_shards: ShardSet, run: Experiment) -> None:
    table = tiny_shards.manifest["sources"][""]["table"]
    for text in (
        *(table["name"], table["sha256"], tiny_shards.sha256),
        *("Model card", "not for", "skin tone is not recorded", "resnet18", "seed: 0"),
    ):
        assert text in page
    for anchor in re.findall(r'<a href="#(\w+)"', page):
        assert f'id="{anchor}"' in page
    assert page.count("✓") >= 2 and "✗" not in page


def test_a_leak_is_told(run: Experiment) -> None:
    data = {split: read_embeddings(run.run.folder, split) for split in SPLITS}
    held = lineage.leak_facts(None, data, "patient")
    assert all(holds for *_, holds in held) and held[0][0] == "no patient in two splits"
    test = data["test"]
    groups = [data["train"].groups[0], *test.groups[1:]]
    leaky = Embeddings(test.index, test.keys, groups, test.labels, test.vectors, test.meta, test.metadata)
    (_, found, holds), *_ = lineage.leak_facts(None, data | {"test": leaky}, "patient")
    assert not holds and found.startswith("1 of ")


def test_the_report_says_which_epoch_was_taken_and_by_what() -> None:
    about = {"backbone": "resnet18", "embedding_dim": 16, "preprocessing": {"size": 96}}
    facts = dict(lineage.encoder_facts(Experiment(), {**about, "epochs": 10, "best_epoch": 8}))
    assert facts["epochs"] == "10; the encoder is that of 8, by roc_auc on validation, train.tolerance 1"


def test_copies_in_two_splits_are_counted(run: Experiment, tiny_shards: ShardSet, tmp_path: Path) -> None:
    data = {split: read_embeddings(run.run.folder, split) for split in SPLITS}
    shards = dataclasses.replace(tiny_shards, folder=tmp_path)
    one, same, other = *data["train"].keys[:2], data["test"].keys[0]
    for pairs, apart in ((None, 0), ([(one, same), (one, "LEFT_OUT")], 0), ([(one, same), (other, one)], 1)):
        if pairs:
            lines = "".join(f'"{a}","{b}"\n' for a, b in pairs)
            (tmp_path / "duplicates.csv").write_text(f'"one","other"\n{lines}')
        claim, found, holds = lineage.leak_facts(shards, data, "patient")[-1]
        assert claim == "no copy in another split" and found.startswith(f"{apart} pairs are, of those")
        assert holds == (apart == 0)


def test_drawings_are_in_the_pages_colours_and_names_of_their_own(page: str) -> None:
    drawings = re.findall(r"<svg role.*?</svg>", page, re.DOTALL)
    assert len(drawings) >= 5
    for drawing in drawings:
        assert "var(--ink)" in drawing and "#222222" not in drawing and "<text" in drawing
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing))
        assert used <= set(re.findall(r'\bid="([^"]+)"', drawing))
    names = [name for drawing in drawings for name in set(re.findall(r'\bid="([^"]+)"', drawing))]
    assert len(names) == len(set(names))


def test_no_text_ends_the_script_it_lies_in() -> None:
    hostile = [{"key": "</script><script>alert(1)</script><!--"}]
    written = report._script_json(hostile)
    assert "<" not in written and json.loads(written) == hostile


def test_a_large_split_shows_some_of_its_images_and_all_rare_ones() -> None:
    positives, wrong = np.zeros(5000, bool), np.zeros(5000, bool)
    positives[::50], wrong[7::500] = True, True
    rows = projection.chosen(positives, wrong, seed=0)
    assert len(rows) == projection.MOST == len(set(rows.tolist())) and (np.diff(rows) > 0).all()
    assert set(np.flatnonzero(positives | wrong)) <= set(rows)
    many = projection.chosen(np.ones(5000, bool) ^ (np.arange(5000) < 700), wrong, seed=0)
    assert len(many) == projection.MOST and (many < 700).sum() == projection.MOST // 2
    assert len(projection.chosen(np.ones(30, bool), np.zeros(30, bool), seed=0)) == 30


def test_the_plane_is_that_of_principal_components() -> None:
    from sklearn.decomposition import PCA

    draw = np.random.default_rng(0)
    fitted, shown = (draw.normal(size=(n, 6)).astype(np.float32) * [3, 2, 1, 1, 1, 1] for n in (200, 40))
    plane, around = projection.planes(fitted.astype(np.float32), shown.astype(np.float32), seed=0)
    oracle = PCA(2).fit(fitted)
    assert np.abs(plane.points) == pytest.approx(np.abs(oracle.transform(shown)), abs=1e-4)
    assert f"{oracle.explained_variance_ratio_[0]:.0%}" in plane.x
    assert around.name == "t-SNE" and around.points.shape == (40, 2)
    again = projection.planes(fitted.astype(np.float32), shown.astype(np.float32), seed=0)[1]
    assert np.array_equal(around.points, again.points)
