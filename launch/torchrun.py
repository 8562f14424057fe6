"""Start a stage on several processes of this host: torchrun from Python, without its traceback."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence


class StageError(Exception):
    """A process of a stage ended with an error, which it has printed itself."""


def torchrun(module: str, arguments: Sequence[str], *, processes: int) -> None:
    """Run `python -m module arguments` on several processes: 0 is one a GPU, or one without any.

    The same as `torchrun --standalone --nproc-per-node=N -m module arguments`.

    Raises:
        StageError: if a process ends with an error.
        KeyboardInterrupt: if this process is told to end, by Ctrl-C or SIGTERM.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = process_count(processes)
    # torch's own default would give every process a thread a core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        # -P: a `train.py` in the user's folder is not ours.
        elastic_launch(config, sys.executable)("-P", "-m", module, *arguments)
    except ChildFailedError:
        raise StageError(module) from None
    except SignalException:
        raise KeyboardInterrupt from None


def process_count(asked: int) -> int:
    """Processes to start: what is asked, but one a GPU at most where there are GPUs; 0 is all, or one."""
    import torch

    gpus = torch.cuda.device_count()
    return min(asked or gpus, gpus) if gpus else asked or 1
