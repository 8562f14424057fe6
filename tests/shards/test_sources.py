"""Whatever kind of table and place the images come from, the same set comes out."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import csv

from configs.errors import UserError
from configs.packing import Encode, Pack
from shards import webshards
from shards.describe import check_made_by
from shards.encode import encode
from shards.images import locate, read
from shards.leaks import crossing
from shards.pack import pack
from shards.records import read as read_records
from shards.shardset import ShardSet


def packed(settings: Pack, **fields: Any) -> ShardSet:
    settings = Pack.model_validate(settings.model_dump() | fields)
    pack(settings, progress=False)
    return ShardSet.open(settings.output)


def in_tar(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname="train-image")
    return path


def in_zip(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for image in sorted(folder.iterdir()):
            archive.write(image, f"deeper/{image.name}")
    return path


def in_hdf5(folder: Path, path: Path) -> Path:
    """As ISIC 2024 has it: one scalar of encoded bytes an image, by its id."""
    with h5py.File(path, "w") as file:
        for image in folder.iterdir():
            file.create_dataset(image.stem, data=np.void(image.read_bytes()))
    return path


def in_webshards(folder: Path, path: Path, rows: list[dict[str, Any]] | None = None) -> str:
    """Two shards as the webdataset package writes them, with labels inside if rows are given."""
    import webdataset

    about = {row["isic_id"]: row for row in rows or []}
    images = sorted(folder.iterdir())
    for number, part in enumerate((images[::2], images[1::2])):
        with webdataset.TarWriter(str(path / f"web-{number:03d}.tar")) as writer:
            for image in part:
                sample: dict[str, Any] = {"__key__": image.stem, "jpg": image.read_bytes()}
                if rows:
                    row = about[image.stem]
                    sample |= {
                        "cls": row["target"],
                        "json": {"patient": row["patient_id"], "age": row["age_approx"]},
                    }
                writer.write(sample)
    return str(path / "web-{000..001}.tar")


def make(kind: str, folder: Path, scratch: Path) -> str:
    """The images of a folder, put into another kind of place."""
    if kind == "shards":
        return in_webshards(folder, scratch)
    if kind == "shards at a URL":
        return "file://" + in_webshards(folder, scratch)
    makers = {".tar": in_tar, ".zip": in_zip, ".hdf5": in_hdf5}
    if kind == ".tar.gz":
        return str(in_tar(folder, scratch / "images.tar.gz", "w:gz"))
    return str(makers[kind](folder, scratch / f"images{kind}"))


@pytest.mark.parametrize("kind", [".tar", ".tar.gz", ".zip", ".hdf5", "shards", "shards at a URL"])
def test_every_kind_of_place_gives_the_same_bytes(
    kind: str, tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    place = make(kind, Path(tiny_pack.images), tmp_path / "source")
    shards = packed(tiny_pack, images=place, output=tmp_path / "shards")
    assert [path.read_bytes() for path in shards.paths] == [path.read_bytes() for path in tiny_shards.paths]
    assert shards.samples.equals(tiny_shards.samples)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "source"]


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_every_kind_of_table_gives_the_same_set(
    kind: str, tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    table = csv.read_csv(tiny_pack.table)
    if kind == "tsv":
        csv.write_csv(table, tmp_path / "table.tsv", csv.WriteOptions(delimiter="\t"))
    else:
        table = table.set_column(
            table.column_names.index("target"), "target", table["target"].cast(pa.float64())
        )
        pq.write_table(
            table.append_column("boxes", pa.array([[1, 2]] * table.num_rows)), tmp_path / "table.parquet"
        )
    shards = packed(tiny_pack, table=tmp_path / f"table.{kind}", output=tmp_path / "shards")
    for name in ("key", "label", "group", "split", "crc32"):
        assert shards.samples[name].equals(tiny_shards.samples[name])
    assert "boxes" not in shards.samples.column_names


def facts(shards: ShardSet) -> dict[str, tuple[int, str]]:
    """Label and group of every key."""
    columns = shards.labels.tolist(), shards.samples["group"].to_pylist()
    return dict(zip(shards.keys, zip(*columns, strict=True), strict=True))


def test_shards_with_their_own_labels_need_no_table(
    tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    place = in_webshards(Path(tiny_pack.images), tmp_path, csv.read_csv(tiny_pack.table).to_pylist())
    columns = {"id_column": "key", "group_column": "patient", "label_column": "cls"}
    shards = packed(tiny_pack, table=None, images=place, output=tmp_path / "shards", **columns)
    assert facts(shards) == facts(tiny_shards)
    assert shards.samples["age"].type == "int64"


def test_a_folder_holds_images_of_every_format_that_can_be_decoded(tmp_path: Path) -> None:
    kinds = {"jpg": "JPEG", "gif": "GIF", "PPM": "PPM", "pgm": "PPM", "jp2": "JPEG2000", "avif": "AVIF"}
    for ending, kind in kinds.items():
        Image.new("L" if ending == "pgm" else "RGB", (8, 8)).save(tmp_path / f"{ending}.{ending}", kind)
    (tmp_path / "notes.txt").touch()
    refs = locate(list(kinds), str(tmp_path), tmp_path / "scratch")
    for ref in refs:
        assert encode(read(ref), Encode(), name=ref.name).width == 8


def test_our_own_shards_can_be_packed_again(tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path) -> None:
    place = "::".join(str(path) for path in tiny_shards.paths)
    columns = {"id_column": "key", "group_column": "group", "label_column": "cls"}
    shards = packed(tiny_pack, table=None, images=place, output=tmp_path / "shards", **columns)
    assert sorted(shards.samples["crc32"].to_pylist()) == sorted(tiny_shards.samples["crc32"].to_pylist())
    assert len(shards) == len(tiny_shards)


def test_a_url_is_read_once(tiny_pack: Pack, tmp_path: Path) -> None:
    place = "file://" + in_webshards(Path(tiny_pack.images), tmp_path)
    ids = [path.stem for path in Path(tiny_pack.images).iterdir()]
    refs = locate(ids, place, tmp_path / "scratch")
    for path in tmp_path.glob("web-*.tar"):
        path.unlink()
    again = locate(ids, place, tmp_path / "scratch")
    assert again == refs
    assert read(again[0]) == (Path(tiny_pack.images) / f"{ids[0]}.jpg").read_bytes()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads http through curl")
def test_shards_are_read_over_http(tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    in_webshards(Path(tiny_pack.images), tmp_path / "site")
    code = (
        "import functools, http.server as h; s = h.ThreadingHTTPServer(('127.0.0.1', 0), "
        f"functools.partial(h.SimpleHTTPRequestHandler, directory={str(tmp_path / 'site')!r})); "
        "print(s.server_port, flush=True); s.serve_forever()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/web-{{000..001}}.tar"
        shards = packed(tiny_pack, images=url, output=tmp_path / "shards")
        assert shards.samples["crc32"].equals(tiny_shards.samples["crc32"])
        missing = url.replace("001", "002")
        with pytest.raises(
            UserError,
            match=r"web-002.tar: cannot be read .*\((empty file|its download .* 22)\); check the address",
        ):
            packed(tiny_pack, images=missing, output=tmp_path / "other")
    finally:
        server.kill()
        server.communicate()


def test_one_hot_labels_and_metadata_in_two_tables(
    tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    """As ISIC 2019 has it: floats for ones, lesions that are blank for some, ids with endings."""
    rows = csv.read_csv(tiny_pack.table).to_pylist()
    kinds = [("MEL" if row["target"] else ("NV", "BKL")[n % 2]) for n, row in enumerate(rows)]
    columns = ("MEL", "NV", "BKL", "UNK")
    truth = [",".join(["image", *columns])]
    about = ["image,lesion_id,sex"]
    for number, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        truth.append(",".join([row["isic_id"], *(f"{float(kind == column):.1f}" for column in columns)]))
        about.insert(1, f"{row['isic_id']}.jpg,{row['patient_id'] if number % 9 else ''},male")
    (tmp_path / "truth.csv").write_text("\n".join(truth) + "\n")
    (tmp_path / "about.csv").write_text("\n".join(about) + "\n")
    fields: dict[str, Any] = {
        "table": tmp_path / "truth.csv",
        "more_tables": (tmp_path / "about.csv",),
        "id_column": "image",
        "group_column": "lesion_id",
        "one_hot": True,
        "classes": {"nevus": ("NV",), "keratosis": ("BKL",), "melanoma": ("MEL",)},
    }
    with pytest.raises(UserError, match=r"14 rows have no group.*pack.blank_groups"):
        packed(tiny_pack, output=tmp_path / "refused", **fields)
    shards = packed(tiny_pack, output=tmp_path / "shards", blank_groups="own", **fields)
    assert shards.classes == ("nevus", "keratosis", "melanoma") and shards.positive == 2
    expected = {row["isic_id"]: kind for row, kind in zip(rows, kinds, strict=True)}
    named = {"MEL": 2, "NV": 0, "BKL": 1}
    assert [named[expected[key]] for key in shards.keys] == shards.labels.tolist()
    assert set(shards.samples["sex"].to_pylist()) == {"male"}
    alone = [group for group in shards.samples["group"].to_pylist() if group.startswith("alone-")]
    assert len(alone) == len(set(alone)) == 14
    (tmp_path / "truth.csv").write_text("\n".join(truth).replace("0.0,0.0\n", "1.0,0.0\n", 1) + "\n")
    with pytest.raises(UserError, match="not exactly one 1"):
        packed(tiny_pack, output=tmp_path / "other", blank_groups="own", **fields)


def test_all_other_values_are_one_class(tiny_pack: Pack, tmp_path: Path) -> None:
    text = tiny_pack.table.read_text() if tiny_pack.table else ""
    (tmp_path / "table.csv").write_text(text.replace(",0,", ",nevus,").replace(",1,", ",mel,"))
    classes = {"benign": ("*",), "melanoma": ("mel",)}
    records = read_records(
        Pack.model_validate(tiny_pack.model_dump() | {"table": tmp_path / "table.csv", "classes": classes})
    )
    assert records.labels.tolist() == [
        int(row["target"]) for row in csv.read_csv(tiny_pack.table).to_pylist()
    ]


def test_several_sources_become_one_set(tiny_pack: Pack, tmp_path: Path) -> None:
    """Equal patient names of two sources are two patients; an image that both have stays on one side."""
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    rows = csv.read_csv(tiny_pack.table).to_pylist()
    lines = ["name,person,lesion,dx"]
    for row in rows[:60]:
        shutil.copy(Path(tiny_pack.images) / f"{row['isic_id']}.jpg", other / "images")
        lines.append(f"{row['isic_id']},P,,{'mel' if row['target'] else 'nv'}")
    (other / "table.csv").write_text("\n".join(lines) + "\n")
    second = {
        "table": other / "table.csv",
        "images": other / "images",
        "id_column": "name",
        "group_column": "person",
        "lesion_column": "lesion",
        "label_column": "dx",
        "classes": {"benign": ["nv"], "melanoma": ["mel"]},
    }
    fields = {"sources": {"first": {}, "second": second}, "output": tmp_path / "shards"}
    with pytest.raises(UserError, match="cannot be stratified"):  # all are tied through the shared images
        packed(tiny_pack, **fields)
    lines = [lines[0], *(line.replace(",P", f",Q{n}P") for n, line in enumerate(lines[1:]))]
    (other / "table.csv").write_text("\n".join(lines) + "\n")
    shards = packed(tiny_pack, **fields)
    assert len(shards) == 180
    assert sorted(set(shards.samples["source"].to_pylist())) == ["first", "second"]
    assert all(key.startswith(("first_TINY", "second_TINY")) for key in shards.keys)
    assert {group.split("/")[0] for group in shards.samples["group"].to_pylist()} == {"first", "second"}
    assert shards.manifest["duplicates"]["exact"] == 60
    splits = dict(zip(shards.keys, shards.samples["split"].to_pylist(), strict=True))
    assert all(splits[f"first_{row['isic_id']}"] == splits[f"second_{row['isic_id']}"] for row in rows[:60])
    assert shards.samples["age_approx"].null_count >= 60
    assert "dx" in shards.samples.column_names


def test_names_that_cross_are_found() -> None:
    names = np.array(["a", "a", "b", "b", "", "", "c", None], dtype=object)
    splits = np.array(["x", "y", "x", "x", "x", "y", "y", "y"])
    assert crossing(names, splits) == ["a"]


def test_not_a_number_is_a_blank(tiny_pack: Pack, tmp_path: Path) -> None:
    table = csv.read_csv(tiny_pack.table)
    groups = pa.array([float("nan") if n < 9 else n // 5 for n in range(table.num_rows)], pa.float64())
    table = table.set_column(table.column_names.index("patient_id"), "patient_id", groups)
    table = table.append_column("serial", pa.array(["12345678901234567890"] * table.num_rows))
    pq.write_table(table, tmp_path / "table.parquet")
    fields = {"table": tmp_path / "table.parquet"}
    with pytest.raises(UserError, match="9 rows have no group"):
        read_records(Pack.model_validate(tiny_pack.model_dump() | fields))
    records = read_records(Pack.model_validate(tiny_pack.model_dump() | fields | {"blank_groups": "own"}))
    assert len(set(records.groups[:9])) == 9
    assert set(records.metadata["serial"].to_pylist()) == {"12345678901234567890"}


def test_an_id_too_long_behind_its_sources_name_is_told_at_once(tiny_pack: Pack, tmp_path: Path) -> None:
    lines = (tiny_pack.table or Path()).read_text().replace("TINY_0003", "T" * 89)
    (tmp_path / "table.csv").write_text(lines)
    fields = {"sources": {"first": {"table": tmp_path / "table.csv"}}}
    with pytest.raises(UserError, match=r"too long for a file's name .* first_"):
        read_records(Pack.model_validate(tiny_pack.model_dump() | fields))


def test_another_metadata_table_is_another_set(tiny_pack: Pack, tmp_path: Path) -> None:
    more = tmp_path / "more.csv"
    rows = csv.read_csv(tiny_pack.table).to_pylist()
    more.write_text("\n".join(["isic_id,camera", *(f"{row['isic_id']},a" for row in rows)]))
    shards = packed(tiny_pack, more_tables=(more,), output=tmp_path / "shards")
    assert set(shards.samples["camera"].to_pylist()) == {"a"}
    settings = Pack.model_validate(tiny_pack.model_dump() | {"more_tables": (more,)})
    check_made_by(shards.manifest, settings, shards.folder)
    more.write_text(more.read_text().replace(",a", ",b"))
    with pytest.raises(UserError, match=r"more_tables is .*more.csv, was another more.csv"):
        check_made_by(shards.manifest, settings, shards.folder)
    with pytest.raises(UserError, match="more_tables are 0, were 1"):
        check_made_by(shards.manifest, tiny_pack, shards.folder)


@pytest.mark.parametrize("one_hot", [False, True])
def test_a_sources_own_order_of_classes_changes_no_label(
    one_hot: bool, tiny_pack: Pack, tmp_path: Path
) -> None:
    """The class index is that of pack.classes, whatever order, or part of them, a source names."""
    rows = csv.read_csv(tiny_pack.table).to_pylist()
    lines = ["isic_id,patient_id,target,NV,MEL"]
    lines += [
        f"{row['isic_id']},{row['patient_id']},{'mel' if row['target'] else 'nv'},"
        f"{1 - row['target']},{row['target']}"
        for row in rows
    ]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    only = [lines[0], *(line for line in lines[1:] if ",mel," in line)]
    (tmp_path / "melanomas.csv").write_text("\n".join(only) + "\n")
    reversed_ = {"melanoma": ["MEL" if one_hot else "mel"], "benign": ["NV" if one_hot else "nv"]}
    sources = {
        "other": {"table": tmp_path / "table.csv", "one_hot": one_hot, "classes": reversed_},
        "part": {
            "table": tmp_path / "melanomas.csv",
            "one_hot": one_hot,
            "classes": {"melanoma": reversed_["melanoma"]},
        },
    }
    records = read_records(Pack.model_validate(tiny_pack.model_dump() | {"sources": sources}))
    of_source = {name: records.labels[records.sources == name].tolist() for name in sources}
    assert of_source["other"] == [row["target"] for row in rows]
    assert of_source["part"] == [1] * sum(row["target"] for row in rows)


def test_blanks_of_pandas_in_shards_are_blanks(tmp_path: Path) -> None:
    """Else all images without a lesion would be of one, `nan`, and end up in one split."""
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "web.tar")) as writer:
        about = {"lesion_id": float("nan"), "age": float("nan"), "sex": None}
        for number in range(2):
            writer.write({"__key__": f"a{number}", "cls": number, "json": about | {"patient_id": number}})
    settings = Pack(table=None, images=str(tmp_path / "web.tar"), id_column="key", label_column="cls")
    for url in webshards.to_fetch(settings):
        webshards.fetch(url, tmp_path)
    records = read_records(settings, tmp_path)
    assert records.lesions.tolist() == ["", ""] and records.groups.tolist() == ["0", "1"]
    assert records.metadata.column_names == ["cls"]
