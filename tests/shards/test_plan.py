"""Properties of the plan over random tables: nothing leaks, all is dealt, shards keep to their limits."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.packing import Pack
from shards.leaks import KINDS, crossing, duplicates
from shards.pack import pack
from shards.plan import Plan, make_plan
from shards.records import Records, read_pairs
from shards.scan import Fact
from shards.shardset import SPLITS, ShardSet
from shards.split import connect, split, tie
from shards.verify import verify


def records(groups: list[int], labels: list[int], lesions: list[str], **columns: list[Any]) -> Records:
    """A table made up of codes."""
    keys = np.array([f"I{n:05d}" for n in range(len(groups))], dtype=object)
    return Records(
        keys=keys,
        ids=keys,
        sources=np.array([""] * len(keys), dtype=object),
        groups=np.array([f"P{group}" for group in groups], dtype=object),
        lesions=np.array(lesions, dtype=object),
        labels=np.array(labels, dtype=np.int64),
        metadata=pa.table({"n": list(range(len(keys))), **columns}),
    )


@st.composite
def tables(draw: st.DrawFn) -> tuple[Records, list[Fact]]:
    """Up to 200 images of up to 60 patients: lesions over patients, bad images, equal images."""
    count = draw(st.integers(20, 200))
    groups = draw(st.lists(st.integers(0, 59), min_size=count, max_size=count))
    labels = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    lesions = draw(st.lists(st.sampled_from(["", "", "", "L1", "L2", "L3"]), min_size=count, max_size=count))
    contents = draw(st.lists(st.integers(0, 400), min_size=count, max_size=count))
    reasons = draw(st.lists(st.sampled_from([""] * 9 + ["truncated"]), min_size=count, max_size=count))
    facts = [
        Fact(reason, size=1000 + content, sha256=f"{content:064x}")
        for reason, content in zip(reasons, contents, strict=True)
    ]
    return records(groups, labels, lesions), facts


options = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 5),
        "folds": st.sampled_from([0, 0, 3, 5]),
        "whole_groups": st.booleans(),
        "samples_per_shard": st.integers(3, 40),
        "undersample": st.booleans(),
        "duplicates_action": st.sampled_from(["tie", "drop"]),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(tables(), options, st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=3))
def test_no_plan_leaks(
    table: tuple[Records, list[Fact]], fields: dict[str, Any], pairs: list[tuple[int, int]]
) -> None:
    images, facts = table
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "pairs.csv"
        listed.write_text("\n".join(["one,other", *(f"I{a:05d},I{b:05d}" for a, b in pairs)]))
        chosen = Pack(**fields, near_duplicates=None, duplicates=listed if pairs else None)
        try:
            plan = make_plan(chosen, images, facts)
        except UserError as error:
            assume("cannot be stratified" not in str(error))
            raise
    parts = np.array(chosen.split_names)[plan.splits]
    for names in tying(images, facts, pairs):
        assert crossing(names[plan.rows], parts) == []
    assert (images.keys[plan.rows] == plan.records.keys).all()
    assert not any(facts[row].reason for row in plan.rows)
    usable = [n for n, fact in enumerate(facts) if not fact.reason]
    if fields["undersample"]:
        assert len(set(np.bincount(plan.records.labels))) == 1
    elif fields["duplicates_action"] == "tie":
        assert sorted(plan.rows) == usable
    else:
        assert len(plan.rows) + plan.dropped == len(usable)
    for part in chosen.split_names:
        assert set(plan.records.labels[parts == part]) == {0, 1}
    check_shards(plan, chosen, parts)


def tying(images: Records, facts: list[Fact], pairs: list[tuple[int, int]]) -> list[Any]:
    """(N,) names that may not cross, of all images: those left out tie groups too."""
    hashes = np.array(["" if fact.reason else fact.sha256 for fact in facts], dtype=object)
    groups = np.unique(images.groups, return_inverse=True)[1]
    edges = np.array([(a, b) for a, b in pairs], dtype=np.int64).reshape(-1, 2)
    first: dict[str, int] = {}
    for row, name in [*enumerate(images.lesions), *enumerate(hashes)]:
        if name:
            edges = np.concatenate([edges, [[first.setdefault(name, row), row]]])
    tied = np.array([f"unit {code}" for code in tie(groups, edges)], dtype=object)
    return [images.groups, images.lesions, hashes, tied]


def check_shards(plan: Plan, chosen: Pack, parts: Any) -> None:
    """Shards cover the images in order, each in one split, and keep to the limit and to whole groups."""
    slices = list(plan.shards.values())
    assert [n for rows in slices for n in range(rows.start, rows.stop)] == list(range(len(plan.rows)))
    shard = np.empty(len(plan.rows), dtype=object)
    for name, rows in plan.shards.items():
        shard[rows] = name
        assert set(parts[rows]) == {name.rpartition("-")[0]}
        groups = plan.records.groups[rows]
        assert len(groups) <= chosen.samples_per_shard or (chosen.whole_groups and len(set(groups)) == 1)
    if chosen.whole_groups:
        assert crossing(plan.records.groups, shard) == []


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(0.7, 0.1, 0.2), (1 / 5,) * 5, (0.5, 0.5)]))
def test_every_class_reaches_every_split_that_it_can(seed: int, ratios: tuple[float, ...]) -> None:
    draw = np.random.default_rng(seed)
    groups = draw.integers(0, 120, 600)
    groups = np.unique(groups, return_inverse=True)[1]
    labels = (draw.random(600) < 0.15).astype(np.int64)
    parts = split(groups, labels, ratios, seed)
    assert len(set(zip(groups.tolist(), parts.tolist(), strict=True))) == groups.max() + 1
    for label in (0, 1):
        held = np.bincount(parts[labels == label], minlength=len(ratios)) / (labels == label).sum()
        assert held == pytest.approx(ratios, abs=0.12) and (held > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_tied_units_are_the_connected_components(pairs: list[tuple[int, int]]) -> None:
    edges = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    units = tie(np.arange(30), edges)
    reached = np.eye(30, dtype=bool)
    for one, other in pairs:
        reached[one, other] = reached[other, one] = True
    for middle in range(30):
        reached |= np.outer(reached[:, middle], reached[middle])
    assert ((units[:, None] == units[None]) == reached).all()
    assert (connect(30, edges) == reached.argmax(axis=1)).all()


def test_pairs_are_found_by_content_and_by_hash() -> None:
    hashes = [bytes(32), b"\x01" * 32, b"\x01" * 31 + b"\x03", b"\xff" * 32, b"\x01" * 32, bytes(32)]
    facts = [Fact("", sha256=f"{n % 5:064x}", hash=code.hex()) for n, code in enumerate(hashes)]
    facts.append(Fact("truncated"))
    found = duplicates(facts, 4)
    as_said = [
        (one, other, KINDS[kind], bits)
        for (one, other), kind, bits in zip(found.rows, found.kinds, found.distances, strict=True)
    ]
    # 0 and 5 have no features: equal in content they pair, by their hashes they do not.
    assert as_said == [(0, 5, "exact", 0), (1, 2, "near", 1), (1, 4, "near", 0), (2, 4, "near", 1)]
    assert len(duplicates(facts, None).rows) == 1


def changed(chosen: Pack, **fields: Any) -> Pack:
    return Pack.model_validate(chosen.model_dump() | fields)


def test_folds_partition_the_set(tiny_pack: Pack, tmp_path: Path) -> None:
    """Packed once; every fold is the test set once, and no group is on two sides of any."""
    chosen = changed(tiny_pack, folds=4, output=tmp_path / "shards")
    pack(chosen, progress=False)
    verify(tmp_path / "shards", workers=1, progress=False)
    sets = [ShardSet.open(chosen.output, fold) for fold in range(4)]
    assert sets[0].parts == ("fold0", "fold1", "fold2", "fold3")
    assert sorted(np.concatenate([shards.split("test") for shards in sets])) == list(range(120))
    for shards in sets:
        parts = [set(shards.split(name)) for name in SPLITS]
        assert sum(map(len, parts)) == 120 == len(set.union(*parts))
        groups = [set(shards.groups[list(part)]) for part in parts]
        assert sum(map(len, groups)) == 24
        assert all(set(shards.labels[list(part)]) == {0, 1} for part in parts)
    assert sets[1].split("val").tolist() == sets[2].split("test").tolist()
    assert len({shards.sha256 for shards in sets}) == 4
    with pytest.raises(UserError, match="there is no fold 4, the set has 4 folds, counted from 0"):
        ShardSet.open(chosen.output, 4)


def test_a_fold_of_a_set_without_folds_is_refused(tiny_shards: ShardSet) -> None:
    with pytest.raises(UserError, match="there is no fold 1, the set is not packed in folds"):
        ShardSet.open(tiny_shards.folder, 1)


def images(count: int = 120, **columns: list[Any]) -> Records:
    """40 patients with three images each, every second patient with a melanoma."""
    return records(
        [n // 3 for n in range(count)], [int(n % 6 == 0) for n in range(count)], [""] * count, **columns
    )


def test_a_column_gives_the_split() -> None:
    given_split = [("train", "Validation", "test")[(n // 3) % 20 % 3 if n < 117 else 0] for n in range(120)]
    plan = make_plan(Pack(split_column="part"), images(part=given_split))
    names = {"train": 0, "Validation": 1, "test": 2}
    assert [names[given_split[row]] for row in plan.rows] == plan.splits.tolist()


def test_blank_cells_go_where_the_column_never_does() -> None:
    given_split = [("test" if n < 30 else None) for n in range(120)]
    plan = make_plan(Pack(split_column="part"), images(part=given_split))
    assert sorted(plan.rows[plan.splits == 2]) == list(range(30))
    assert np.bincount(plan.splits)[:2] == pytest.approx([90 * 7 / 8, 90 / 8], abs=4)


def test_fold_numbers_may_be_a_column() -> None:
    plan = make_plan(Pack(split_column="part", folds=4), images(part=[n // 6 % 4 for n in range(120)]))
    assert (plan.rows // 6 % 4 == plan.splits).all()


def test_files_of_ids_take_their_groups_along(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("\ufeffI00000.jpg\nI00010\n\n", encoding="utf-8")
    (tmp_path / "val.txt").write_text("I00030\nI00033\n")
    files = {"test": tmp_path / "test.txt", "val": tmp_path / "val.txt"}
    plan = make_plan(Pack(split_files=files), images())
    assert sorted(plan.rows[plan.splits == 2]) == [0, 1, 2, 9, 10, 11]
    assert sorted(plan.rows[plan.splits == 1]) == [30, 31, 32, 33, 34, 35]
    assert len(plan.rows[plan.splits == 0]) == 108


@pytest.mark.parametrize(
    ("cells", "lesions", "words"),
    [
        ({0: "test", 1: "train"}, {}, ["I00000", "I00001", "both of group P0"]),
        ({0: "test", 5: "train"}, {0: "L", 5: "L"}, ["both of lesion L"]),
        ({0: "tset"}, {}, ["I00000 in 'tset'", "train, val, test"]),
    ],
)
def test_a_given_split_that_leaks_is_refused(
    cells: dict[int, str], lesions: dict[int, str], words: list[str]
) -> None:
    table = images(part=[cells.get(n) for n in range(120)])
    for row, name in lesions.items():
        table.lesions[row] = name
    with pytest.raises(UserError) as caught:
        make_plan(Pack(split_column="part"), table)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_split_that_leaves_images_out_is_refused() -> None:
    given_split = [("train", "val", "test", None)[n // 3 % 4] for n in range(120)]
    with pytest.raises(UserError, match="30 images are in no split, first I00009"):
        make_plan(Pack(split_column="part"), images(part=given_split))
    with pytest.raises(UserError, match=r"no table has a column 'nosuch'; correct pack.split_column"):
        make_plan(Pack(split_column="nosuch"), images())


@pytest.mark.parametrize(("column", "key"), [("patient_id", "group_column"), ("isic_id", "id_column")])
def test_a_column_that_is_taken_is_no_split(column: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"pack.split_column is '{column}', as pack.{key} is; name the"):
        make_plan(Pack(split_column=column), images())


def test_a_file_that_names_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("nobody\n")
    with pytest.raises(UserError, match=r"ids.txt: 1 of its 1 lines are the id of no image.*nobody"):
        make_plan(Pack(split_files={"test": tmp_path / "ids.txt"}), images())
    (tmp_path / "more.txt").write_text("I00003\nI00001\n")
    (tmp_path / "ids.txt").write_text("I00001\n")
    files = {"test": tmp_path / "ids.txt", "val": tmp_path / "more.txt"}
    with pytest.raises(UserError, match=r"more.txt: 1 images are in another split's file too, first I00001"):
        make_plan(Pack(split_files=files), images())
    with pytest.raises(UserError, match=r"gone.txt: cannot be read"):
        make_plan(Pack(split_files={"test": tmp_path / "gone.txt"}), images())


def test_shards_keep_to_a_size_in_bytes() -> None:
    table = images()
    facts = [Fact("", size=int(size), sha256=str(n)) for n, size in enumerate(np.linspace(1e5, 9e5, 120))]
    plan = make_plan(Pack(megabytes_per_shard=2, near_duplicates=None), table, facts)
    held = [sum(facts[row].size for row in plan.rows[rows]) for rows in plan.shards.values()]
    assert max(held) <= 2_000_000
    assert len(held) <= 60e6 / 2e6 * 1.5


def test_a_group_beyond_the_limit_has_a_shard_of_its_own() -> None:
    table = records([0] * 50 + [n // 2 for n in range(100, 300)], [n % 2 for n in range(250)], [""] * 250)
    plan = make_plan(Pack(whole_groups=True, samples_per_shard=10, near_duplicates=None), table)
    sizes = [rows.stop - rows.start for rows in plan.shards.values()]
    assert sorted(sizes)[-1] == 50 and sorted(sizes)[-2] <= 10


def test_images_left_out_still_tie_their_groups(tmp_path: Path) -> None:
    """I00000, I00003 and I00006, of patients 0, 1 and 2, are copies: the patients stay together."""
    (tmp_path / "pairs.csv").write_text("a,b\nI00000,I00003\nI00003,I00006\n")
    for action in ("tie", "drop"):
        for bad in (None, 0, 3):
            facts = [Fact("truncated" if n == bad else "", sha256=str(n)) for n in range(120)]
            for seed in range(10):
                chosen = Pack(
                    duplicates=tmp_path / "pairs.csv",
                    duplicates_action=action,
                    near_duplicates=None,
                    seed=seed,
                )
                plan = make_plan(chosen, images(), facts)
                assert len(set(plan.splits[plan.rows < 9])) == 1
                kept = {0, 3, 6} & set(plan.rows.tolist())
                assert len(kept) == (1 if action == "drop" else 3 - (bad is not None))


def test_a_rejected_image_passes_its_place_to_its_listed_copy(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("a,b\nI00000,I00001\nI00003,I00004\n")
    facts = [Fact("truncated" if n == 0 else "", sha256=str(n)) for n in range(120)]
    chosen = Pack(duplicates=tmp_path / "pairs.csv", duplicates_action="drop", near_duplicates=None)
    plan = make_plan(chosen, images(), facts)
    assert set(range(120)) - set(plan.rows.tolist()) == {0, 4}


def test_a_given_split_whose_images_are_all_rejected_is_not_filled_with_others(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("I00000\nI00003\n")
    facts = [Fact("truncated" if n < 6 else "", sha256=str(n)) for n in range(120)]
    chosen = Pack(split_files={"test": tmp_path / "test.txt"}, near_duplicates=None)
    with pytest.raises(UserError, match="test has no benign, test has no melanoma"):
        make_plan(chosen, images(), facts)


def test_a_list_of_duplicates_reaches_over_sources(tmp_path: Path) -> None:
    """`I00000` is the list's own source's, `J` is of one other source alone, `b_I00001` names its source."""
    table = records([0, 1, 2, 3, 4], [0] * 5, [""] * 5)
    sources = np.array(["a", "a", "b", "b", "b"], dtype=object)
    ids = np.array(["I00000", "I00001", "I00000", "I00001", "J"], dtype=object)
    keys = np.array([f"{source}_{name}" for source, name in zip(sources, ids, strict=True)], dtype=object)
    table = replace(table, sources=sources, ids=ids, keys=keys)
    (tmp_path / "pairs.csv").write_text("one,other\nI00000,J\nI00001,b_I00001\n")
    own: dict[str, Any] = {"a": {"duplicates": tmp_path / "pairs.csv"}, "b": {}}
    for fields, expected in (
        ({"sources": own}, [(0, 4), (1, 3)]),
        (
            {"sources": {"a": {}, "b": {}}, "duplicates": tmp_path / "pairs.csv"},
            [(0, 4), (1, 3), (2, 4)],
        ),
    ):
        pairs = read_pairs(Pack.model_validate(fields), table)
        assert [tuple(pair) for pair in pairs.tolist()] == expected


def test_a_list_of_duplicates_without_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("I00000.jpg,I00003.jpg\nI00006,I00009\n")
    with pytest.raises(UserError, match=r"its first line is a pair of images \(I00000.jpg, I00003.jpg\)"):
        make_plan(Pack(duplicates=tmp_path / "pairs.csv"), images())
