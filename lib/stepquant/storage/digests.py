"""SHA-256 digests of values, files and folders."""

import hashlib
import json
from pathlib import Path
from typing import Any


def content_key(**parts: Any) -> str:
    """The key of some values.

    Args:
        **parts: JSON values by name.

    Returns:
        SHA-256 (hex) of the parts as canonical JSON, so equal parts give equal keys in every process.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """The digests of all files below a folder.

    Args:
        folder: the folder; hidden files and folders inside it are skipped.

    Returns:
        SHA-256 (hex) by path relative to the folder, sorted by path.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {
        name: file_digest(folder / name) for name in names if not any(part.startswith(".") for part in name.split("/"))
    }


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
