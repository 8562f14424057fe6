"""The devices that these tests run on: what can be shown on a CPU is, the rest waits for a GPU."""

import pytest
import torch

GPUS = torch.cuda.device_count()


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not GPUS, reason="needs a GPU"))]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, then the first GPU."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def gpu() -> torch.device:
    """The first GPU."""
    if not GPUS:
        pytest.skip("needs a GPU")
    return torch.device("cuda", 0)
