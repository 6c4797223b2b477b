"""Finished units of work, kept under a key that covers everything they were made from.

A unit is a folder: one block of one expert, one prompt, and so on. It is written under a temporary name and renamed
when it is complete, so it is finished or absent. A killed stage continues with the missing units. A unit whose code,
parameters or inputs have changed has another key, so a stale unit is never found. Units are kept outside the outs of
DVC, because DVC empties an out before its stage runs. A stage ends by hardlinking its units into the out.

    <root>/<key>/unit.json    {"files": {name: sha256}, "sizes": {name: bytes}}, written last
    <root>/<key>/...          the unit's files
"""

import errno
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stepquant.storage.atomic import finished_folder_or_absent, sync
from stepquant.storage.digests import content_key, file_digests

MARKER = "unit.json"
# What disks answer that have no hard links, or no more of them for this file, or not between these two folders.
_NO_LINK = (errno.EPERM, errno.EACCES, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Unit:
    """A finished unit.

    Attributes:
        folder: Its files.
        digest: The digest of its content, not of its key: equal bytes have equal digests.
    """

    folder: Path
    digest: str


class UnitStore:
    """The units of one stage, in one folder."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def find(self, key: str) -> Unit | None:
        """The finished unit of this key, or None. The remains of a broken unit are removed."""
        unit = self.peek(key)
        if unit is None and (self.root / key).is_dir():
            shutil.rmtree(self.root / key)
        return unit

    def peek(self, key: str) -> Unit | None:
        """The finished unit of this key, or None. Nothing is removed."""
        files = _finished_files(self.root / key)
        return None if files is None else Unit(self.root / key, _digest(files))

    def make(self, key: str, work: Callable[[Path], None]) -> Unit:
        """The unit of this key, made if it is missing.

        Args:
            key: The key.
            work: Fills the new folder that it is given.

        Returns:
            The finished unit. If another process finished it meanwhile, that one.
        """
        found = self.find(key)
        if found:
            return found
        partial = self.root / f".{key}.{uuid.uuid4().hex}.partial"
        partial.mkdir()
        try:
            work(partial)
            files = file_digests(partial)
            sizes = {name: (partial / name).stat().st_size for name in files}
            for name in files:  # before the marker lists them
                sync(partial / name)
            (partial / MARKER).write_text(json.dumps({"files": files, "sizes": sizes}, indent=1, sort_keys=True))
            sync(partial / MARKER)
            self._commit(partial, key)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Unit(self.root / key, _digest(files))

    def _commit(self, partial: Path, key: str) -> None:
        try:
            os.rename(partial, self.root / key)
        except OSError as error:
            # Another process, such as a worker that was believed lost, has made the same unit. Its bytes are equal.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or self.find(key) is None:
                raise

    def drop(self, key: str) -> None:
        """Remove a unit that is no longer needed."""
        shutil.rmtree(self.root / key, ignore_errors=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder beside the units, removed at the end of the block, or by `sweep` after a killed process."""
        folder = self.root / f".scratch.{uuid.uuid4().hex}.partial"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove half-written units and scratch of killed processes. Call it only under the stage's lock."""
        for partial in self.root.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)


def gather(units: dict[str, Unit], out: Path, texts: dict[str, str]) -> None:
    """Build an out of a stage, whole or not at all. Call it under the stage's lock.

    Args:
        units: Path inside the out ("" for its top) -> unit, whose files are hardlinked there, or copied where the disk
            refuses links.
        out: The folder. An old one is replaced.
        texts: Path inside the out -> content of a small text file.
    """
    link = _Linker(out)
    with finished_folder_or_absent(out) as partial:
        for place, unit in units.items():
            shutil.copytree(
                unit.folder,
                partial / place,
                copy_function=link,
                ignore=shutil.ignore_patterns(MARKER),
                dirs_exist_ok=True,
            )
        for name, text in texts.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text)


def _finished_files(folder: Path) -> dict[str, str] | None:
    """The files that a unit's marker lists; None if the marker or one of them is missing, or has another size."""
    marker = folder / MARKER
    if not marker.is_file():
        return None
    listed = json.loads(marker.read_text())
    files: dict[str, str] = listed["files"]
    sizes: dict[str, int] | None = listed.get("sizes")  # early versions wrote none; their units are made again
    whole = sizes is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()
    )
    return files if whole else None


class _Linker:
    """Links files, and copies those that cannot be linked, with one warning for all of them."""

    def __init__(self, out: Path):
        self.out, self.warned = out, False

    def __call__(self, source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            if not self.warned:
                reason = os.strerror(error.errno)
                print(f"warning: {self.out}: files are copied, not hardlinked ({reason})", file=sys.stderr)
                self.warned = True
            shutil.copyfile(source, target)


def _digest(files: dict[str, str]) -> str:
    return content_key(files=files)
