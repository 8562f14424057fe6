"""A place of images that is damaged, odd, or none: it is told in words, and nothing is missed in silence."""

import os
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from configs.errors import UserError
from configs.packing import Pack
from shards import webshards
from shards.images import Ref, locate, read


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("nowhere.zip", ["no such folder or file"]),
        ("table.csv", ["not a kind of archive", "WebDataset shards"]),
        ("broken.zip", ["cannot be read as a zip"]),
        ("broken.tar", ["cannot be read as an uncompressed tar"]),
        ("broken.hdf5", ["cannot be read as HDF5"]),
        ("file:///nowhere/web-{0..1}.tar", ["cannot be read as a WebDataset shard", "check the address"]),
    ],
)
def test_a_place_that_cannot_be_read_is_one_clear_line(place: str, words: list[str], tmp_path: Path) -> None:
    for name in ("table.csv", "broken.zip", "broken.tar", "broken.hdf5"):
        (tmp_path / name).write_bytes(b"broken" * 200)
    where = place if "://" in place else str(tmp_path / place)
    with pytest.raises(UserError) as caught:
        locate(["a"], where, tmp_path / "scratch")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_damaged_member_is_a_reason_not_an_end(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"x" * 4000)
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    (ref,) = locate(["a"], str(path), tmp_path)
    with pytest.raises(UserError, match="CRC"):
        read(ref)
    with pytest.raises(UserError, match="No such file"):
        read(Ref(str(tmp_path / "gone.jpg"), "gone.jpg", ""))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.images.LARGEST", 1000)
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(1001))
    (ref,) = locate(["a"], str(tmp_path / "images.zip"), tmp_path)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(UserError, match="1,001 bytes are too many for a photograph"):
        read(ref)


def test_damage_inside_archives_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", np.random.default_rng(0).bytes(4000))
    data = bytearray(path.read_bytes())
    data[40:60] = bytes(20)
    path.write_bytes(data)
    with h5py.File(tmp_path / "images.hdf5", "w") as file:
        file.create_group("a")
    for place in (path, tmp_path / "images.hdf5"):
        (ref,) = locate(["a"], str(place), tmp_path)
        with pytest.raises(UserError, match="cannot be read") as caught:
            read(ref)
        assert "\n" not in str(caught.value)


def test_links_are_followed_and_broken_ones_are_a_reason(tiny_pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "there").symlink_to(tiny_pack.images)
    (tmp_path / "images" / "circle").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    sound, broken = locate(["TINY_0001", "broken"], str(tmp_path / "images"), tmp_path)
    assert (sound.name, broken.name) == ("there/TINY_0001.jpg", "broken.jpg")
    assert read(sound).startswith(b"\xff\xd8")
    with pytest.raises(UserError, match="No such file"):
        read(broken)


def test_what_is_no_file_or_too_much_of_one_is_a_reason(tmp_path: Path) -> None:
    """A pipe without a writer is not waited for; a giant is not read."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "giant.jpg").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    pipe, giant, device = locate(["pipe", "giant", "device"], str(tmp_path), tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read(pipe)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes are too many for a photograph"):
        read(giant)
    assert read(device) == b""


def test_a_mask_beside_an_image_in_a_shard_is_no_second_image(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "web.tar")) as writer:
        writer.write({"__key__": "a", "jpg": b"image", "mask.png": b"mask"})
        writer.write({"__key__": "b", "left.jpg": b"image"})
    for place in (f"file://{tmp_path}/web.tar", str(tmp_path / "web.tar")):
        (ref,) = locate(["a"], place, tmp_path)
        assert read(ref) == b"image"
    (ref,) = locate(["b"], f"file://{tmp_path}/web.tar", tmp_path)
    assert read(ref) == b"image"


def test_a_tar_of_hard_links_holds_every_name(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"image")
    os.link(tmp_path / "images" / "a.jpg", tmp_path / "images" / "b.jpg")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "images", arcname="train-image")
    refs = locate(["a", "b"], str(tmp_path / "images.tar"), tmp_path)
    assert [read(ref) for ref in refs] == [b"image"] * 2


@pytest.mark.parametrize("at", ["between members", "in a header", "in a member", "damaged"])
def test_a_tar_that_breaks_off_is_refused(at: str, tmp_path: Path) -> None:
    """tarfile, and with it webdataset, takes it for one that ends there: the other images would be missed."""
    import webdataset

    path = tmp_path / "web.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(3):
            writer.write({"__key__": f"a{number}", "jpg": bytes([65]) * 1000, "cls": number})
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        header = tar.getmember("a2.jpg").offset
    ends = {"between members": header, "in a header": header + 100, "in a member": header + 600}
    path.write_bytes(data[: ends.get(at, header)] + (b"x" + data[header + 1 :] if at == "damaged" else b""))
    places = [str(path)] if at == "damaged" else [str(path), f"file://{path}"]
    for place in places:
        with pytest.raises(UserError, match=r"breaks off|cannot be read as"):
            webshards.fetch(place, tmp_path)
        with pytest.raises(UserError, match=r"breaks off|cannot be read as"):
            locate(["a0"], place, tmp_path)
