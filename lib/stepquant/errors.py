"""The one exception a user is meant to see: a command turns it into one message and exit code 2."""


class UserError(Exception):
    """Something the user can fix: says what is wrong, where, and what is allowed."""
