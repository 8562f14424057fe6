"""Drawn lesions: the same bytes however they are made, and a class that shows in the mole alone."""

import csv
import statistics
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from configs.errors import UserError
from configs.packing import Pack, Synthetic
from launch import lesions, synthetic
from launch.lesions import abcd, draw, patient_of, scene_of
from launch.synthetic import NOTICE, check_made_by, synthesize

V2 = (
    "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,"
    "benign_malignant,target\n"
)
LINES = [
    "ISIC_2637011,IP_7279968,IL_7972535,male,45,head/neck,unknown,benign,0\n",
    "ISIC_0015719,IP_3075186,IL_4649854,female,45,upper extremity,unknown,benign,0\n",
    'ISIC_0149568,IP_0962375,IL_1,female,55,"upper extremity, left",melanoma,malignant,1\n',
    "ISIC_0052212.jpg,IP_2842074,IL_2,,,,nevus,benign,0\n",
]
ISIC = Pack(id_column="image_name")


def settings(folder: Path, **changes: object) -> Synthetic:
    small = {"images": 60, "patients": 12, "size": 48, "workers": 1}
    return Synthetic(output=folder / "drawn", **{**small, **changes})  # type: ignore[arg-type]


def make(folder: Path, **changes: object) -> dict[str, bytes]:
    """Draws a data set; returns the bytes of each of its files by name."""
    table = synthesize(settings(folder, **changes), Pack(), progress=False)
    return {p.name: p.read_bytes() for p in table.parent.rglob("*") if p.is_file()}


def draw_table(folder: Path, text: str, columns: Pack = ISIC) -> Path:
    folder.mkdir(exist_ok=True)
    table = folder / "table.csv"
    table.write_text(text, encoding="utf-8")
    return synthesize(settings(folder, table=table), columns, progress=False)


