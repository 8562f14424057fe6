"""Image files -> lines of JSON with calibrated probabilities, by ONNX Runtime: python predict.py IMAGE …"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
from prepare import ABOUT, tell


def load(folder: Path) -> Callable[[Any], Any]:
    """Pixels (n, height, width, 3) -> probabilities (n, classes), embeddings (n, dim)."""
    session = onnxruntime.InferenceSession(folder / ABOUT["model"], providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities", "embeddings"], {"pixels": images})


if __name__ == "__main__":
    sys.exit(tell(load(Path(__file__).parent), sys.argv[1:]))
