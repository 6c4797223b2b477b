"""Atomic file writes: a file is written under a temporary name, then renamed."""

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
    partial = path.with_name(f".{path.name}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file completely or not at all."""
    with finished_or_absent(path) as partial:
        partial.write_text(text, encoding="utf-8")
