"""Artifacts that only stages read, in an object store (S3 and its like) instead of on disk.

In the place of a folder of Zarr groups stands a pointer to it, which DVC tracks:

    <folder>/remote.json   {"url": "s3://bucket/prefix/<digest>", "files": {name: SHA-256}}

The digest is that of the files, so what is there never changes, equal folders are kept once, and the pointer is written when
all of it is there. Nothing is ever removed from the store. Needs the extra `s3` (obstore), which takes credentials, region and
endpoint from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...).
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
    """Put the files below a folder into the store at `url`, and leave the pointer to them alone. Raises UserError if it cannot."""
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
    """(Zarr store, path in it) of a folder in whose place, or in its parent's, a pointer stands; None if there is none."""
    for place in (folder, folder.parent):
        if (place / POINTER).is_file():
            from zarr.storage import ObjectStore

            url = json.loads((place / POINTER).read_text())["url"]
            return ObjectStore(_open(url), read_only=True), "" if place == folder else folder.name
    return None


@contextmanager
def reported(place: object) -> Iterator[None]:
    """Raises UserError naming the place for whatever an object store does not do.

    obstore's errors are told by their module, so that groups on disk are read without it, installed or not.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("obstore"):
            raise
        raise UserError(
            f"{place}: {str(error).splitlines()[0]}; check the address, the credentials in the environment and the network"
        ) from None


def _open(url: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError:
        raise UserError(f"{url}: an object store needs the extra 's3': pip install 'stepquant[s3]'") from None
    with reported(url):
        return from_url(url, retry_config=RETRY)
