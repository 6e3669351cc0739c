"""The one exception that stands for a user's mistake."""


class InputError(ValueError):
    """Bad input: one sentence that says what was wrong and what would be right. The command line prints it and exits with 2."""
