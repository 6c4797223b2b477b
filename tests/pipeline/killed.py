"""Kills stages at random moments, over and over, until they get through: `killed.py KILLS SEED CALLS`.

CALLS is a JSON file, {stage: {"folder": ..., "command": ["stages.capture", "--expert", "low_noise"], "out": ...}}.
Every folder has a finished out. Stages run in forks of this process, which has imported what they need. Starting one
takes no time, so the kills hit the work itself, and many of them fit into a test. Prints JSON: {stage: units after each
kill and at the end}.
"""

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel  # noqa: F401 - imported before the forks, which need it

from stepquant.compute.units import MARKER, file_digests

LONGEST = 300


def start(folder: str, command: list[str]) -> int:
    """Fork a process that runs a stage; its id."""
    module, *arguments = command
    stage = getattr(importlib.import_module(module), module.removeprefix("stages."))
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        stage(**{flag.removeprefix("--"): value for flag, value in zip(arguments[::2], arguments[1::2])})
        code = 0
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> bool:
    """Whether the child ends well within some time. Raises AssertionError if it ends badly."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0, f"the stage ended with status {status}; its log is in log.txt"
            return True
        time.sleep(0.001)
    return False


class Units:
    """The units of a stage, watched from run to run: none may be made twice."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: dict[str, tuple[int, int]] = {}

    def observe(self) -> None:
        for marker in self.folder.glob(f"[!.]*/{MARKER}"):
            identity = (marker.stat().st_ino, marker.stat().st_mtime_ns)
            assert self.seen.setdefault(marker.parent.name, identity) == identity, f"{marker.parent} was made again"

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.seen.clear()


def torment(folder: str, command: list[str], out: str, kills: int) -> list[int]:
    """Run a stage undisturbed, kill it several times within the time that this took, let it end, and compare the outs.

    Gives how many units there were after each kill, and at the end.
    """
    place = Path(folder) / out
    expected, counts, began = file_digests(place), [], time.monotonic()
    assert ended(start(folder, command), LONGEST), "the stage hangs"
    duration = time.monotonic() - began
    units = Units(Path(folder) / ".units" / "@".join([command[0].removeprefix("stages."), command[2]]))
    units.forget()
    while len(counts) < kills:
        child = start(folder, command)
        if ended(child, random.uniform(0, duration)):  # too late: once more from the start
            units.forget()
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        units.observe()
        counts.append(len(units.seen))
    assert ended(start(folder, command), LONGEST), "the stage hangs"
    units.observe()
    assert file_digests(place) == expected, f"{place} is another"
    leftovers = [path for path in (*place.parent.iterdir(), *units.folder.iterdir()) if path.name.startswith(".")]
    assert not leftovers, leftovers
    return [*counts, len(units.seen)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    kills, seed, calls = int(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    random.seed(seed)
    print(json.dumps({stage: torment(**call, kills=kills) for stage, call in calls.items()}))
