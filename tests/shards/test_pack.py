"""A shard set is what its contract says, for any number of workers and every reader; or nothing is left."""

import csv
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from PIL import Image

from configs.errors import UserError
from configs.packing import Pack
from shards.claims import lock
from shards.describe import check_made_by
from shards.facts import describe
from shards.pack import pack
from shards.shardset import SPLITS, ShardSet


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict[str, str]], encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def changed(settings: Pack, **fields: Any) -> Pack:
    return Pack.model_validate(settings.model_dump() | fields)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def jpeg(shards: ShardSet, index: int) -> bytes:
    data = shards.paths[shards.shard[index]].read_bytes()
    return data[shards.offsets[index] :][: shards.sizes[index]]


def packed(settings: Pack) -> ShardSet:
    pack(settings, progress=False)
    return ShardSet.open(settings.output)


def test_every_image_is_packed_once_with_its_own_bytes(tiny_shards: ShardSet, tiny_images: Path) -> None:
    rows = {row["isic_id"]: row for row in read_table(tiny_images / "metadata.csv")}
    assert sorted(tiny_shards.keys) == sorted(rows)
    for index, key in enumerate(tiny_shards.keys):
        assert jpeg(tiny_shards, index) == (tiny_images / "images" / f"{key}.jpg").read_bytes()
        assert tiny_shards.labels[index] == int(rows[key]["target"])
        assert tiny_shards.group_names[tiny_shards.groups[index]] == rows[key]["patient_id"]
        site = rows[key]["anatom_site_general"]
        assert tiny_shards.samples["anatom_site_general"][index].as_py() == (site or None)
    assert tiny_shards.classes[tiny_shards.positive] == "melanoma"


def test_the_originals_size_is_kept(tiny_pack: Pack, tiny_images: Path, tmp_path: Path) -> None:
    shards = packed(changed(tiny_pack, output=tmp_path / "shards", encode={"size": 32}))
    sizes = [
        Image.open(tiny_images / "images" / f"{key}.jpg").size for key in shards.samples["key"].to_pylist()
    ]
    originals = [shards.samples[f"original_{side}"].to_pylist() for side in ("width", "height")]
    assert list(zip(*originals, strict=True)) == sizes
    assert min(*shards.widths, *shards.heights) == 32 < min(min(size) for size in sizes)
    said = " ".join(line.strip() for line in describe(shards))
    widths, heights = zip(*sizes, strict=True)
    assert f"width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)} pixels" in said
    assert any(line.startswith("originals") for line in describe(shards))


def test_splits_are_disjoint_complete_and_shuffled(tiny_shards: ShardSet) -> None:
    parts = [tiny_shards.split(name) for name in SPLITS]
    assert np.concatenate(parts).tolist() == list(range(len(tiny_shards)))
    groups = [set(tiny_shards.groups[part]) for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 24
    assert list(tiny_shards.keys[parts[0]]) != sorted(tiny_shards.keys[parts[0]])
    assert max(np.bincount(tiny_shards.shard)) <= 40


def test_bytes_do_not_depend_on_workers(tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path) -> None:
    for workers in (1, 2):
        pack(changed(tiny_pack, output=tmp_path / str(workers), workers=workers), progress=False)
        files = {file.name: file.read_bytes() for file in (tmp_path / str(workers)).iterdir()}
        assert files == {file.name: file.read_bytes() for file in tiny_shards.folder.iterdir()}
    assert names(tmp_path) == ["1", "2"]


def test_the_webdataset_package_reads_the_shards(tiny_shards: ShardSet) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in tiny_shards.paths]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == list(tiny_shards.keys)
    assert [sample["cls"] for sample in decoded] == tiny_shards.labels.tolist()
    for index, (sample, seen) in enumerate(zip(samples, decoded, strict=True)):
        assert sample["jpg"] == jpeg(tiny_shards, index)
        assert seen["jpg"].shape == (tiny_shards.heights[index], tiny_shards.widths[index], 3)
        assert seen["json"]["group"] == tiny_shards.group_names[tiny_shards.groups[index]]


def test_dali_reads_the_shards_through_our_index(tiny_shards: ShardSet) -> None:
    @pipeline_def(batch_size=len(tiny_shards), num_threads=1, device_id=None)
    def reader() -> Any:
        return tuple(
            fn.readers.webdataset(
                paths=[str(path) for path in tiny_shards.paths],
                index_paths=[str(path.with_suffix(".idx")) for path in tiny_shards.paths],
                ext=["jpg", "cls", "json"],
                missing_component_behavior="error",
            )
        )

    jpgs, labels, infos = reader().run()
    for index in range(len(tiny_shards)):
        assert bytes(np.asarray(jpgs[index])) == jpeg(tiny_shards, index)
        assert int(bytes(np.asarray(labels[index]))) == tiny_shards.labels[index]
        assert json.loads(bytes(np.asarray(infos[index])))["key"] == tiny_shards.keys[index]


