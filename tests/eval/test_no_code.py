"""What a user can hand in never runs code: a pickle in the place of any file that is read does nothing."""

import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.training import Model
from eval.inputs import listing
from eval.predict import Predictor
from train import checkpoint, model


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.sign,)


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    """Proved to go off where pickles are trusted."""
    sign = tmp_path / "sign"
    pickle.loads(pickle.dumps(Bomb(sign)))
    assert sign.exists()
    sign.unlink()
    return Bomb(sign)


RUN_FILES = (
    *("encoder.safetensors", "encoder.json", "classifier.safetensors", "classifier.json", "config.yaml"),
    *("embeddings/train.parquet", "embeddings/val.parquet"),
)


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_run_folder(name: str, form: str, finished: Path, bomb: Bomb, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    if form == "pickle":
        (run / name).write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"weight": bomb}, run / name)
    with pytest.raises(UserError):
        _ = Predictor(run).id_columns
    assert not bomb.sign.exists()


def test_weights_and_checkpoints(bomb: Bomb, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save({"state_dict": bomb}, weights)
    with pytest.raises(UserError, match="cannot be read"):
        model.build(Model(backbone="resnet18", weights=str(weights)), size=32, seed=0)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"fingerprint": "{}", "progress": bomb}, tmp_path / "checkpoints" / "step-00000001.pt")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.load(tmp_path / "checkpoints", "{}")
    assert not bomb.sign.exists()


def test_images_shards_and_tables(bomb: Bomb, tmp_path: Path) -> None:
    """webdataset would unpickle `.pyd`, `.pickle` and `.pth` members, if it were asked to decode."""
    data = tmp_path / "a.pickle"
    data.write_bytes(pickle.dumps(bomb))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for ending in ("jpg", "pyd", "pickle", "pth", "cls"):
            tar.add(data, f"a.{ending}")
    for name in ("a.jpg", "a.zip", "a.hdf5"):
        shutil.copy(data, tmp_path / name)
    for name in ("s.tar", "a.jpg", "a.zip", "a.hdf5"):
        for image in listing([tmp_path / name], id_columns=()).images:
            assert isinstance(image.data, UserError) or image.read() == data.read_bytes()
    for name in ("t.csv", "t.parquet"):
        shutil.copy(data, tmp_path / name)
        with pytest.raises(UserError):
            listing([tmp_path / name], id_columns=())
    assert not bomb.sign.exists()
