"""Finished units of work, kept under a key that covers all that made them.

A unit (one block of one expert, one prompt ...) is a folder. It is written under a temporary name and renamed when it
is complete, so it is finished or absent; a killed stage goes on with what is missing, and a unit whose code, params or
inputs changed has another key, so a stale one is never found. Units live outside the DVC outs: DVC empties an out
before its stage runs. A stage ends by gathering its units into the out by hardlink.

    <root>/<key>/unit.json    {"files": {name: sha256}, "sizes": {name: bytes}}, written last
    <root>/<key>/...          the unit's files
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stepquant.storage.digests import content_key, file_digests

MARKER = "unit.json"


@dataclass(frozen=True)
class Unit:
    """A finished unit: its folder, and the digest of its content (not of its key: equal bytes give equal digests)."""

    folder: Path
    digest: str


class UnitStore:
    """Units of one stage in one folder."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def find(self, key: str) -> Unit | None:
        """The finished unit of this key, or None. What a broken one has left is removed."""
        unit = self.peek(key)
        if unit is None and (self.root / key).is_dir():
            shutil.rmtree(self.root / key)
        return unit

    def peek(self, key: str) -> Unit | None:
        """The finished unit of this key, or None."""
        files = _finished_files(self.root / key)
        return None if files is None else Unit(self.root / key, _digest(files))

    def make(self, key: str, work: Callable[[Path], None]) -> Unit:
        """The unit of this key; work(folder) fills a new folder if it isn't there yet."""
        found = self.find(key)
        if found:
            return found
        partial = self.root / f".{key}.{uuid.uuid4().hex}.partial"
        partial.mkdir()
        try:
            work(partial)
            files = file_digests(partial)
            sizes = {name: (partial / name).stat().st_size for name in files}
            _sync(partial, files)
            _write_synced(partial / MARKER, json.dumps({"files": files, "sizes": sizes}, indent=1, sort_keys=True))
            self._commit(partial, key)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Unit(self.root / key, _digest(files))

    def _commit(self, partial: Path, key: str) -> None:
        try:
            os.rename(partial, self.root / key)
        except OSError as error:
            # Another process made the same unit meanwhile, as when a worker that was thought lost is not: its bytes are the same.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or self.find(key) is None:
                raise

    def drop(self, key: str) -> None:
        """Remove a unit whose content nobody needs any more."""
        shutil.rmtree(self.root / key, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed processes left half-written. Call it under the stage's lock only."""
        for partial in self.root.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)


def gather(units: dict[str, Unit], out: Path, texts: dict[str, str]) -> None:
    """Build the folder `out` from units (path inside it, "" for its top -> unit) by hardlink, and small text files.

    It is built under a temporary name beside `out` and renamed, so `out` is whole or absent. Call it under the stage's lock.
    """
    partial = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    try:
        partial.mkdir(parents=True)
        for place, unit in units.items():
            shutil.copytree(
                unit.folder,
                partial / place,
                copy_function=_link,
                ignore=shutil.ignore_patterns(MARKER),
                dirs_exist_ok=True,
            )
        for name, text in texts.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _finished_files(folder: Path) -> dict[str, str] | None:
    """What the marker of a unit lists; None if the marker, or a file in its list, is gone or has another size."""
    marker = folder / MARKER
    if not marker.is_file():
        return None
    listed = json.loads(marker.read_text())
    sizes = listed.get("sizes")  # a marker of an older form has none
    whole = sizes is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()
    )
    return listed["files"] if whole else None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hardlinks.
        shutil.copyfile(source, target)


def _digest(files: dict[str, str]) -> str:
    return content_key(files=files)


def _sync(folder: Path, files: dict[str, str]) -> None:
    """Bring the files to disk before the marker says that they are there."""
    for name in files:
        handle = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
