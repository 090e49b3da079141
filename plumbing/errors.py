"""How bad input ends: one line on the screen that says what to do, and exit status 2.

Whoever finds that a file or a flag cannot be used raises BadInput; `main` of each script catches
it.
"""


class BadInput(Exception):
    """Something the user can mend. It names the file or flag, what was expected, what to do."""

    def __init__(self, message):
        super().__init__(printable(message))


def printable(text):
    r"""Text as one line that a terminal shows and does not obey.

    Names of files may hold line ends, control characters, bytes that are no UTF-8: all of these
    become escapes such as \x1b."""
    shown = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)]
    return "".join(shown)
