"""Reads YAML as DVC does (dvc/utils/serialize/_yaml.py): ruamel.yaml, YAML 1.2.

DVC decides from params.yaml which stages have to run, so the stages must read the same values. PyYAML follows YAML 1.1,
where 1e-2 is text, 010 is 8, `on` is true, and the last of two equal keys wins.
"""

import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from stepquant.errors import DamagedFile, InvalidInput, MissingFile


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as plain data.

    Args:
        path: a UTF-8 file, with or without a byte order mark.

    Raises:
        MissingFile: there is no such file.
        DamagedFile: the file is not YAML.
        InvalidInput: a mapping has a key twice.
    """
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError):
        raise MissingFile(f"{path}: no such file") from None
    except DuplicateKeyError as error:
        raise InvalidInput(_twice(path, error)) from None
    except (YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that does not exist
        raise DamagedFile(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _twice(path: Path, error: DuplicateKeyError) -> str:
    key = re.search('duplicate key "(.*?)"', str(error.problem))
    name, line = key[1] if key else "a key", error.problem_mark.line + 1
    return f"{path}: line {line}: '{name}' is there twice; keep one of the two, since only one can count"
