import hashlib

import pytest

from stepquant.errors import InvalidInput, MissingFile
from stepquant.storage.digests import file_digests


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/weights").write_bytes(b"w")
    (tmp_path / "elsewhere/deep/shard").write_bytes(b"s")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/index").write_bytes(b"i")
    (tmp_path / "folder/.hidden").write_bytes(b"h")
    return tmp_path / "folder"


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_linked_folders_and_files_are_followed(folder):
    (folder / "transformer").symlink_to("../elsewhere")
    (folder / "link").symlink_to("../elsewhere/weights")
    expected = {"index": b"i", "link": b"w", "transformer/deep/shard": b"s", "transformer/weights": b"w"}
    assert file_digests(folder) == {name: sha(content) for name, content in expected.items()}


def test_a_change_behind_a_link_changes_the_digest(folder):
    (folder / "transformer").symlink_to("../elsewhere")
    before = file_digests(folder)
    (folder.parent / "elsewhere/deep/shard").write_bytes(b"changed")
    changed = {name for name, digest in file_digests(folder).items() if digest != before[name]}
    assert changed == {"transformer/deep/shard"}


def test_a_link_that_leads_nowhere(folder):
    (folder / "vae").symlink_to("../gone")
    with pytest.raises(MissingFile, match=r"vae: a link to \.\./gone, which is not there"):
        file_digests(folder)


def test_a_folder_that_is_linked_twice_is_no_loop_but_one_inside_itself_is(folder):
    (folder / "a").symlink_to("../elsewhere")
    (folder / "b").symlink_to("../elsewhere")
    assert len(file_digests(folder)) == 5
    (folder / "loop").symlink_to(".")
    with pytest.raises(InvalidInput, match="loop: a link to .*, which contains it"):
        file_digests(folder)
