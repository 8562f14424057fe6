"""`moleprint bench shards`: images a second of packing, and of its peers in the same run."""

import csv
import io
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from configs.packing import Encode, Pack
from shards import peers
from shards.encode import encode
from shards.files import write_json, writing
from shards.pack import pack
from shards.peers import Photograph
from shards.timing import REFERENCE, TURNS, Row, family, refuse_folder, row, table, take_turns
from shards.verify import verify

PASS, AGAIN, LARGE = "pass-through", "re-encode 512 to 256", "3000 × 2000 to 256, one core"
VERIFY, MEMORY = "verify", "memory"
OURS = "moleprint"
_SHARE = 64  # images that a worker of the crew takes at a time
_LOOK = 0.01  # seconds between two looks at the memory of processes
_SIDE = Encode().size
Contest = Mapping[str, Callable[[], float]]


@dataclass(frozen=True)
class Drawn:
    """A folder of drawn photographs of one size, and their table."""

    folder: Path
    table: Path
    photographs: list[Photograph]

    def __len__(self) -> int:
        return len(self.photographs)

    def settings(self, output: Path, **changes: Any) -> Pack:
        """The defaults, but for the places and `changes`."""
        return Pack(table=self.table, images=str(self.folder), output=str(output), **changes)


def bench(images: int, json_file: Path | None, environment: dict[str, Any], *, turns: int = TURNS) -> None:
    """Measure packing and its peers, print a table, and write it as JSON where asked.

    The contestants take turns, so that whatever else the machine does falls on all of them. A turn is all the
    work from files to a finished set, with the start of workers and the flushing to disk that it takes; the
    set is then deleted. (Workers are forked from a process that the first turn starts.) Three rows are told
    apart from these: `process pool + Pillow`, whose processes have started before, and the limits that end in
    `alone`: the codec on bytes in memory, in such processes.

    Args:
        images: photographs of 256 × 256 pixels to pass through; half as many of 512 × 512 to encode.
        json_file: gets a list of rows `{"name", "contest", "images_per_second", "low", "high", "ratio", …}`.
        environment: goes with every row.
        turns: how often each contestant is measured.

    Raises:
        UserError: `json_file` is a folder, or there is no room for temporary files.
    """
    refuse_folder(json_file)
    cores = len(os.sched_getaffinity(0))
    with TemporaryDirectory(prefix="moleprint-bench-") as temporary, writing(Path(temporary)):
        scratch = Path(temporary)
        small = draw(scratch / "small", images, (256, 256), cores)
        double = draw(scratch / "double", -(-images // 2), (512, 512), cores)
        large = draw(scratch / "large", cores, (3000, 2000), cores)
        with peers.crew(cores, [small.folder, double.folder]) as crew:
            rows = _rows(PASS, small, _pass_through(small, scratch, crew), turns)
            rows += _rows(AGAIN, double, _re_encode(double, scratch, crew, cores), turns)
        rows += _rows(LARGE, large, _shrink(large), turns)
        rows += _rows(VERIFY, small, _verify(small, scratch), turns)
        rows += [_memory(small, count, scratch) for count in (-(-images // 4), images)]
        decibels = _decibels(large)
    about = {"cores": cores, "turns": turns, **decibels, "environment": environment}
    print("\n".join(_report(rows, about)))
    if json_file:
        write_json(json_file, [each | about for each in rows])


def draw(folder: Path, images: int, size: tuple[int, int], cores: int) -> Drawn:
    """Photographs of four to a patient, one of them a melanoma; the same bytes every time.

    Args:
        folder: new; gets `images/` and `metadata.csv`.
        size: width and height, pixels.
        cores: processes.
    """
    (folder / "images").mkdir(parents=True)
    patients = -(-images // 4)
    photographs = []
    for number in range(images):
        turn, patient = divmod(number, patients)
        key, label = f"DRAWN_{number:07d}", int(turn == patient % 4)
        about = {"patient_id": f"P{patient:06d}", "target": label, "sex": "female", "age_approx": 50}
        photographs.append(Photograph(str(folder / "images" / f"{key}.jpg"), label, {"isic_id": key} | about))
    tasks = [(each.path, number, *size) for number, each in enumerate(photographs)]
    with get_context("spawn").Pool(cores) as pool:
        name = f"draw {size[0]} × {size[1]}"
        for _ in tqdm(pool.imap_unordered(peers.draw, tasks, chunksize=8), name, images, unit="image"):
            pass
    return _drawn(folder, photographs)


def _drawn(folder: Path, photographs: list[Photograph]) -> Drawn:
    path = folder / f"{len(photographs)}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, photographs[0].info)
        writer.writeheader()
        writer.writerows(each.info for each in photographs)
    return Drawn(folder / "images", path, photographs)


def _pass_through(drawn: Drawn, scratch: Path, crew: Pool) -> Contest:
    """Photographs that have the right size already."""
    exact: dict[str, Any] = {"near_duplicates": None}

    def turn(work: Callable[[Path], object]) -> Callable[[], float]:
        return lambda: _rate(len(drawn), work, scratch)

    return {
        REFERENCE: turn(lambda place: peers.shard_writer(drawn.photographs, place)),
        "tar(1)": turn(lambda place: peers.tar(drawn.folder, place)),
        OURS: turn(lambda place: _pack(drawn, place)),
        f"{OURS}, exact duplicates only": turn(lambda place: _pack(drawn, place, **exact)),
        f"{OURS}, header check": turn(lambda place: _pack(drawn, place, encode={"check": "header"}, **exact)),
        "decode alone": turn(lambda _: _codec(drawn, crew)),
    }


def _re_encode(drawn: Drawn, scratch: Path, crew: Pool, cores: int) -> Contest:
    """Photographs of twice the side that a shard's are to have."""
    few = drawn.photographs[: -(-len(drawn) // 4)]  # a plain loop has the same rate over any number

    def pool(place: Path) -> None:
        shares = [(drawn.photographs[n::cores], place / f"shard-{n:06d}.tar", _SIDE) for n in range(cores)]
        crew.starmap(peers.write_tar, shares, chunksize=1)

    return {
        REFERENCE: lambda: _rate(len(few), lambda place: peers.shard_writer(few, place, _SIDE), scratch),
        "process pool + Pillow": lambda: _rate(len(drawn), pool, scratch),
        OURS: lambda: _rate(len(drawn), lambda place: _pack(drawn, place), scratch),
        "decode + resize + encode alone": lambda: _rate(len(drawn), lambda _: _codec(drawn, crew), scratch),
    }


def _shrink(drawn: Drawn) -> Contest:
    """Photographs as a camera gives them, one after the other in this process."""
    files = [each.path for each in drawn.photographs]

    def ours(path: str) -> object:
        return encode(Path(path).read_bytes(), Encode())

    def turn(shrink: Callable[[str], object], often: int) -> Callable[[], float]:
        def rate() -> float:
            started = perf_counter()
            for path in files * often:
                shrink(path)
            return len(files) * often / (perf_counter() - started)

        return rate

    return {REFERENCE: turn(lambda path: peers.pillow(path, _SIDE), 2), OURS: turn(ours, 8)}


def _verify(drawn: Drawn, scratch: Path) -> Contest:
    _pack(drawn, scratch)

    def turn(quick: bool) -> float:
        return _rate(len(drawn), lambda _: verify(scratch / "set", quick=quick, progress=False), scratch)

    return {"verify": lambda: turn(False), "verify --quick": lambda: turn(True)}


def _pack(drawn: Drawn, place: Path, **changes: Any) -> None:
    pack(drawn.settings(place / "set", **changes), progress=False)


def _codec(drawn: Drawn, crew: Pool) -> None:
    shares = [(str(drawn.folder), start, start + _SHARE, Encode()) for start in range(0, len(drawn), _SHARE)]
    done = sum(crew.starmap(peers.encode_held, shares, chunksize=1))
    assert done == len(drawn)


def _rate(images: int, work: Callable[[Path], object], scratch: Path) -> float:
    """Images a second of `work`, done in a fresh folder that is then deleted."""
    place = scratch / "turn"
    place.mkdir()
    started = perf_counter()
    work(place)
    taken = perf_counter() - started
    shutil.rmtree(place)
    return images / taken


def _rows(name: str, drawn: Drawn, contest: Contest, turns: int) -> list[Row]:
    size = sum(Path(each.path).stat().st_size for each in drawn.photographs)
    about = {"contest": name, "images": len(drawn), "bytes_per_image": round(size / len(drawn))}
    rates = take_turns(contest, turns)
    return [row(each, rates) | about for each in rates]


def _memory(drawn: Drawn, images: int, scratch: Path) -> Row:
    """Packing in a process of its own: the sum of the most memory that it and each of its workers held."""
    part = _drawn(drawn.folder.parent, drawn.photographs[:images])
    place = scratch / "turn"
    process = get_context("spawn").Process(target=_pack, args=(part, place))
    process.start()
    assert process.pid is not None
    most: dict[int, int] = {}
    while process.is_alive():
        for pid, kilobytes in _peaks(process.pid):
            most[pid] = max(most.get(pid, 0), kilobytes)
        process.join(_LOOK)
    assert process.exitcode == 0
    shutil.rmtree(place)
    megabytes = sum(most.values()) * 1024 / 1e6
    return {"name": OURS, "contest": MEMORY, "images": images, "megabytes": round(megabytes)}


def _peaks(parent: int) -> list[tuple[int, int]]:
    """Most resident memory so far of a process and of all below it: (process id, KiB)."""
    found = []
    for process in family(parent):
        try:
            status = Path(f"/proc/{process}/status").read_text().split("VmHWM:")
        except OSError:  # it has ended
            continue
        if len(status) == 2:
            found.append((process, int(status[1].split()[0])))
    return found


def _decibels(drawn: Drawn) -> dict[str, float]:
    """PSNR against full decode and LANCZOS, dB: of ours, coded at quality 100, of that coding alone, and of
    what remains, the shrinking: their errors have nothing to do with each other, so that their squares add.
    """
    finest = Encode(quality=100)
    ours, coding = [], []
    for each in drawn.photographs:
        exact = peers.shrunk(each.path, finest.size)
        ours.append(_psnr(_opened(encode(Path(each.path).read_bytes(), finest).jpeg), exact))
        coded = simplejpeg.encode_jpeg(np.asarray(exact), finest.quality, colorsubsampling=finest.subsampling)
        coding.append(_psnr(_opened(coded), exact))
    whole, coded = float(np.mean(ours)), float(np.mean(coding))
    shrinking = -10 * np.log10(max(10 ** (-whole / 10) - 10 ** (-coded / 10), 1e-10))
    found = {"large_psnr": whole, "coding_psnr": coded, "shrinking_psnr": float(shrinking)}
    return {name: round(value, 1) for name, value in found.items()}


def _opened(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg))


def _psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two images of one size, dB."""
    apart = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    return float(10 * np.log10(255**2 / np.mean(apart**2)))


def _report(rows: Sequence[Row], about: Mapping[str, Any]) -> list[str]:
    """The rows, aligned, contest by contest, with what they mean."""
    lines = [f"{about['environment'].get('processor', '')}, {about['cores']} cores"]
    for name in (PASS, AGAIN, LARGE, VERIFY):
        mine = [each for each in rows if each["contest"] == name]
        head = f"{name}: {mine[0]['images']:,} images of {mine[0]['bytes_per_image'] / 1000:,.0f} kB"
        lines += [head, *table(mine), ""]
    speeds = {each["name"]: 1000 / each["images_per_second"] for each in rows if each["contest"] == VERIFY}
    memory = [
        f"{each['megabytes']:,} MB for {each['images']:,} images"
        for each in rows
        if each["contest"] == MEMORY
    ]
    quality = (
        f"3000 × 2000 to 256: {about['large_psnr']} dB from full decode + LANCZOS, coded at quality 100; "
        f"that coding alone leaves {about['coding_psnr']}, our shrinking alone {about['shrinking_psnr']}"
    )
    return [
        *lines,
        "Seconds for 1,000 images: " + ", ".join(f"{name} {taken:.2f}" for name, taken in speeds.items()),
        "Memory of all packing processes at most: " + ", ".join(memory),
        quality,
        f"Medians of {about['turns']} turns, taken in rotation; the interval of a median spans all turns.",
        f"{REFERENCE}: a plain loop with Pillow and webdataset's ShardWriter.",
    ]
