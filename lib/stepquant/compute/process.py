"""What keeps one stage process well behaved: it dies with its parent, and never meets a second writer."""

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepquant.errors import UserError

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: DVC killed by SIGKILL leaves its stage running otherwise.

    A parent that died before goes unnoticed, so call it early.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file for the length of the block. Raises UserError if another process holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{lock}: another process is running this stage; wait for it or stop it") from None
        yield
    finally:
        os.close(handle)
