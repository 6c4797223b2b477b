"""Refuses a source model whose files have changed since stage model described it.

DVC does not watch folders behind links or outside of the repository, so it would not run stage model again. Statistics
of one model and codes of another would then meet in a checkpoint.
"""

from collections.abc import Iterator
from pathlib import Path

from stepquant.errors import InvalidInput
from stepquant.models.hub import is_hub_id
from stepquant.models.manifest import ModelManifest
from stepquant.models.weights import read_header
from stepquant.storage.digests import file_digest


def check_unchanged(recorded: Path, manifest: ModelManifest) -> None:
    """Compare a local source model with its manifest.

    Only files that were replaced or written after the manifest are read. Files that are missing are left to their
    readers. The files of a hub model belong to a commit and do not change.

    Args:
        recorded: the file of the manifest.
        manifest: its content.

    Raises:
        DamagedFile: a weight file is truncated or broken.
        InvalidInput: a file is not the one that was described.
    """
    folder = Path(manifest.source)
    if is_hub_id(manifest.source) and not folder.is_dir():
        return
    described = recorded.stat().st_mtime_ns
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file() or max(_changes(folder, file)) < described:
            continue
        if file.suffix == ".safetensors":
            read_header(file)
        if file_digest(file) != digest:
            raise InvalidInput(
                f"{file}: changed since stage model described it; run `dvc repro --force model`, or put the file back"
            )


def _changes(folder: Path, file: Path) -> Iterator[int]:
    """When a file, or a link on the way to it, was last changed, in nanoseconds.

    Times of status changes, because a copy can keep the time at which its original was written.
    """
    yield file.stat().st_ctime_ns
    for place in (file, *file.parents):
        yield place.lstat().st_ctime_ns if place.is_symlink() else 0
        if place == folder:
            return
