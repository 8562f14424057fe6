"""Embeddings on disk: each sample once, in order, however they arrive; made again only where they differ."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from shards.shardset import SPLITS
from train import embed as module
from train.distributed import World
from train.embed import encode, evaluation_loader, run, stream, write_splits
from train.embeddings import embeddings_path, read_embeddings, read_meta
from train.runfolder import load_encoder

META = {"encoder_sha256": "e", "shards_sha256": "s", "classes": ["benign", "malignant"], "positive": 1}


def pieces(shards, vectors, size):
    order = np.concatenate([shards.split(split) for split in SPLITS])
    for start in range(0, len(order), size):
        index = order[start : start + size]
        yield index, vectors[index]


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_files_do_not_depend_on_the_pieces(tiny_shards, tmp_path, size, dtype):
    vectors = np.random.default_rng(0).normal(size=(len(tiny_shards), 6)).astype(np.float32)
    meta = {**META, "embed": {"dtype": dtype, "symmetries": False}}
    write_splits(tmp_path, tiny_shards, pieces(tiny_shards, vectors, size), meta)
    kept = vectors.astype(dtype).astype(np.float32)
    for split in SPLITS:
        found, index = read_embeddings(tmp_path, split), tiny_shards.split(split)
        assert np.array_equal(found.index, index) and found.meta == meta
        assert found.keys == tiny_shards.keys[index].tolist()
        assert found.groups == [tiny_shards.group_names[code] for code in tiny_shards.groups[index]]
        assert np.array_equal(found.labels, tiny_shards.labels[index])
        assert np.array_equal(found.vectors, kept[index]) and found.vectors.dtype == np.float32
        samples = tiny_shards.samples.take(index)
        for name in ("sex", "age_approx", "anatom_site_general", "width", "source"):
            assert found.metadata[name].to_pylist() == samples[name].to_pylist(), name
        assert not {"shard", "offset", "split", "key", "label"} & found.metadata.keys()
        file = pq.ParquetFile(embeddings_path(tmp_path, split))
        assert str(file.schema_arrow.field("embedding").type.value_type) == {"float16": "halffloat"}.get(
            dtype, "float"
        )
        assert max(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)) <= size


@pytest.mark.parametrize("wrong", ["twice", "lacking", "order"])
def test_a_stream_that_is_not_every_sample_once_leaves_no_file(tiny_shards, tmp_path, wrong):
    vectors = np.zeros((len(tiny_shards), 2), np.float32)
    given = list(pieces(tiny_shards, vectors, 10))
    given = {"twice": [given[0], *given], "lacking": given[1:], "order": given[::-1]}[wrong]
    with pytest.raises((AssertionError, StopIteration)):
        write_splits(tmp_path, tiny_shards, iter(given), META)
    assert not embeddings_path(tmp_path, "test").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_symmetries_make_the_embedding_blind_to_them(trained):
    encoder, _ = load_encoder(trained, torch.device("cpu"))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    views = [images.rot90(k, (2, 3)) for k in range(4)]
    views += [view.flip(3) for view in views]
    with torch.inference_mode():
        plain = torch.stack([encode(encoder, view, symmetries=False) for view in views])
        found = torch.stack([encode(encoder, view, symmetries=True) for view in views])
    assert torch.equal(plain[0], encoder.eval()(images)) and (plain[1:] - plain[0]).abs().max() > 1e-3
    torch.testing.assert_close(
        found[0], torch.nn.functional.normalize(plain.mean(0), dim=1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(found, found[:1].expand_as(found), atol=1e-5, rtol=0)


def test_a_stream_comes_in_pieces_of_whole_batches(trained, tiny_experiment, tiny_shards, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 16)
    encoder, _ = load_encoder(trained, torch.device("cpu"))
    encoder.train()
    index = tiny_shards.split("train")[::-1].copy()  # any order stays as it is
    with evaluation_loader(tiny_shards, index, tiny_experiment(trained), World()) as loader:
        found = list(stream(encoder, loader, precision=torch.float32))
    assert encoder.training
    assert [len(part) for part, _ in found][:-1] == [16] * (len(found) - 1) and len(found) > 2
    assert np.array_equal(np.concatenate([part for part, _ in found]), index)


def test_they_are_made_again_only_when_they_would_differ(trained, tiny_experiment, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")

    def made(**settings):
        run(tiny_experiment(folder, embed=settings), World())
        said = "made before" in capsys.readouterr().out
        return said, [embeddings_path(folder, split).stat().st_mtime_ns for split in SPLITS]

    _, first = made()
    plain = read_embeddings(folder, "val").vectors
    assert made() == (True, first)
    embeddings_path(folder, "test").unlink()
    said, second = made(dtype="float16", symmetries=True)
    assert not said and not set(first) & set(second)
    assert read_meta(folder, "val")["embed"] == {"dtype": "float16", "symmetries": True}
    vectors = read_embeddings(folder, "val").vectors
    assert np.abs(vectors - plain).max() > 1e-3
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    embeddings_path(folder, "test").unlink()
    assert not made(dtype="float16", symmetries=True)[0]
