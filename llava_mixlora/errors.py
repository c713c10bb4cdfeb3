"""The exception behind every one-line message to the user."""


class MixLoraError(ValueError):
    """Bad input. Its message is one line: the value, what was expected, and what to do.

    The command line prints that line and exits with status 1; in Python it is a `ValueError`.
    """
