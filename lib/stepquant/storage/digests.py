"""SHA-256 digests of values, files and folders."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepquant.errors import InvalidInput, MissingFile


def content_key(**parts: Any) -> str:
    """SHA-256 of the parts as canonical JSON, which is the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below a folder, sorted, without hidden files and folders.

    Symbolic links to files and folders are followed.

    Raises:
        MissingFile: a link leads nowhere.
        InvalidInput: a linked folder contains itself.
    """
    return {name: file_digest(folder / name) for name in sorted(_files(folder, "", (folder.resolve(),)))}


def _files(folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[str]:
    """Relative paths of the files below a folder. above: the real paths of the folders that lead to it."""
    for entry in folder.iterdir():
        name = f"{prefix}{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if (real := entry.resolve()) in above:
                raise InvalidInput(f"{entry}: a link to {real}, which contains it")
            yield from _files(entry, f"{name}/", (*above, real))
        elif entry.is_file():
            yield name
        elif entry.is_symlink():
            raise MissingFile(f"{entry}: a link to {entry.readlink()}, which is not there")


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
