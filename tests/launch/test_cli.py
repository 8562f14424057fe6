"""Every verb from end to end on a tiny set, as a user types it, and what a user's mistakes are told."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from configs.load import fields, section_of
from configs.schema import Experiment
from launch import cli

DEMO = str(cli.DEMO)


def tiny(folder: Path) -> list[str]:
    """The demo made small enough for a test, everything under `folder`."""
    return [
        f"synthetic.output={folder}/images",
        "synthetic.images=60",
        "synthetic.patients=24",
        "synthetic.prevalence=0.4",
        "synthetic.size=48",
        "synthetic.workers=1",
        f"pack.table={folder}/images/metadata.csv",
        f"pack.images={folder}/images/images",
        f"pack.output={folder}/shards",
        "pack.encode.size=40",
        "pack.workers=1",
        "loader.global_batch=8",
        "loader.size=32",
        "train.epochs=1",
        "train.processes=2",
        "classifier.epochs=3",
        "evaluate.bootstrap=100",
        "tracking.mode=offline",
        f"run.folder={folder}/run",
    ]


class Said(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def moleprint(capfd: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """The command in this process; stages under torchrun start their own."""

    def run(*arguments: object) -> Said:
        try:
            cli.main([str(a) for a in arguments])
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return Said(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made by the verbs one by one."""
    folder = tmp_path_factory.mktemp("cli")
    for verb in ("synthesize", "pack", "train", "embed", "classify", "evaluate"):
        cli.main([verb, DEMO, *tiny(folder)])
    return folder


def test_the_demo_is_what_its_stages_are(folder: Path, moleprint) -> None:  # type: ignore[no-untyped-def]
    """All stages in a row: what is finished is skipped, and the report's figures are printed as they are."""
    weights = folder / "run" / "encoder.safetensors"
    before = weights.stat().st_mtime_ns
    done = moleprint("demo", *tiny(folder))
    assert done.status == 0, done.err
    for stage in ("synthesize", "pack", "train", "embed", "classify"):
        assert f"── {stage}: finished before" in done.out
    assert weights.stat().st_mtime_ns == before
    report = folder / "run" / "report"
    test = json.loads((report / "metrics.json").read_text())["test"]
    assert test["images"] == sum(map(sum, test["confusion_matrix"]))
    auc = test["roc_auc"]
    assert 0 <= auc["low"] <= auc["value"] <= auc["high"] <= 1
    assert re.search(rf"ROC-AUC +{auc['value']:.3f} \[{auc['low']:.3f}, {auc['high']:.3f}\]", done.out)
    assert str(report / "index.html") in done.out
    assert "drawn by a computer" in done.out
    assert "drawn by a computer" in (report / "index.html").read_text()


