"""Removes finished units that nothing needs.

Two things need a unit: the artifact that holds it, whose manifest names its digest, and a run that was interrupted and will
go on from it. Nobody can tell whether a run will go on, so young units stay. What is removed costs at most its
computation: artifacts and DVC's cache have hardlinks of their own, and DVC brings them back without units.
"""

import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stepquant.compute.process import exclusive
from stepquant.compute.units import MARKER, UnitStore

# Where an artifact names the digests of what it consists of.
MANIFESTS = ("*/manifest.json", "*/*/manifest.json", "*.zarr/zarr.json")
DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass(frozen=True)
class Garbage:
    """What was removed: units, and bytes that this freed (files with other hardlinks free nothing)."""

    units: int
    bytes: int


def collect(units: Path, artifacts: Path, keep_days: float, dry_run: bool) -> Garbage:
    """Remove the units of all stages that no artifact holds and that are older than keep_days, and what killed stages left.

    units: the folder with one store per stage, each beside its lock. dry_run: count, and remove nothing. Raises UserError
    if a stage is running.
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
    """Units that nothing needs, broken ones, and half-written ones."""
    folders = []
    for folder in sorted(store.root.iterdir()):
        unit = None if folder.name.startswith(".") else store.peek(folder.name)
        if unit is None or (unit.digest not in held and (folder / MARKER).stat().st_mtime < oldest):
            folders.append(folder)
    return folders


def _own_bytes(folder: Path) -> int:
    """Bytes of the files that have no hardlink elsewhere."""
    stats = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)
