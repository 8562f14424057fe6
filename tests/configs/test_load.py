"""Every mistake of a configuration is named, at once, with its place and the nearest valid key."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from configs.errors import UserError
from configs.load import dump, fields, load, section_of
from configs.loading import Augment
from configs.schema import Experiment


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Writes a YAML text to a file and loads it with overrides."""

    def load_text(text: str, *overrides: str) -> Experiment:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return load(path, overrides)

    return load_text


def lines(loading: Any, text: str, *overrides: str) -> list[str]:
    """The lines of the error that loading a text raises."""
    with pytest.raises(UserError) as caught:
        loading(text, *overrides)
    return str(caught.value).splitlines()


def test_all_mistakes_are_reported_at_once(written: Any, tmp_path: Path) -> None:
    text = "train:\n  lr: 1e-4\n  lr: 2e-4\n  epocs: 3\nloader:\n  size: big\n  size: wide\nlos: {}\n"
    found = lines(
        written, text, "train.momentum=-1", "bogus", "train.keep=1.5", "train.lr.x=3", "model.bakbone=x"
    )
    file = tmp_path / "x.yaml"
    assert sorted(found) == sorted(
        [
            f"{file}: key given twice in the mapping at line 2: lr; keep one",
            f"{file}: key given twice in the mapping at line 6: size; keep one",
            f'{file}: loader.size: input should be a valid integer, found "wide"',
            f"{file}: unknown key train.epocs; did you mean train.epochs?",
            f"{file}: unknown key los; did you mean loss?",
            "command line: train.momentum: input should be greater than or equal to 0, found -1",
            "command line: train.keep: input should be a valid integer, found 1.5",
            "command line: unknown key model.bakbone; did you mean model.backbone?",
            "'bogus': expected section.key=value, such as train.epochs=30",
            "'train.lr.x=3': 'lr' holds a value, not keys",
        ]
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {lr: '3e-4'}", "train.lr: input should be a valid number"),
        ("train: {epochs: true}", "train.epochs: input should be a valid integer, found true"),
        ("train: {epochs: 3.0}", "train.epochs: input should be a valid integer, found 3.0"),
        ("train: {compile: 1}", "train.compile: input should be a valid boolean, found 1"),
        ("train: {lr: .nan}", "train.lr: input should be a finite number, found NaN"),
        ("train: 3", "train: input should be an object, found 3"),
        (
            "loss: {mining: semihard}",
            (
                "'random', 'all', 'semi_hard', 'batch_hard', 'easy_positive' or 'patient_hard', "
                'found "semihard"'
            ),
        ),
        (
            "loss: {margin: hard}",
            'x.yaml: loss.margin: a number above 0, at most 2, or soft was expected, found "hard"',
        ),
        ("loss: {margin: 2.1}", "loss.margin: a number above 0, at most 2, or soft was expected, found 2.1"),
        ("loss: {contrastive_margin: 3}", "less than or equal to 2, found 3"),
        ("loss: {supcon_temperature: 1e-4}", "greater than or equal to 0.001, found 0.0001"),
        ("model: {embedding_dim: 1}", "greater than or equal to 2, found 1"),
        ("train: {timeout: 1e15}", "less than or equal to 100000000"),
        ("loss: {margin: 0}", "loss.margin: a number above 0, at most 2, or soft was expected, found 0"),
        ("loader: {augment: {scale: [1]}}", "loader.augment.scale.1: field required"),
        ("pack: {ratios: {train: 0.5}}", "pack.ratios: train + val + test must be 1, found 0.8"),
        (
            "loader: {augment: {preset: strong}}",
            "loader.augment.preset: input should be 'dermoscopy', 'reference' or 'none', found \"strong\"",
        ),
        ("loader: {augment: {preset: [none]}}", "'reference' or 'none', found [\"none\"]"),
        ("loader: {augment: {preset: none, scale: 2}}", "loader.augment.scale: input should be a valid"),
        ("loader: {augment: {preset: none, jpg: 2}}", "unknown key loader.augment.jpg; did you mean"),
        ("loader: {augment: {blur: 9}}", "loader.augment.blur: input should be less than or equal to 5"),
        ("loader: {augment: none}", 'loader.augment: input should be an object, found "none"'),
        ("loader: {dtype: float64}", "'float32', 'float16' or 'bfloat16', found \"float64\""),
        (
            "pack: {classes: {a: [1], b: [1]}}",
            "pack: classes: the label values ['1'] belong to more than one",
        ),
        ("pack: {positive: mel}", "pack: positive: 'mel' is none of the classes ['benign', 'melanoma']"),
        (
            "loss: {triplet: 0, classification: 0}",
            "loss: one of triplet, contrastive, supcon, arcface and classification must be above 0",
        ),
        ("margin: 0.3", "unknown key margin; did you mean loss.margin?"),
        ("2020-01-01: 3", "unknown key 2020-01-01"),
        ("- a", "sections such as `train:` were expected, found list"),
        ("train: [", "expected the node content"),
        ("a: \0", "special characters are not allowed"),
    ],
)
def test_a_mistake_is_explained_in_one_line(written: Any, text: str, expected: str) -> None:
    (line,) = lines(written, text)
    assert expected in line and "x.yaml" in line