def test_run_repeats_only_what_changed(folder: Path, moleprint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(folder / "run", tmp_path / "run")
    done = moleprint("run", DEMO, *tiny(folder), f"run.folder={tmp_path}/run", "classifier.dropout=0.1")
    assert done.status == 0, done.err
    assert "── embed: finished before" in done.out
    assert "── classify\n" in done.out
    assert "dropout: 0.1" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_report_is_of_the_settings_it_tells(folder: Path, moleprint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(folder / "run", tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    others = (
        "loss.margin=0.2",
        "classifier.threshold=half",
        "embed.symmetries=true",
        "loss.schedule={random: 0.5}",
    )
    done = moleprint("evaluate", DEMO, *tiny(folder), f"run.folder={tmp_path}/run", *others)
    assert done.status == 2 and "was made with other settings" in done.err
    for line in (
        "loss.margin: soft → 0.2",
        "classifier.threshold: youden → half",
        "embed.symmetries: False → True",
    ):
        assert f"  {line}\n" in done.err
    assert "loss.schedule: {} → {'random': 0.5}\n" in done.err and "moleprint run CONFIG" in done.err
    for verb, other, said in (
        ("evaluate", "pack.group_column=lesion_id", "pack.group_column is lesion_id, was patient_id"),
        ("classify", "embed.dtype=float16", "embed.dtype: float32 → float16"),
        ("embed", "model.bnneck=true", "model.bnneck: False → True"),
    ):
        done = moleprint(verb, DEMO, *tiny(folder), f"run.folder={tmp_path}/run", other)
        assert done.status == 2 and said in done.err
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_an_older_runs_settings_are_known_by_their_names(folder: Path, moleprint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(folder / "run", tmp_path / "run")
    for name, section in (("encoder", "loss"), ("classifier", "settings")):
        path = tmp_path / "run" / f"{name}.json"
        about = json.loads(path.read_text())
        del about["made_from"][section]["arcface" if section == "loss" else "cost"]  # not known then
        about["made_from"][section]["gone"] = 1  # not known now
        path.write_text(json.dumps(about))
    again = ("evaluate", DEMO, *tiny(folder), f"run.folder={tmp_path}/run")
    assert moleprint(*again).status == 0
    done = moleprint(*again, "classifier.cost=7", "loss.arcface=0.5")
    assert "loss.arcface: 0.0 → 0.5\n" in done.err and "classifier.cost: 20.0 → 7.0\n" in done.err


def test_drawn_data_are_called_so_whatever_the_configuration(folder: Path, moleprint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(folder / "run", tmp_path / "run")
    done = moleprint("evaluate", DEMO, *tiny(folder), f"run.folder={tmp_path}/run", "synthetic=null")
    assert done.status == 0, done.err
    assert "drawn by a computer" in done.out


def test_verify(folder: Path, moleprint) -> None:  # type: ignore[no-untyped-def]
    assert "train" in moleprint("verify", folder / "shards").out


def test_inspect_shows_a_set_by_its_folder_or_configuration(folder: Path, moleprint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    sheet = tmp_path / "sheet.png"
    by_folder = moleprint("inspect", folder / "shards", "--sheet", sheet)
    assert by_folder.status == 0 and sheet.read_bytes().startswith(b"\x89PNG")
    by_config = moleprint("inspect", DEMO, *tiny(folder), "--sheet", sheet)
    assert by_config.out == by_folder.out and "melanoma" in by_config.out


def test_inspect_shows_augmentation_by_configuration(folder: Path, moleprint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = moleprint("inspect", DEMO, *tiny(folder), "--augmented", "loader.augment.rotation=40")
    assert done.status == 0 and "rotation ±40 degrees" in done.out, done.err
    assert (folder / "shards-augmented.png").read_bytes().startswith(b"\x89PNG")
    done = moleprint("inspect", folder / "shards", "--augmented", "--sheet", tmp_path / "sheet.png")
    assert done.status == 2 and "--augmented needs a configuration" in done.err


def test_predict_agrees_with_the_report(folder: Path, moleprint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A run folder alone gives the test set's images the probabilities that the report gave them."""
    shutil.copytree(folder / "run", tmp_path / "run")
    report = (folder / "run" / "report" / "predictions_test.csv").read_text().splitlines()
    column = report[0].split(",").index("probability")
    expected = {row.split(",")[0]: float(row.split(",")[column]) for row in report[1:]}
    images = [folder / "images" / "images" / f"{key}.jpg" for key in expected]
    assert moleprint("predict", tmp_path / "run", *images, "--output", tmp_path / "out.csv").status == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        found = [float(row["probability.melanoma"]) for row in csv.DictReader(file)]
    assert found == pytest.approx(list(expected.values()), abs=1e-6)


def test_a_broken_image_is_named_to_predict(folder: Path, moleprint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    done = moleprint("predict", folder / "run", broken)
    assert done.status == 1
    assert "broken.jpg" in done.out and "not an image" in done.out
    assert "1 of 1 images have no verdict" in done.err


def test_a_run_is_exported(folder: Path, moleprint, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    output = tmp_path / "bundle"
    done = moleprint("export", folder / "run", "--format", "safetensors", "--output", output)
    assert done.status == 0, done.err
    assert re.search(r"largest difference from the run: \d\.\de-\d\d in probability.*random images", done.out)
    assert "16 real images" in done.out and "drawn by a computer" in (output / "README.md").read_text()


def test_bench_writes_its_rows(  # type: ignore[no-untyped-def]
    folder: Path, moleprint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import benchmark

    assert benchmark.bench.__kwdefaults__
    for wait in ("warm_up", "seconds"):
        monkeypatch.setitem(benchmark.bench.__kwdefaults__, wait, 0.01)
    monkeypatch.setattr(benchmark, "names", lambda _: ["reference", "moleprint"])
    done = moleprint("bench", "loader", DEMO, *tiny(folder), "--json", tmp_path / "rows.json")
    assert done.status == 0, done.err
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["reference"]["ratio"] == 1
    assert rows["moleprint"]["images_per_second"] > 0


@pytest.mark.parametrize("verb", cli.STAGE_VERBS)
def test_help_shows_every_field_of_the_stage(verb: str, moleprint) -> None:  # type: ignore[no-untyped-def]
    shown = moleprint(verb, "--help").out
    for section in cli.STAGE_VERBS[verb][1]:
        model = section_of(Experiment.model_fields[section].annotation)
        assert model is not None
        for key, field in fields(model, f"{section}."):
            assert f"  {key}: " in shown if section_of(field.annotation) else f"  {key} = " in shown


MISTAKES = {
    "pack DEMO pack.output=new pack.label_column=diagnosis": ["diagnosis", "pack.label_column"],
    "pack DEMO pack.seed=5": ["pack.seed", "pack.output"],
    "train DEMO loader.global_batch=10 run.folder=new": ["global_batch=10", "2 ranks"],
    "train DEMO pack.output=nowhere": ["nowhere", "moleprint pack"],
    "train DEMO model.embedding_dim=64": ["another configuration", "model.embedding_dim"],
    "train DEMO train.epoch=3": ["train.epoch", "did you mean train.epochs?"],
    "embed DEMO run.folder=nowhere": ["nowhere", "moleprint train"],
    "classify DEMO run.folder=nowhere": ["nowhere", "moleprint embed"],
    "evaluate DEMO run.folder=nowhere": ["nowhere", "moleprint classify"],
    "run DEMO pack.seed=5": ["pack.seed", "pack.output"],
    "run DEMO synthetic.images=61": ["synthetic.images", "synthetic.output"],
    "train DEMO loader.sampler=shuffle loader.global_batch=2 run.folder=new": ["global_batch=2", "2 ranks"],
    "train DEMO model.weights=nothere.pth run.folder=deep/new": ["nothere.pth"],
    "embed DEMO pack.output=damaged embed.dtype=float16": ["damaged", "moleprint verify"],
    "run nowhere.yaml": ["nowhere.yaml", "configs/demo.yaml"],
    "verify nowhere": ["nowhere", "not a shard set"],
    "bench loader DEMO pack.output=nowhere": ["nowhere", "moleprint pack"],
    "predict nowhere a.jpg": ["nowhere", "moleprint train"],
    "predict nowhere a.jpg --output .": ["."],
    "export nowhere --format onnx --output new": ["nowhere", "moleprint train"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(  # type: ignore[no-untyped-def]
    folder: Path, mistake: str, moleprint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb, *rest = mistake.split()
    arguments = [word for r in rest for word in ([DEMO, *tiny(folder)] if r == "DEMO" else [r])]
    monkeypatch.chdir(tmp_path)
    if "damaged" in mistake:
        damaged = shutil.copytree(folder / "shards", tmp_path / "damaged")
        tar = damaged / "test-000000.tar"
        tar.write_bytes(tar.read_bytes()[:600] + b"damage" + tar.read_bytes()[606:])
    before = sorted(tmp_path.iterdir())
    done = moleprint(verb, *arguments)
    assert done.status == 2, done.err
    told = [line for line in done.err.splitlines() if "error:" in line]
    # Another configuration's run is told with a line a difference, all else in one line.
    assert len(told) == 1 or (told and told[0].endswith("differing in")), done.err
    assert "Traceback" not in done.err
    for word in MISTAKES[mistake]:
        assert word in " ".join(told)
    assert sorted(tmp_path.iterdir()) == before
