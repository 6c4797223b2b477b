"""The errors that a command turns into one message and exit code 2."""


class UserError(Exception):
    """Something the user can fix: says what is wrong, where, and what is allowed."""


class OutOfMemory(UserError):
    """The device ran out of memory."""
