"""The one error that a user's mistake raises, and the exit status of a run that can be taken up again."""

RESUMABLE = 75
"""Exit status of training that ended early and goes on by the same command: EX_TEMPFAIL of sysexits.h."""


class UserError(ValueError):
    """What is wrong, the value found, and the remedy, in words for the user: shown without a traceback."""

    one_rank = False
    """Whether a single rank meets it, so that it must be shown even where only rank 0 speaks."""

    def spoken_by(self, local_rank: int) -> bool:
        """Whether a rank tells it: one a host, as what is wrong on one host may be right on the others."""
        return local_rank == 0 or self.one_rank


class DamagedDataError(UserError):
    """A rank read damaged samples."""

    one_rank = True


class StageError(Exception):
    """A stage ended early, and the user has been told why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status
        """What the command ends with."""