def test_tar_reads_the_shards_without_a_word(tiny_shards: ShardSet, tmp_path: Path) -> None:
    for path in tiny_shards.paths:
        done = subprocess.run(["tar", "xf", path, "-C", tmp_path], capture_output=True, check=True)
        assert not done.stderr
    assert len(list(tmp_path.iterdir())) == 3 * len(tiny_shards)
    for index, key in enumerate(tiny_shards.keys):
        assert (tmp_path / f"{key}.jpg").read_bytes() == jpeg(tiny_shards, index)


def test_untidy_tables_give_the_same_set(tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path) -> None:
    """A byte order mark, a column without a name, endings, spaces, floats for ints; images deeper down."""
    rows = read_table(tiny_pack.table)
    untidy = [
        {"": str(n)} | row | {"isic_id": f"{row['isic_id']}.JPG", "target": f" {row['target']}.0 "}
        for n, row in enumerate(rows)
    ]
    write_table(tmp_path / "table.csv", untidy, "utf-8-sig")
    for number, image in enumerate(sorted(Path(tiny_pack.images).iterdir())):
        deeper = tmp_path / "images" / str(number % 3) / "image"
        deeper.mkdir(parents=True, exist_ok=True)
        (deeper / f"{image.stem}{('.jpg', '.JPG', '.jpeg')[number % 3]}").symlink_to(image)
    settings = changed(tiny_pack, table=tmp_path / "table.csv", images=tmp_path / "images")
    again = packed(changed(settings, output=tmp_path / "shards"))
    for column in ("key", "split", "label", "group", "crc32", "age_approx"):
        assert again.samples[column].to_pylist() == tiny_shards.samples[column].to_pylist()
    assert again.samples["target"][0].as_py() in {" 0.0 ", " 1.0 "}


def test_columns_that_would_clash_are_renamed(tiny_pack: Pack, tmp_path: Path) -> None:
    rows = [row | {"split": "theirs", "label": "07", "big": "1e99"} for row in read_table(tiny_pack.table)]
    for row, big in zip(rows, ("1e999", "-1e999", ""), strict=False):
        row["beyond"] = big
    write_table(tmp_path / "table.csv", rows)
    settings = changed(tiny_pack, table=tmp_path / "table.csv", output=tmp_path / "shards")
    shards = packed(settings)
    assert set(shards.samples["source_split"].to_pylist()) == {"theirs"}
    assert set(shards.samples["source_label"].to_pylist()) == {"07"}  # not the number 7
    assert shards.samples["age_approx"].type == "int64"
    assert shards.samples["big"].type == "double"
    assert set(shards.samples["beyond"].to_pylist()) == {"1e999", "-1e999", None}  # not infinite


def test_duplicates_are_tied_or_dropped(tiny_pack: Pack, tmp_path: Path) -> None:
    """A chain of duplicates over three patients; one pair with an image that is not in the table."""
    chain = ["TINY_0002", "TINY_0000", "TINY_0001"]
    lines = ["image_1,image_2", *map(",".join, (chain[:2], chain[1:], ["TINY_0003", "ELSEWHERE"]))]
    (tmp_path / "duplicates.csv").write_text("\n".join(lines) + "\n")
    for action, left in (("tie", 120), ("drop", 118)):
        more = {"duplicates": tmp_path / "duplicates.csv", "duplicates_action": action}
        shards = packed(changed(tiny_pack, output=tmp_path / action, **more))
        assert len(shards) == left
        split_of = dict(zip(shards.keys, shards.samples["split"].to_pylist(), strict=True))
        assert len({split_of[key] for key in chain if key in split_of}) == 1
        assert [key for key in chain if key in split_of] == (chain if action == "tie" else ["TINY_0000"])


def test_undersampled_sets_are_balanced(tiny_pack: Pack, tmp_path: Path) -> None:
    shards = packed(changed(tiny_pack, output=tmp_path / "shards", undersample=True))
    benign, melanoma = np.bincount(shards.labels)
    assert benign == melanoma > 20


