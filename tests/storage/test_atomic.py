import pytest

from stepquant.storage.atomic import finished_or_absent


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
