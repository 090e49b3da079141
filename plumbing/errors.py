"""How bad input ends: one line on the screen that says what to do, and exit status 2.

Whoever finds that a file or a flag cannot be used raises BadInput; `main` of each script catches
it.
"""


class BadInput(Exception):
    """Something the user can mend. It names the file or flag, what was expected, what to do."""
