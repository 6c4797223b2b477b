"""How every command of the project ends: done, or one message that says what to mend."""

import errno
import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from stepquant.errors import UserError

# What the file system refuses and the user can mend; anything else is our bug and keeps its traceback (exit code 1).
_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a Typer command end with one clear message and exit code 2 when the user can mend what went wrong."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno not in _MENDABLE:
                raise
            where = error.filename or "the file system"
            _fail(f"{where}: {os.strerror(error.errno)}; free space or make the folder writable, then run the same command again")

    run.__signature__ = inspect.signature(function)
    return run


def main(function: Callable[..., None]) -> None:
    """Run one command as a program, as `python -m stages.NAME` does."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(function)
    app()


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)
