"""Reads files into the page cache while something else is computed."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

# One range of bytes of a file: the file, its first byte, and the number of bytes. 0 bytes mean up to the end.
FileRange = tuple[Path, int, int]


def read_ahead(ranges: Iterable[FileRange]) -> threading.Thread:
    """Ask the operating system to read parts of files, in the background. It is a hint: no result depends on it.

    A thread asks, because the call waits while the queue of the disk is full. Systems without `posix_fadvise` read
    nothing, and a file that is missing is skipped: its reader reports it.

    Args:
        ranges: What will be read.

    Returns:
        The thread, which ends when everything has been asked for.
    """
    thread = threading.Thread(target=_ask, args=(list(ranges),), name="read ahead", daemon=True)
    thread.start()
    return thread


def _ask(ranges: list[FileRange]) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    for file, start, count in ranges:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
