"""The one exception charlm raises on purpose."""


class CharlmError(Exception):
    """What was given, what was expected, what to do, for the person at the keyboard.

    The command line prints it as one line; a program can catch it.
    """
