"""Units' work that worker processes of the executor tests import."""

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import stepquant
from stepquant.errors import UserError


@dataclass(frozen=True)
class Write:
    """Writes a text; before that it prints a warning, or kills its process if nobody has made the marker file yet."""

    text: str
    warning: str = ""
    kill_once: Path | None = None

    def __call__(self, folder: Path) -> None:
        if self.warning:
            print(self.warning, file=sys.stderr)
        if self.kill_once is not None:
            try:
                self.kill_once.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        (folder / "text").write_text(self.text)


@dataclass(frozen=True)
class Endless:
    """Says which process it runs in, and stays there."""

    pid_file: Path

    def __call__(self, folder: Path) -> None:
        self.pid_file.write_text(str(os.getpid()))
        time.sleep(600)


def describe_process(folder: Path) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "threads").write_text(str(torch.get_num_threads()))
    (folder / "code").write_text(stepquant.__file__)


def mistake(folder: Path) -> None:
    print("a warning before it", file=sys.stderr)
    raise UserError("key: found this; allowed: that")


def full_disk(folder: Path) -> None:
    raise OSError(errno.ENOSPC, "refused", "artifacts/out")


def out_of_memory(folder: Path) -> None:
    """As torch words it."""
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.60 GiB is "
        "free. Including non-PyTorch memory, this process has 77.50 GiB memory in use. Of the allocated memory 76 GiB"
    )


def bug(folder: Path) -> None:
    raise ZeroDivisionError("ours")


def die(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
