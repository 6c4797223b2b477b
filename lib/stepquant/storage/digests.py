"""SHA-256 digests of values, files and folders."""

import hashlib
import json
from pathlib import Path
from typing import Any


def content_key(**parts: Any) -> str:
    """SHA-256 of the parts as canonical JSON, which is the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a folder, sorted, without hidden files and folders."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {
        name: file_digest(folder / name) for name in names if not any(part.startswith(".") for part in name.split("/"))
    }


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
