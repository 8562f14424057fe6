"""How a stage starts under torchrun: configuration, process group, errors in a line, an end with it."""

import ctypes
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from configs.errors import UserError
from configs.load import load
from configs.schema import Experiment
from train.distributed import PeerError, World, local_rank, process_rank, world

USAGE = """torchrun --nproc-per-node=N -m train.encoder CONFIG [section.key=value …]
The fields: moleprint train --help"""
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start(stage: Callable[[Experiment, World], None]) -> None:
    """Run `stage` with the experiment of `CONFIG key=value …` from the command line."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    # A launcher that is killed outright cannot end its ranks; left alone they would train on.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        experiment = load(Path(sys.argv[1]), sys.argv[2:])
        with world() as here:
            stage(experiment, here)
    except UserError as error:
        if error.spoken_by(local_rank()):
            where = f"rank {process_rank()}: " if process_rank() else ""
            for line in str(error).splitlines():
                print(f"error: {where}{line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except PeerError:
        sys.exit(2)
    except KeyboardInterrupt:  # the launcher says so
        sys.exit(130)
