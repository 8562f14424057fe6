"""The one error that a user's mistake raises."""


class UserError(ValueError):
    """What is wrong, the value found, and the remedy, in words for the user: shown without a traceback."""
