"""The configurations that come with the project are valid, and say what they promise."""

from pathlib import Path

import pytest

from configs.load import dump, load
from pipeline.sampler import check_world_size

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "sweep.yaml"})  # W&B's


def test_the_promised_presets_are_there() -> None:
    names = {path.stem for path in PRESETS}
    assert names >= {"demo", "ham10000", "isic2020", "isic2020_reference"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    experiment = load(path)
    (tmp_path / "config.yaml").write_text(dump(experiment))
    assert load(tmp_path / "config.yaml") == experiment


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_eight_ranks(path: Path) -> None:
    experiment = load(path)
    balanced = experiment.loader.sampler != "shuffle"
    check_world_size(experiment.loader.global_batch, 8, len(experiment.pack.classes) if balanced else 1)


def test_presets_share_no_run_folder_and_a_shard_set_only_if_they_pack_it_alike() -> None:
    experiments = [load(path) for path in PRESETS]
    assert len({e.run.folder for e in experiments}) == len(experiments)
    for one in experiments:
        assert all(one.pack == other.pack for other in experiments if other.pack.output == one.pack.output)


def test_the_recipes_to_compare_differ_in_what_is_compared() -> None:
    default, reference, cross_entropy = (
        load(CONFIGS / f"ham10000{name}.yaml") for name in ("", "_reference", "_crossentropy")
    )
    published = load(CONFIGS / "isic2020_reference.yaml")
    for other in (reference, cross_entropy):
        same = ("pack", "loader", "model", "evaluate")
        assert all(getattr(other, name) == getattr(default, name) for name in same)
        assert other.train.epochs == default.train.epochs
    assert reference.loss == published.loss
    varied = {"epochs", "patience", "processes"}
    assert reference.train.model_dump(exclude=varied) == published.train.model_dump(exclude=varied)
    assert reference.classifier.model_dump(exclude={"threshold"}) == published.classifier.model_dump(
        exclude={"threshold"}
    )
    assert cross_entropy.train == default.train and cross_entropy.classifier == default.classifier
    assert (cross_entropy.loss.triplet, cross_entropy.loss.classification) == (0, 1)


def test_the_reference_is_the_published_recipe() -> None:
    e = load(PRESETS[0].with_name("isic2020_reference.yaml"))
    assert e.pack.group_column == "patient_id" and e.pack.undersample
    assert (e.pack.ratios.train, e.pack.ratios.val, e.pack.ratios.test) == (0.7, 0.1, 0.2)
    assert (e.pack.encode.size, e.loader.size) == (256, 256)
    assert e.loader.mean == e.loader.std == (0.5, 0.5, 0.5)
    augment = e.loader.augment
    assert augment.symmetries and augment.rotation > 0
    assert (augment.rotation, augment.scale, augment.shift, augment.hue) == (30, (1, 1), 0, 18)
    assert (augment.brightness, augment.contrast, augment.saturation) == (0.2, 0.2, 0.2)
    assert (e.model.backbone, e.model.embedding_dim) == ("resnet50", 512)
    assert (e.loss.mining, e.loss.triplet, e.loss.classification) == ("random", 1, 0)
    assert (e.train.epochs, e.classifier.epochs) == (100, 80)
    assert (e.classifier.hidden, e.classifier.dropout, e.classifier.threshold) == ((256, 64), 0.4, "half")
    assert e.classifier.imbalance == "none"
