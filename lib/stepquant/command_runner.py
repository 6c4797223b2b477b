"""How every command of the project ends: with success, or with one message that says what to fix."""

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

from stepquant.advice import LESS_MEMORY
from stepquant.errors import OutOfMemory, UserError

# Refusals of the file system that the user can fix. Any other error is a bug of ours and keeps its traceback.
_FULL, _READ_ONLY = "free space", "make the folder writable"
_UNABLE = "this disk cannot do what is needed here; work in a folder on another disk"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _READ_ONLY,
    errno.EACCES: _READ_ONLY,
    errno.EPERM: _READ_ONLY,
    errno.ENOTSUP: _UNABLE,
    errno.EOPNOTSUPP: _UNABLE,
    errno.ENOSYS: _UNABLE,
}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a Typer command print one message and exit with code 2 where the user can fix what went wrong.

    Args:
        function: The command. If it is a stage that ran out of memory, the message says which parameter to lower.

    Returns:
        The same command. Any other exception leaves it unchanged, and ends the program with code 1.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            found = user_error(error)
            if found is None:
                raise
            print(f"error: {found}{_advice(found, function.__name__)}", file=sys.stderr)
            raise typer.Exit(2) from None

    run.__dict__["__signature__"] = inspect.signature(function)
    return run


def user_error(error: Exception) -> UserError | None:
    """The error as one that the user can fix, or None if it is a bug of ours."""
    if isinstance(error, UserError):
        return error
    if _is_out_of_memory(error):
        where = "the host" if isinstance(error, MemoryError) else "compute.device"
        return OutOfMemory(": ".join(filter(None, (f"out of memory on {where}", _first_sentences(str(error))))))
    number = _error_number(error) if isinstance(error, OSError | SafetensorError) else None
    if number is None or number not in _REMEDIES:
        return None
    where = getattr(error, "filename", None) or f"a file below {Path.cwd()}"
    return UserError(f"{where}: {os.strerror(number)}; {_REMEDIES[number]}, then run the same command again")


def main(function: Callable[..., None]) -> None:
    """Run one command as a program, as `python -m stages.NAME` does.

    The command is taken from its module by name: other processes could not import what it sends them from `__main__`.
    """
    spec = sys.modules["__main__"].__spec__
    if spec is not None and function.__module__ == "__main__":
        function = getattr(importlib.import_module(spec.name), function.__name__)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(function)
    app()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, NumPy or torch could not allocate. torch is not imported for it, because that takes seconds."""
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _first_sentences(message: str) -> str:
    """What was asked for, and what the device has; torch goes on with advice about its allocator."""
    return ". ".join(message.split(". ")[:3]).rstrip(".")


def _advice(error: UserError, name: str) -> str:
    return f"; stage {name}: {LESS_MEMORY[name]}" if isinstance(error, OutOfMemory) and name in LESS_MEMORY else ""


def _error_number(error: Exception) -> int | None:
    """The errno of an error. safetensors and shutil.copytree have it in their message only."""
    number = getattr(error, "errno", None)
    if number is not None:
        return int(number)
    found = re.search(r"(?:Errno|os error) (\d+)", str(error))
    return int(found[1]) if found else None
