import pytest

from stepquant.storage.atomic import finished_folder_or_absent, finished_or_absent


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
