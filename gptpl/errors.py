"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
    """A mistake in what the user gave.

    The message is one line that names the value and the remedy; the commands print it alone, without a
    traceback, and exit with status 2.
    """
