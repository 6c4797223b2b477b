"""Removes finished units that are no longer needed.

A unit is needed by the artifact that consists of it, whose manifest has its digest, and by an interrupted run that will
continue from it. Whether a run will continue is unknown, so young units are kept. Removing a unit costs at most its
computation: artifacts and the cache of DVC have their own hard links, and DVC restores artifacts without units.
"""

import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stepquant.compute.process import exclusive
from stepquant.compute.units import MARKER, UnitStore

# Where an artifact lists the digests of its units.
MANIFESTS = ("*/manifest.json", "*/*/manifest.json", "*.zarr/zarr.json")
DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass(frozen=True)
class Garbage:
    """What was removed.

    Attributes:
        units: Number of units.
        bytes: Space that this freed. Files with other hard links free nothing.
    """

    units: int
    bytes: int


def collect(units: Path, artifacts: Path, keep_days: float, dry_run: bool) -> Garbage:
    """Remove old units that belong to no artifact, and the half-written units of killed stages.

    Args:
        units: The folder with one store per stage, each with its lock beside it.
        artifacts: The folder where the stages write.
        keep_days: Units younger than this are kept.
        dry_run: Only count.

    Returns:
        What was, or would be, removed.

    Raises:
        UserError: A stage is running.
    """
    held = {
        digest
        for pattern in MANIFESTS
        for file in artifacts.glob(pattern)
        for digest in DIGEST.findall(file.read_text())
    }
    oldest = time.time() - keep_days * 24 * 3600
    stores = sorted(path for path in units.glob("*") if path.is_dir())
    with ExitStack() as locks:
        for store in stores:
            locks.enter_context(exclusive(units / f"{store.name}.lock"))
        garbage = [folder for store in stores for folder in _garbage(UnitStore(store), held, oldest)]
        found = Garbage(len(garbage), sum(_own_bytes(folder) for folder in garbage))
        for folder in () if dry_run else garbage:
            shutil.rmtree(folder)
    return found


def _garbage(store: UnitStore, held: set[str], oldest: float) -> list[Path]:
    """Unneeded, broken and half-written units."""
    folders = []
    for folder in sorted(store.root.iterdir()):
        unit = None if folder.name.startswith(".") else store.peek(folder.name)
        if unit is None or (unit.digest not in held and (folder / MARKER).stat().st_mtime < oldest):
            folders.append(folder)
    return folders


def _own_bytes(folder: Path) -> int:
    """Bytes of the files without another hard link."""
    stats = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)
