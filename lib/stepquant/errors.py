"""The errors of stepquant: a small tree that library users can catch by kind.

    StepquantError
      UserError                 the user can fix it; a command prints the message and exits with code 2
        InvalidInput            a wrong value or shape; also a ValueError
        MissingFile             a file or folder is not there; also a FileNotFoundError
        DamagedFile             a file is truncated, broken, or disagrees with another one
        UnsupportedCheckpoint   a checkpoint of another version or method, or pickled weights
        OutOfMemory             the device or the host has too little memory; also a MemoryError

Every message names the key or file, says what was found and what is allowed, and gives the remedy. All names here can
be imported from `stepquant`.
"""


class StepquantError(Exception):
    """Base of all errors that stepquant raises on purpose."""


class UserError(StepquantError):
    """An error that the user can fix. The message says what is wrong, where, and what is allowed."""


class InvalidInput(UserError, ValueError):
    """A value, a shape or a combination of them that is not allowed."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class DamagedFile(UserError):
    """A file that is truncated or broken, or that disagrees with another file."""


class UnsupportedCheckpoint(UserError):
    """A checkpoint that this version of stepquant does not read."""


class OutOfMemory(UserError, MemoryError):
    """Too little memory on the device or the host."""
