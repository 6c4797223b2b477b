"""Models of the Hugging Face hub. They are the only thing that stepquant downloads.

A branch such as main can move between two stages. So stage model records the commit that it found, and every later
stage reads exactly this commit.
"""

import re
from pathlib import Path
from typing import Any

from stepquant.errors import MissingFile

PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(source: str) -> bool:
    """Whether a source that is no folder can be a hub id, owner/name."""
    return source.count("/") == 1 and not Path(source).exists()


def snapshot(source: str, revision: str | None) -> Path:
    """The folder of a hub model. It is downloaded unless the revision is a commit that is here already.

    Args:
        source: hub id.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        MissingFile: the hub has no such model, or cannot be reached.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        found = cached_snapshot(source, revision)
        if found is not None:
            return found
    try:
        return _download(source, revision=revision)
    except _errors() as error:
        raise MissingFile(
            f"model.source: no folder {source}, and the hub gave no such model: {' '.join(str(error).split())}"
        ) from None


def cached_snapshot(source: str, revision: str | None) -> Path | None:
    """The folder of a hub model that was downloaded before; None if it was not. Never asks the hub."""
    try:
        folder = _download(source, revision=revision, local_files_only=True)
    except _errors():
        return None
    return folder if (folder / "model_index.json").is_file() else None


def commit_of(folder: Path, revision: str | None) -> str | None:
    """The commit of a downloaded folder, which the hub's cache names by it; `revision` for any other folder."""
    return folder.name if _COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots" else revision


def _download(source: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, ignore_patterns=PICKLES, **options))


def _errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    return HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError
