"""Files and folders that are finished or absent: written under a temporary name, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def finished_or_absent(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name, and rename it to `path` when the block ends without an error.

    The temporary name `.NAME.tmp` is excluded by .dvcignore, so what a killed process leaves enters no hash.

    Args:
        path: The file. Its folder is created. An old file is replaced.

    Yields:
        The temporary path beside it. After an error it is removed.
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
    """The same for a folder. Two processes must not write the same one at a time.

    Args:
        path: The folder. Its parents are created. An old folder is replaced only after the block has ended well.

    Yields:
        A new, empty folder beside it. After an error it is removed.
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
    """Write a small UTF-8 text file, whole or not at all."""
    with finished_or_absent(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync_tree(folder: Path) -> None:
    """Bring a folder and all that is in it to disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk, so that not even a power cut takes it back.

    Some disks, such as network and FUSE mounts, cannot do this for folders, or at all. That is no error: they bring
    data to disk on their own, and what a power cut damages is found by its size or its header.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
