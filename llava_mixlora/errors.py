"""The exception behind every one-line message to the user."""


class MixLoraError(ValueError):
    """Bad input. Its message is one line: the value, what was expected, and what to do.

    The command line prints that line and exits with status 1; in Python it is a `ValueError`. What of it is no letter
    that can be shown, such as a line's end or a terminal's command in what a stranger has written, is told by its code.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """One line, whose letters that cannot be shown, as a line's end or half of a character, are told by their code."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
