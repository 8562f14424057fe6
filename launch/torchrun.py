"""Start a stage on several processes of this host: torchrun from Python, without its traceback."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from configs.errors import RESUMABLE

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What is handed on to the processes: all that torch hands on unasked, and SLURM's warning."""


class StageError(Exception):
    """A process of a stage ended early and has said why; `status` is what this command should end with."""

    def __init__(self, module: str, status: int) -> None:
        super().__init__(module)
        self.status = status


def torchrun(module: str, arguments: Sequence[str], *, processes: int) -> None:
    """Run `python -m module arguments` on several processes: 0 is one a GPU, or one without any.

    The same as `torchrun --standalone --nproc-per-node=N -m module arguments`.

    Raises:
        StageError: if a process ends with an error, or this one is told to end by SIGTERM or SIGUSR1.
        KeyboardInterrupt: if it is told to end otherwise, as by Ctrl-C.
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
        signals_to_handle=SIGNALS,
    )
    try:
        # -P: a `train.py` in the user's folder is not ours.
        elastic_launch(config, sys.executable)("-P", "-m", module, *arguments)
    except ChildFailedError as error:
        resumable = all(failure.exitcode == RESUMABLE for failure in error.failures.values())
        raise StageError(module, RESUMABLE if resumable else 2) from None
    except SignalException as told:
        if told.sigval in (signal.SIGTERM, signal.SIGUSR1):
            raise StageError(module, RESUMABLE) from None
        raise KeyboardInterrupt from None


def process_count(asked: int) -> int:
    """Processes to start: what is asked, but one a GPU at most where there are GPUs; 0 is all, or one."""
    import torch

    gpus = torch.cuda.device_count()
    return min(asked or gpus, gpus) if gpus else asked or 1
