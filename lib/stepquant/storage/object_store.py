"""Artifacts that only stages read, kept in an object store (such as S3) instead of on disk.

A pointer takes the place of a folder of Zarr groups, and DVC tracks the pointer:

    <folder>/remote.json   {"url": "s3://bucket/prefix/<digest>", "files": {name: SHA-256}}

The digest covers the files. So objects never change, equal folders are stored once, and the pointer is written when all
objects are stored. Nothing is ever removed from the store. Needs the extra `s3` (obstore), which takes credentials,
region and endpoint from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...).
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from stepquant.errors import UserError
from stepquant.storage.digests import content_key, file_digests

POINTER = "remote.json"
RETRY = {"max_retries": 6, "retry_timeout": timedelta(minutes=1)}


def move(folder: Path, url: str) -> None:
    """Move the files of a folder into an object store and leave a pointer to them.

    Args:
        folder: the folder; it contains only the pointer afterwards.
        url: the store's folder, such as "s3://bucket/prefix".

    Raises:
        UserError: the store refuses or cannot be reached; the folder is then unchanged.
    """
    files = file_digests(folder)
    place = f"{url.rstrip('/')}/{content_key(files=files)}"
    store = _open(place)
    with reported(place):
        for name in files:
            store.put(name, folder / name)
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (folder / POINTER).write_text(json.dumps({"url": place, "files": files}, indent=1, sort_keys=True))


def find(folder: Path) -> tuple[Any, str] | None:
    """Follow the pointer of a folder.

    Args:
        folder: where a group, or the folder that contains it, has been replaced by a pointer.

    Returns:
        The Zarr store and the path of the group inside it, or None without a pointer.

    Raises:
        UserError: the extra `s3` is not installed, or the address is invalid.
    """
    for place in (folder, folder.parent):
        if (place / POINTER).is_file():
            from zarr.storage import ObjectStore

            url = json.loads((place / POINTER).read_text())["url"]
            return ObjectStore(_open(url), read_only=True), "" if place == folder else folder.name
    return None


@contextmanager
def reported(place: object) -> Iterator[None]:
    """Turn the errors of an object store into a UserError.

    obstore's errors are recognized by their module, so groups on disk can be read without obstore.

    Args:
        place: the folder or address that the message names.

    Raises:
        UserError: the object store reported an error.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        raise UserError(
            f"{place}: {str(error).splitlines()[0]}; "
            "check the address, the credentials in the environment and the network"
        ) from None


def _open(url: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError:
        raise UserError(f"{url}: an object store needs the extra 's3': pip install 'stepquant[s3]'") from None
    with reported(url):
        return from_url(url, retry_config=RETRY)
