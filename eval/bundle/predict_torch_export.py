"""Image files -> lines of JSON with calibrated probabilities, by PyTorch: python predict.py IMAGE …"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from prepare import ABOUT, tell


def load(folder: Path) -> Callable[[Any], Any]:
    """Pixels (n, height, width, 3) -> probabilities (n, classes), embeddings (n, dim)."""
    module = torch.export.load(folder / ABOUT["model"]).module()

    def run(images: Any) -> Any:
        with torch.inference_mode():
            return tuple(output.numpy() for output in module(torch.from_numpy(images)))

    return run


if __name__ == "__main__":
    sys.exit(tell(load(Path(__file__).parent), sys.argv[1:]))
