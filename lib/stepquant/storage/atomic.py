"""Atomic writes of files and folders: written under a temporary name, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def finished_or_absent(path: Path) -> Iterator[Path]:
    """Write a file completely or not at all.

    The temporary name `.NAME.tmp` is excluded by .dvcignore, so what a killed process leaves behind never enters a
    hash.

    Args:
        path: the file to write; its folder is created.

    Yields:
        A temporary path beside `path`. It is renamed to `path` if the `with` block succeeds, and removed otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def finished_folder_or_absent(path: Path) -> Iterator[Path]:
    """Write a folder completely or not at all. Only one process at a time may write the same folder.

    Args:
        path: the folder to write; its parents are created. An old one is replaced after the `with` block succeeds.

    Yields:
        A new, empty folder beside `path`. It is renamed to `path` if the `with` block succeeds, and removed otherwise.
    """
    partial = _temporary(path)
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file completely or not at all."""
    with finished_or_absent(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
