"""JSON configs of a source pipeline."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepquant.errors import DamagedFile, InvalidInput, MissingFile

SCHEDULER = "scheduler/scheduler_config.json"


def read_config(file: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file of a diffusers pipeline that must have the given keys.

    Raises:
        MissingFile: there is no such file.
        DamagedFile: it is not JSON.
        InvalidInput: it lacks a key.
    """
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise MissingFile(f"{file}: no such file; expected that of a diffusers pipeline") from None
    except ValueError as error:
        raise DamagedFile(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InvalidInput(f"{file}: found {type(content).__name__}; expected the object of a diffusers pipeline")
    for key in keys:
        if key not in content:
            raise InvalidInput(f"{file}: no '{key}' in it; expected that of a diffusers pipeline")
    return content


@contextmanager
def located(folder: Path) -> Iterator[None]:
    """Puts the folder in front of a refusal that begins with the name of a file in it."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(f"{folder}/{error}") from None
