"""JSON files: read with a clear error, written with sorted keys so that equal values give equal bytes."""

import json
from pathlib import Path
from typing import Any

from stepquant.errors import UserError


def read_json(path: Path) -> Any:
    """Read an artifact of an earlier stage. Raises UserError if it is missing or is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run `dvc repro` or the stage that writes it first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it and run its stage again") from None


def to_json(value: Any) -> str:
    """The text of a JSON file: indented, sorted keys, a final newline."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
