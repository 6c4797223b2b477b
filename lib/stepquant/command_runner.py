"""How every command of the project ends: done, or one message that says what to fix."""

import errno
import functools
import importlib
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

# What the file system refuses and the user can fix; anything else is our bug and keeps its traceback (exit code 1).
_USER_CAN_FIX = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a Typer command end with one clear message and exit code 2 when the user can fix what went wrong."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (UserError, OSError, SafetensorError) as error:
            message = remedy(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            raise typer.Exit(2) from None

    run.__signature__ = inspect.signature(function)
    return run


def remedy(error: Exception) -> str | None:
    """What to tell the user about an error that the user can fix; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    number = _error_number(error)
    if number not in _USER_CAN_FIX:
        return None
    where = getattr(error, "filename", None) or f"a file below {Path.cwd()}"
    return f"{where}: {os.strerror(number)}; free space or make the folder writable, then run the same command again"


def main(function: Callable[..., None]) -> None:
    """Run one command as a program, as `python -m stages.NAME` does.

    The command is taken from the module by its name: what it sends to other processes could not be found in __main__ there.
    """
    spec = sys.modules["__main__"].__spec__
    if spec is not None and function.__module__ == "__main__":
        function = getattr(importlib.import_module(spec.name), function.__name__)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(function)
    app()


def _error_number(error: Exception) -> int | None:
    """What the file system answered. safetensors and shutil.copytree keep it in their message only."""
    if getattr(error, "errno", None) is not None:
        return error.errno
    found = re.search(r"(?:Errno|os error) (\d+)", str(error))
    return int(found[1]) if found else None