@pytest.fixture(scope="module")
def invented(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The rows of an invented table of 2,000 images; the images themselves are not drawn."""
    path = tmp_path_factory.mktemp("invented") / "metadata.csv"
    synthetic._invent(Synthetic(images=2000, patients=200), path)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_bytes_do_not_depend_on_workers_but_on_the_seed(tmp_path: Path) -> None:
    alone, together = make(tmp_path / "a"), make(tmp_path / "b", workers=2)
    assert len(alone) == 63
    assert alone == together
    other = make(tmp_path / "c", seed=1)
    assert all(alone[name] != other[name] for name in alone if name.endswith(".jpg"))


def test_images_do_not_depend_on_other_rows_or_their_order(tmp_path: Path) -> None:
    forth = draw_table(tmp_path / "forth", V2 + "".join(LINES)).parent / "images"
    back = draw_table(tmp_path / "back", V2 + "".join(LINES[:0:-1])).parent / "images"
    assert len(list(back.iterdir())) == 3
    for image in back.iterdir():
        assert image.read_bytes() == (forth / image.name).read_bytes()


def test_a_table_is_copied_and_drawn_row_for_row(tmp_path: Path) -> None:
    text = V2 + "".join(LINES)
    table = draw_table(tmp_path, text)
    assert table == tmp_path / "drawn" / "metadata.csv"
    assert table.read_text() == text
    names = {p.name for p in (tmp_path / "drawn" / "images").iterdir()}
    assert names == {"ISIC_2637011.jpg", "ISIC_0015719.jpg", "ISIC_0149568.jpg", "ISIC_0052212.jpg"}
    assert [melanoma for *_, melanoma in synthetic._moles(table, ISIC)] == [False, False, True, False]


def test_each_file_shows_its_row_s_patient_and_class(tmp_path: Path) -> None:
    folder = draw_table(tmp_path, V2 + "".join(LINES)).parent / "images"
    for line in LINES:
        fields = line.strip().replace(", left", "").split(",")
        image = fields[0].removesuffix(".jpg")
        expected = draw(0, patient=fields[1], image=image, melanoma=fields[-1] == "1", overlap=0.4, size=48)
        expected.save(tmp_path / "expected.jpg", quality=92)
        assert (folder / f"{image}.jpg").read_bytes() == (tmp_path / "expected.jpg").read_bytes()


def test_the_positive_class_is_the_one_named(tmp_path: Path) -> None:
    columns = Pack(
        id_column="image_name",
        label_column="diagnosis",
        classes={"melanoma": ("melanoma",), "other": ("unknown", "nevus")},
        positive="melanoma",
    )
    table = tmp_path / "table.csv"
    table.write_text("\ufeff" + V2 + "".join(LINES), encoding="utf-8")
    assert [melanoma for *_, melanoma in synthetic._moles(table, columns)] == [False, False, True, False]


def test_images_are_jpegs_as_asked_and_a_notice_lies_beside_them(tmp_path: Path) -> None:
    files = make(tmp_path, images=3, patients=1, size=100)
    assert files["NOTICE.txt"].decode().strip() == NOTICE
    with Image.open(tmp_path / "drawn" / "images" / "SYN_0000000.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (100, 100))
        assert np.asarray(image).std() > 5


def test_invented_table_has_the_shape_of_isic_2020(invented: list[dict[str, str]]) -> None:
    assert list(invented[0]) == [
        "isic_id", "patient_id", "sex", "age_approx", "anatom_site_general", "target",
    ]  # fmt: skip
    assert len({row["isic_id"] for row in invented}) == 2000
    assert sum(row["target"] == "1" for row in invented) == 400
    of_patient: dict[str, list[dict[str, str]]] = {}
    for row in invented:
        of_patient.setdefault(row["patient_id"], []).append(row)
    counts = sorted(map(len, of_patient.values()))
    assert len(counts) == 200 and counts[0] >= 2
    assert counts[-1] > 3 * statistics.median(counts), "images per patient should be skewed"
    assert all(len({row["sex"] for row in rows}) == 1 for rows in of_patient.values())
    ill = [rows for rows in of_patient.values() if any(row["target"] == "1" for row in rows)]
    both = [rows for rows in ill if any(row["target"] == "0" for row in rows)]
    assert 60 < len(ill) < 180 and len(both) > 0.8 * len(ill)


def test_nuisances_do_not_tell_the_class(invented: list[dict[str, str]]) -> None:
    counts: dict[str, int] = {}
    for row in invented:
        counts[row["patient_id"]] = counts.get(row["patient_id"], 0) + 1
    nuisances = []
    for row in invented:
        patient, scene = patient_of(0, row["patient_id"]), scene_of(0, row["patient_id"], row["isic_id"])
        place = sorted({r["anatom_site_general"] for r in invented}).index(row["anatom_site_general"])
        table = row["sex"] == "male", float(row["age_approx"] or 50), place, counts[row["patient_id"]]
        nuisances.append(np.hstack([*map(np.ravel, (*astuple(patient), *astuple(scene))), *table]))
    label = np.array([row["target"] == "1" for row in invented])
    score = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        np.array(nuisances),
        label,
        groups=[row["patient_id"] for row in invented],
        cv=StratifiedGroupKFold(5),
        method="predict_proba",
    )
    assert 0.4 < roc_auc_score(label, score[:, 1]) < 0.6


def test_the_class_changes_no_pixel_away_from_the_mole() -> None:
    changed = []
    for image in map(str, range(12)):
        nevus, melanoma = (
            np.asarray(draw(3, f"patient {image}", image, label, overlap=0.4, size=96))
            for label in (False, True)
        )
        different = (nevus != melanoma).any(axis=2)
        changed.append(different.mean())
        assert not different[:4].any() and not different[-4:].any()
    assert min(changed) > 0.01 and statistics.mean(changed) < 0.5


def test_melanomas_differ_by_degree_in_each_of_abcd() -> None:
    ids = [(f"patient {i // 4}", f"image {i}") for i in range(800)]
    nevi, melanomas = (np.array([abcd(0, *i, label, 0.4) for i in ids]) for label in (False, True))
    assert np.allclose(melanomas - nevi, 1.8 * 0.6, atol=1e-5)
    assert np.allclose(nevi.mean(0), 0, atol=0.15) and np.allclose(nevi.std(0), 1, atol=0.15)
    assert (nevi.max(0) > melanomas.mean(0)).all(), "the classes should overlap in each"
    by_patient = nevi.reshape(200, 4, 4)
    likeness = 1 - by_patient.var(axis=1, ddof=1).mean(0) / nevi.var(0)
    assert np.allclose(likeness, 0.35, atol=0.12), "a patient's moles should resemble each other"


@pytest.mark.parametrize("overlap, expected", [(0, 0.9945), (0.4, 0.937), (1, 0.5)])
def test_overlap_sets_how_well_the_classes_can_be_told_apart(overlap: float, expected: float) -> None:
    label = np.arange(4000) % 5 == 0
    score = [abcd(0, f"patient {i}", f"image {i}", bool(label[i]), overlap).sum() for i in range(4000)]
    assert roc_auc_score(label, score) == pytest.approx(expected, abs=0.025)


def test_pictures_show_the_class_as_far_as_overlap_lets_them() -> None:
    def darkness(label: bool, overlap: float) -> list[float]:
        """Share of each picture that is much darker than its skin: the diameter, as seen."""
        shares = []
        for i in range(40):
            grey = np.asarray(draw(0, f"patient {i}", "x", label, overlap=overlap, size=64).convert("L"))
            middle = grey[12:52, 12:52].astype(float)
            shares.append((middle < 0.75 * np.percentile(middle, 95)).mean())
        return shares

    assert darkness(True, 1.0) == darkness(False, 1.0)
    apart = [np.mean(darkness(True, overlap)) / np.mean(darkness(False, overlap)) for overlap in (0.7, 0.0)]
    assert 1.03 < apart[0] < apart[1]


@pytest.mark.parametrize(
    "text, message",
    [
        (V2.replace("patient_id", "patient") + LINES[0], r"no column 'patient_id'; it has image_name, pat"),
        (V2 + LINES[0] + LINES[2] + LINES[0], r"1 image ids occur more than once \(ISIC_2637011\)"),
        (V2 + LINES[0].replace("IP_7279968", " ") + LINES[2], r"1 rows have no group \(column 'patient_id'"),
        (V2 + LINES[2] + LINES[1].replace("benign,0", "benign,2"), r"belong to no class, .* ISIC_0015719"),
        (V2 + LINES[0].replace("ISIC_2637011", "../up"), r"1 image ids cannot name a file .*\.\./up"),
        (V2, r"has a header and no rows"),
        ("", r"cannot be read as a CSV table"),
    ],
)
def test_an_unfit_table_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        draw_table(tmp_path, text)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"], "something half-written stayed behind"


def test_unreadable_tables_and_outputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.csv: table not found; set synthetic\.table"):
        synthesize(settings(tmp_path, table=tmp_path / "absent.csv"), ISIC)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xd8\xff\xe0" * 10)
    with pytest.raises(UserError, match=r"binary\.csv: cannot be read as a CSV"):
        synthesize(settings(tmp_path, table=tmp_path / "binary.csv"), ISIC)
    with pytest.raises(UserError, match="cannot be written"):
        synthesize(settings(tmp_path / "binary.csv"), ISIC)
    with pytest.raises(UserError, match="5 images cannot be shared among 12 patients"):
        synthesize(settings(tmp_path, images=5), ISIC)
    with pytest.raises(UserError, match="0 melanomas among 60 images leave a class empty"):
        synthesize(settings(tmp_path, prevalence=0.0), ISIC)
    assert [p.name for p in tmp_path.iterdir()] == ["binary.csv"], "something half-written stayed behind"


def test_an_output_in_use_is_left_alone_and_an_empty_one_is_filled(tmp_path: Path) -> None:
    output = tmp_path / "drawn"
    output.mkdir()
    make(tmp_path, images=5, patients=1)
    before = sorted(output.rglob("*"))
    with pytest.raises(UserError, match="exists and is not empty; delete it or choose another"):
        make(tmp_path, images=5, patients=1, seed=5)
    assert sorted(output.rglob("*")) == before


@pytest.mark.parametrize(
    "failure, shown", [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), None)]
)
def test_nothing_half_written_stays_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, shown: type | None
) -> None:
    real, calls = lesions.draw, []

    def failing(*args: object, **kwargs: object) -> Image.Image:
        calls.append(args)
        if len(calls) == 20:
            raise failure
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(lesions, "draw", failing)
    with pytest.raises(shown or type(failure)):
        make(tmp_path)
    assert len(calls) == 20
    assert list(tmp_path.iterdir()) == []


def test_other_settings_than_the_drawn_ones_are_named(tmp_path: Path) -> None:
    settings = Synthetic(output=tmp_path / "drawn", images=8, patients=4, prevalence=0.5, size=32, workers=1)
    synthesize(settings, Pack(), progress=False)
    check_made_by(settings.model_copy(update={"workers": 2}))
    with pytest.raises(UserError, match=r"drawn with another synthetic\.images; delete it"):
        check_made_by(settings.model_copy(update={"images": 9}))
