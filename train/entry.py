"""How a stage starts under torchrun: configuration, process group, and errors in one line from one rank."""

import sys
from collections.abc import Callable
from pathlib import Path

from configs.errors import UserError
from configs.load import load
from configs.schema import Experiment
from train.distributed import World, process_rank, world


def start(stage: Callable[[Experiment, World], None]) -> None:
    """Run `stage` with the experiment of `CONFIG key=value …` from the command line."""
    try:
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            raise UserError("expected CONFIG [section.key=value …]; the fields: moleprint train --help")
        experiment = load(Path(sys.argv[1]), sys.argv[2:])
        with world() as here:
            stage(experiment, here)
    except UserError as error:
        if process_rank() == 0 or error.one_rank:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