def test_settings_other_than_those_packed_with_are_noticed(
    tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    same = {"workers": 7, "images": tmp_path, "output": tmp_path, "table": tmp_path / "not here.csv"}
    made, where = tiny_shards.manifest, tiny_shards.folder
    check_made_by(made, tiny_pack, where)
    check_made_by(made, changed(tiny_pack, **same), where)
    with pytest.raises(
        UserError, match=r"format version 2, this release makes 3; delete it, or set pack\.output"
    ):
        check_made_by({**made, "version": 2}, tiny_pack, where)
    with pytest.raises(UserError, match=r"pack.folds is 4, was 0, pack.seed is 3, was 0"):
        check_made_by(made, changed(tiny_pack, seed=3, folds=4), where)
    (tmp_path / "table.csv").write_text(tiny_pack.table.read_text() + "\n")
    for key in ("table", "duplicates"):
        with pytest.raises(UserError, match=f"pack.{key} is .*table.csv, was"):
            check_made_by(made, changed(tiny_pack, **{key: tmp_path / "table.csv"}), where)


def test_a_notice_beside_the_table_goes_with_the_set(
    tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    assert tiny_shards.notice == "" and "notice" not in tiny_shards.manifest
    write_table(tmp_path / "metadata.csv", read_table(tiny_pack.table))
    settings = changed(tiny_pack, table=tmp_path / "metadata.csv")
    for text, notice in (("Drawn, not photographed: Ö.\n", "Drawn, not photographed: Ö."), (" \n", "")):
        (tmp_path / "NOTICE.txt").write_text(text, encoding="utf-8")
        shards = packed(changed(settings, output=tmp_path / f"shards{notice[:5]}"))
        assert shards.notice == notice and ("notice" in shards.manifest) == bool(notice)
        check_made_by(shards.manifest, settings, shards.folder)


def test_nothing_but_bad_images_is_an_error_whatever_is_allowed(tiny_pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for image in Path(tiny_pack.images).iterdir():
        (tmp_path / "images" / image.name).write_bytes(b"")
    settings = changed(tiny_pack, images=tmp_path / "images", output=tmp_path / "shards", max_rejected=1)
    with pytest.raises(UserError, match="120 of 120 images cannot be used"):
        pack(settings, progress=False)


def test_what_is_rejected_is_listed_in_the_set(tiny_pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "images" / "deeper").mkdir(parents=True)
    for image in Path(tiny_pack.images).iterdir():
        (tmp_path / "images" / "deeper" / image.name).write_bytes(image.read_bytes())
    (tmp_path / "images" / "deeper" / "TINY_0007.jpg").write_bytes(b"garbage")
    shards = packed(changed(tiny_pack, images=tmp_path / "images", output=tmp_path / "shards"))
    assert len(shards) == 119 and "TINY_0007" not in shards.keys
    (row,) = read_table(shards.folder / "rejected.csv")
    assert (row["key"], row["file"]) == ("TINY_0007", "deeper/TINY_0007.jpg")
    assert "not an image" in row["reason"] and shards.manifest["rejected"] == 1
    assert "rejected.csv" in shards.manifest["files"]


def test_a_rejected_file_may_have_any_name(tiny_pack: Pack, tmp_path: Path) -> None:
    """As a folder from an old Windows has: Latin-1, not UTF-8."""
    deeper = tmp_path / "images" / os.fsdecode(b"K\xf6rper")
    deeper.mkdir(parents=True)
    for image in Path(tiny_pack.images).iterdir():
        (deeper / image.name).write_bytes(image.read_bytes() if image.stem != "TINY_0007" else b"")
    shards = packed(changed(tiny_pack, images=tmp_path / "images", output=tmp_path / "shards"))
    (row,) = read_table(shards.folder / "rejected.csv")
    assert (row["key"], row["file"]) == ("TINY_0007", "K?rper/TINY_0007.jpg")


def test_no_place_to_write_is_one_clear_line(tiny_pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/shards: cannot be written \(.+\); make room"):
        pack(changed(tiny_pack, output=tmp_path / "file" / "shards"), progress=False)
    assert names(tmp_path) == ["file"]


Spoil = Callable[[Path, list[dict[str, str]]], dict[str, Any] | None]


def edit(row: int, **values: str) -> Spoil:
    return lambda _, rows: rows[row].update(values)


def file(name: str, data: bytes) -> Spoil:
    def write(folder: Path, _: object) -> None:
        path = folder / "images" / name
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    return write


def drop_column(name: str) -> Spoil:
    def drop(_: object, rows: list[dict[str, str]]) -> None:
        for row in rows:
            row["image_" + name] = row.pop(name)

    return drop


def relabel_all(_: object, rows: list[dict[str, str]]) -> None:
    for row in rows:
        row["target"] = "0"


def one_positive_patient(_: object, rows: list[dict[str, str]]) -> None:
    for row in rows:
        row["target"] = str(int(row["patient_id"] == "P01"))


def two_patients(_: object, rows: list[dict[str, str]]) -> None:
    for number, row in enumerate(rows):
        row["patient_id"] = f"P{number // 2 % 2}"


def same_name_twice(folder: Path, _: object) -> None:
    (folder / "images" / "TINY_0003.png").write_bytes(b"")


BAD: list[tuple[Spoil, list[str]]] = [
    (lambda folder, _: {"table": folder / "none.csv"}, ["none.csv", "not found", "pack.table"]),
    (lambda folder, _: {"table": folder / "images"}, ["cannot be read", "pack.table"]),
    (lambda folder, _: {"images": folder / "none"}, ["no such folder or file", "pack.images"]),
    (drop_column("isic_id"), ["'isic_id'", "it has", "perhaps to image_isic_id"]),
    (drop_column("patient_id"), ["'patient_id'", "pack.group_column", "image_patient_id"]),
    (drop_column("target"), ["'target'", "pack.label_column"]),
    (edit(5, isic_id="TINY_0004"), ["TINY_0004", "more than once"]),
    (edit(5, isic_id=" "), ["no image id", "data row 6"]),
    (edit(5, patient_id=""), ["no group", "'patient_id'", "data row 6"]),
    (edit(5, isic_id="TINY.0004 b"), ["'TINY.0004 b'", "without dot, space"]),
    (edit(5, isic_id="TINY_9999"), ["1 of the table's 120", "not found", "TINY_9999"]),
    (edit(5, target="2"), ["no class", "TINY_0005", "'2' (1)", "pack.classes knows 0, 1"]),
    (edit(5, target=""), ["no class", "''"]),
    (relabel_all, ["no image of class melanoma"]),
    (one_positive_patient, ["has no melanoma", "24 groups", "1 with melanoma", "pack.ratios"]),
    (two_patients, ["val has no benign", "val has no melanoma", "2 groups"]),
    (same_name_twice, ["TINY_0003", "2 files", "TINY_0003.png"]),
    (lambda folder, _: {"duplicates": folder / "metadata.csv"}, ["pack.duplicates", "two columns"]),
    (lambda folder, _: {"output": folder / "images"}, ["exists already", "pack.output"]),
]


def test_the_same_command_again_leaves_a_whole_set_as_it_is(
    tiny_pack: Pack, tiny_shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_shards.folder.iterdir()}
    assert pack(tiny_pack) == tiny_shards.manifest
    assert capsys.readouterr().err.startswith("packed already, by these settings")
    assert {path: path.stat().st_mtime_ns for path in tiny_shards.folder.iterdir()} == before
    with pytest.raises(UserError, match=r"was packed with other settings: pack\.seed is 77"):
        pack(tiny_pack.model_copy(update={"seed": 77}), progress=False)
    assert {path: path.stat().st_mtime_ns for path in tiny_shards.folder.iterdir()} == before
    assert not list(tiny_shards.folder.parent.glob(f".{tiny_shards.folder.name}*"))


@pytest.fixture
def spoilt(tiny_pack: Pack, tmp_path: Path) -> Iterator[tuple[Path, list[dict[str, str]]]]:
    """A copy of the tiny set to spoil."""
    (tmp_path / "images").mkdir()
    for image in Path(tiny_pack.images).iterdir():
        (tmp_path / "images" / image.name).symlink_to(image)
    yield tmp_path, read_table(tiny_pack.table)


@pytest.mark.parametrize(
    ("spoil", "words"), BAD, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_bad_input_gets_one_clear_line_and_leaves_nothing(
    tiny_pack: Pack, spoilt: tuple[Path, list[dict[str, str]]], spoil: Spoil, words: list[str]
) -> None:
    folder, rows = spoilt
    write_table(folder / "metadata.csv", rows)
    fields = {"table": folder / "metadata.csv", "images": folder / "images", "output": folder / "shards"}
    fields |= spoil(folder, rows) or {}
    write_table(folder / "metadata.csv", rows)
    before = names(folder)
    with pytest.raises(UserError) as caught:
        pack(changed(tiny_pack, **fields), progress=False)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert names(folder) == before


def test_a_packer_that_was_killed_leaves_no_trace_in_the_next_set(tiny_pack: Pack, tmp_path: Path) -> None:
    leftover = tmp_path / ".shards.partial" / "set"
    leftover.mkdir(parents=True)
    (leftover / "train-000099.tar").write_bytes(b"half")
    shards = packed(changed(tiny_pack, output=tmp_path / "shards"))
    assert not (shards.folder / "train-000099.tar").exists()
    assert names(tmp_path) == ["shards"]


def test_a_second_packer_is_refused(tiny_pack: Pack, tmp_path: Path) -> None:
    partial = tmp_path / ".shards.partial"
    partial.mkdir()
    handle = lock(partial / "packing.lock")
    assert handle is not None
    try:
        with pytest.raises(UserError, match="another process"):
            pack(changed(tiny_pack, output=tmp_path / "shards"), progress=False)
    finally:
        os.close(handle)
    assert names(partial) == ["packing.lock"]
