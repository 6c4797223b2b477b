import errno
import os

import pytest

from stepquant.storage.atomic import finished_folder_or_absent, finished_or_absent, sync, sync_tree


def test_the_file_appears_at_the_end_of_the_with_block(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with finished_or_absent(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), finished_or_absent(path) as partial:
        partial.write_text("half")
        1 / 0
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "folder"
    with finished_folder_or_absent(path) as partial:
        (partial / "file").write_text("whole")
        assert not path.exists()
    assert (path / "file").read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_replaces_an_old_one_and_what_a_killed_process_left(tmp_path):
    path, left = tmp_path / "folder", tmp_path / ".folder.tmp"
    for folder in (path, left):
        folder.mkdir()
        (folder / "old").write_text("old")
    with finished_folder_or_absent(path) as partial:
        (partial / "new").write_text("new")
        assert (path / "old").exists()
    assert [file.name for file in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_folder_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), finished_folder_or_absent(path) as partial:
        (partial / "half").write_text("half")
        1 / 0
    assert [file.name for file in path.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_fsync(tmp_path, monkeypatch, number):
    """As some network and FUSE mounts, for folders or for everything."""

    def unable(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", unable)
    (tmp_path / "file").write_text("text")
    sync_tree(tmp_path)
    assert (tmp_path / "file").read_text() == "text"


def test_a_failing_fsync_names_the_file_and_the_cause(tmp_path, monkeypatch):
    def broken(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "file").write_text("text")
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error: '.*/file'"):
        sync(tmp_path / "file")


def test_everything_in_a_folder_is_synced(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_text("text")
    sync_tree(tmp_path)
    assert synced == {str(tmp_path), str(tmp_path / "deep"), str(tmp_path / "deep" / "file")}
