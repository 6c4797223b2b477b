"""A stage process ends with its parent, and only one process at a time runs a stage."""

import ctypes
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stepquant.errors import UserError

_PR_SET_PDEATHSIG = 1
# What disks without flock answer: ENOLCK where NFS has no lock server, the others where it is not implemented.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies. Otherwise a stage survives a SIGKILL of DVC.

    Call it early: a parent that has died before the call is not noticed. Does nothing on other systems.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock file while the block runs.

    On a disk without locks (some network and cluster file systems) the block runs unlocked, with a warning: two runs of
    one stage at a time waste work there, and one of them may fail, but units are still finished or absent.

    Args:
        lock: The file. It and its folder are created; the file stays.

    Raises:
        UserError: Another process holds the lock.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(lock, handle)
        yield
    finally:
        os.close(handle)


def _take(lock: Path, handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{lock}: another process is running this stage; wait for it or stop it") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, error.strerror, os.fspath(lock)) from None
        reason = os.strerror(error.errno)
        print(
            f"warning: {lock}: this disk has no locks ({reason}); do not run a stage twice at a time", file=sys.stderr
        )
