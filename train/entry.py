"""How a stage starts under torchrun: configuration, process group, errors in a line, an end with it."""

import ctypes
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from configs.errors import RESUMABLE, UserError
from configs.load import load
from configs.schema import Experiment
from train.distributed import LostError, PeerError, World, local_rank, process_rank, world
from train.signals import StoppedError

USAGE = """torchrun --nproc-per-node=N -m train.encoder CONFIG [section.key=value …]
The fields: moleprint train --help
Exit status: 0 done; 2 an error, which is told; 75 the same command goes on from the newest checkpoint
(SIGTERM or SIGUSR1 came, a rank was lost or hangs)."""
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
        with world(experiment.train.timeout) as here:
            stage(experiment, here)
    except UserError as error:
        if error.spoken_by(local_rank()):
            where = f"rank {process_rank()}: " if process_rank() else ""
            for line in str(error).splitlines():
                print(f"error: {where}{line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except PeerError:
        sys.exit(2)
    except LostError as error:
        print(
            f"error: rank {process_rank()}: another rank is gone ({error}); the same command goes on from "
            "the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(RESUMABLE)
    except StoppedError as stopped:
        if local_rank() == 0:
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(RESUMABLE)
    except KeyboardInterrupt:  # the launcher says so
        sys.exit(130)
