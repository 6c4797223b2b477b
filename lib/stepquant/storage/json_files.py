"""JSON files: read with a clear error, written with sorted keys so that equal values give equal bytes."""

import json
from pathlib import Path
from typing import Any

from stepquant.errors import DamagedFile, InvalidInput, MissingFile, UserError


def read_json(path: Path) -> Any:
    """Read an artifact of an earlier stage. Raises UserError if it is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run `dvc repro` or the stage that writes it first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it and run its stage again") from None


def read_config(path: Path, *keys: str) -> dict[str, Any]:
    """Read a config of a model.

    Args:
        path: The file.
        *keys: What it must have.

    Raises:
        MissingFile: There is no such file.
        DamagedFile: It is not JSON.
        InvalidInput: It has no such key.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file; expected that of a diffusers pipeline") from None
    except ValueError as error:
        raise DamagedFile(f"{path}: not JSON ({error})") from None
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise InvalidInput(f"{path}: no '{key}' in it; expected that of a diffusers pipeline")
    return content


def to_json(value: Any) -> str:
    """The text of a JSON file: indented, sorted keys, a final newline."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