def test_a_missing_file_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot read.*No such file.*configs/demo\.yaml"):
        load(tmp_path / "none.yaml")


def test_numbers_as_people_write_them(written: Any) -> None:
    text = "train: {lr: 3e-4, weight_decay: 1E-2, warmup: 2}\nloader: {mean: [0, 5e-1, 1]}"
    experiment = written(text)
    assert (experiment.train.lr, experiment.train.weight_decay, experiment.train.warmup) == (3e-4, 1e-2, 2)
    assert experiment.loader.mean == (0, 0.5, 1)


def test_two_numbers_with_a_colon_are_none_in_base_60(written: Any) -> None:
    assert written("tracking: {profile: 20:25}").tracking.profile == "20:25"
    assert written("", "tracking.profile=2:14", "tracking.tags=[1:2:3]").tracking.profile == "2:14"


def test_overrides_win_and_falsy_values_are_values(written: Any) -> None:
    experiment = written(
        "train: {patience: 5, seed: 3, lr: 1.0}\nloader: {augment: {hue: 4, shift: 0.1}}",
        *("train.patience=0", "train.lr=2e-3", "pack.undersample=false", "loader.augment.hue=0"),
        *("tracking.tags=[a, b]", "tracking.name=", "pack.positive=''"),
    )
    train = experiment.train
    assert (train.patience, train.seed, train.lr) == (0, 3, 2e-3)
    assert (experiment.loader.augment.hue, experiment.loader.augment.shift) == (0, 0.1)
    assert (experiment.tracking.tags, experiment.tracking.name) == (("a", "b"), None)
    assert (experiment.pack.undersample, experiment.pack.positive) == (False, "")


def test_a_preset_gives_the_values_that_are_not_given(written: Any) -> None:
    default, published = written("").loader.augment, written("loader: {augment: {preset: reference}}")
    assert written("loader: {augment: {preset: dermoscopy}}").loader.augment == default
    assert (default.blur, default.cutout, default.jpeg) == (0, 0, 0)
    reference = published.loader.augment
    assert (reference.scale, reference.shift, reference.hue) == ((1, 1), 0, 18)
    off = written("loader: {augment: {rotation: 20, hue: 3}}", "loader.augment.preset=none").loader.augment
    assert (off.rotation, off.hue, off.scale, off.symmetries) == (20, 3, (1, 1), False)
    assert not any(getattr(off, name) for name in ("shift", "brightness", "contrast", "saturation"))
    assert written(dump(published)) == published
    assert Augment(preset="none", scale=(0.5, 2)).scale == (0.5, 2)


def test_null_leaves_an_optional_section_out(written: Any) -> None:
    text = "synthetic: {images: 9}"
    assert written(text).synthetic.images == 9
    assert written(text, "synthetic=null").synthetic is None
    assert written(text, "synthetic=null", "synthetic.seed=1").synthetic.images == 3000
    assert lines(written, "", "train=null", "run=3", "none=null") == [
        "'run=3': expected section.key=value, such as train.epochs=30",
        "command line: train: input should be an object, found null",
        "command line: unknown key none",
    ]


def test_one_term_of_the_loss_is_enough(written: Any) -> None:
    for term in ("triplet", "classification"):
        assert getattr(written("", f"loss.{term}=0").loss, term) == 0


def test_an_empty_file_is_all_defaults(written: Any) -> None:
    assert written("") == written("# nothing\n") == Experiment()


def test_dump_and_load_are_inverse(written: Any) -> None:
    experiment = written(
        "train: {lr: 3e-4, compile: true}\ntracking: {tags: [a], entity: us}\nsynthetic: {images: 9}",
        "pack.classes={nevus: [0, nv], melanoma: ['1']}",
        "loader.augment.scale=[0.5, 2]",
    )
    assert written(dump(experiment)) == experiment != Experiment()


def test_a_runs_own_config_may_be_of_another_release(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "gone: {a: 1}\nloss: {soft_margin: false, margin: 0.3}\npack: {sources: {a: {table: t, far: 1}}}"
    )
    with pytest.raises(UserError, match=r"unknown key loss\.soft_margin"):
        load(path)
    found = load(path, of_run=True)
    assert found.loss.margin == 0.3 and set(found.pack.sources) == {"a"}
    path.write_text("gone: 1\nloss: {margin: wide}")
    with pytest.raises(UserError, match=r"loss\.margin"):
        load(path, of_run=True)
    path.write_text("loader: {gone: 1, classes_per_batch: 1}")  # which is told once the section can be read
    with pytest.raises(UserError, match=r"classes_per_batch"):
        load(path, of_run=True)


def test_an_experiment_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Experiment().train.lr = 1.0  # type: ignore[misc]


def test_every_field_explains_itself() -> None:
    silent = [
        key for key, field in fields(Experiment) if not (field.description or _inner_doc(field.annotation))
    ]
    assert not silent
    assert {"train.lr", "loader.augment.hue", "pack.ratios.val"} <= dict(fields(Experiment)).keys()


def _inner_doc(annotation: Any) -> str | None:
    section = section_of(annotation)
    return section.__doc__ if section and section.__doc__ != BaseModel.__doc__ else None
