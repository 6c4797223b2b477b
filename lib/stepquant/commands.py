"""How every command of the project ends: done, or one message that says what to mend."""

import errno
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from safetensors import SafetensorError

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
        except (OSError, SafetensorError) as error:
            number = _error_number(error)
            if number not in _MENDABLE:
                raise
            where = getattr(error, "filename", None) or f"a file below {Path.cwd()}"
            _fail(f"{where}: {os.strerror(number)}; free space or make the folder writable, then run the same command again")

    run.__signature__ = inspect.signature(function)
    return run


def main(function: Callable[..., None]) -> None:
    """Run one command as a program, as `python -m stages.NAME` does."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(function)
    app()


def _error_number(error: Exception) -> int | None:
    """What the file system answered. safetensors and shutil.copytree keep it in their message only."""
    if getattr(error, "errno", None) is not None:
        return error.errno
    found = re.search(r"(?:Errno|os error) (\d+)", str(error))
    return int(found[1]) if found else None


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)
