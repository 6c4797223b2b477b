"""Files that are finished or absent: written under a temporary name, then renamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def finished_or_absent(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` and renames it to `path` when the block ends well; else removes it.

    The name `.NAME.tmp` is one that .dvcignore excludes, so a killed process leaves nothing that enters a hash.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with finished_or_absent(path) as partial:
        partial.write_text(text, encoding="utf-8")
