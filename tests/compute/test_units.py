import errno
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest

from stepquant.compute import units
from stepquant.compute.units import MARKER, Unit, UnitStore, content_key, file_digests, gather


@pytest.fixture
def store(tmp_path):
    return UnitStore(tmp_path / "units")


def writing(**files):
    def work(folder):
        for name, text in files.items():
            (folder / name).write_text(text)

    return work


def forbidden(folder):
    raise AssertionError("this unit is finished and must not be made again")


def test_content_key_is_the_sha256_of_canonical_json():
    assert (
        content_key(b=[1, 2.5], a={"y": None, "x": True})
        == hashlib.sha256(b'{"a":{"x":true,"y":null},"b":[1,2.5]}').hexdigest()
    )
    assert content_key(a=1, b=2) == content_key(b=2, a=1) != content_key(a=2, b=1)


def test_make_works_once_per_key(store):
    unit = store.make("k", writing(a="one", b="two"))
    assert {path.name for path in unit.folder.iterdir()} == {"a", "b", MARKER}
    assert json.loads((unit.folder / MARKER).read_text()) == {
        "files": {"a": hashlib.sha256(b"one").hexdigest(), "b": hashlib.sha256(b"two").hexdigest()},
        "sizes": {"a": 3, "b": 3},
    }
    assert store.make("k", forbidden) == store.find("k") == unit
    assert store.find("other") is None


def test_a_unit_s_digest_is_that_of_its_content(store):
    one, same, other = (store.make(key, writing(a=text)) for key, text in (("1", "x"), ("2", "x"), ("3", "y")))
    assert one.digest == same.digest != other.digest
    assert store.make("4", writing(b="x")).digest != one.digest


def test_work_that_fails_leaves_nothing(store):
    def work(folder):
        (folder / "half").write_text("written")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        store.make("k", work)
    assert list(store.root.iterdir()) == []
    assert store.find("k") is None


@pytest.mark.parametrize("lost", ["a", MARKER])
def test_a_unit_that_lost_a_file_is_absent_and_made_again(store, lost):
    folder = store.make("k", writing(a="one")).folder
    (folder / lost).unlink()
    assert store.find("k") is None
    assert not folder.exists()
    assert (store.make("k", writing(a="new")).folder / "a").read_text() == "new"


def test_a_truncated_unit_is_absent_and_made_again(store):
    folder = store.make("k", writing(a="one", b="two")).folder
    (folder / "b").write_text("tw")
    assert store.find("k") is None
    assert (store.make("k", writing(a="one", b="two")).folder / "b").read_text() == "two"


def test_a_unit_that_another_process_finished_meanwhile_is_that_one(store):
    def work(folder):
        other = UnitStore(store.root).make("k", writing(a="one"))
        made.append(other)
        (folder / "a").write_text("one")

    made = []
    assert store.make("k", work) == made[0]
    assert list(store.root.iterdir()) == [made[0].folder]


def test_drop_removes_one_unit(store):
    store.make("k", writing(a="one"))
    kept = store.make("other", writing(a="one"))
    store.drop("k")
    store.drop("never made")
    assert store.find("k") is None and store.find("other") == kept


KILLED_IN_ITS_WORK = """
import os, signal, sys
from pathlib import Path
from stepquant.compute.units import UnitStore

def work(folder):
    (folder / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)

UnitStore(Path(sys.argv[1])).make("k", work)
"""


def test_a_killed_process_leaves_no_unit_and_the_next_one_sweeps_up(store):
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_ITS_WORK, str(store.root)])
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in store.root.glob("*/half")] == ["half"]
    again = UnitStore(store.root)
    assert again.find("k") is None
    finished = again.make("other", writing(a="one"))
    again.sweep()
    assert list(store.root.iterdir()) == [finished.folder]
    assert (again.make("k", writing(half="whole")).folder / "half").read_text() == "whole"


def test_file_digests_leave_hidden_files_out(tmp_path):
    for name in ("b.txt", "sub/a.txt", ".hidden", "sub/.cache/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(file_digests(tmp_path).items()) == [
        (name, hashlib.sha256(name.encode()).hexdigest()) for name in ("b.txt", "sub/a.txt")
    ]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_gather_links_units_and_writes_texts(store, tmp_path):
    one, two = store.make("1", writing(a="one")), store.make("2", writing(a="two"))
    out = tmp_path / "artifacts" / "out"
    gather({"block_00": one, "deep/block_01": two, "": one}, out, {"manifest.json": "{}", "block_00/extra.txt": "x"})
    assert contents(out) == {
        "block_00/a": "one",
        "deep/block_01/a": "two",
        "a": "one",
        "manifest.json": "{}",
        "block_00/extra.txt": "x",
    }
    assert os.path.samefile(out / "block_00/a", one.folder / "a")
    assert list(out.parent.iterdir()) == [out]


def test_gather_replaces_an_old_out(store, tmp_path):
    out = tmp_path / "out"
    gather({"old": store.make("1", writing(a="one"))}, out, {"gone.txt": ""})
    gather({"new": store.make("2", writing(a="two"))}, out, {})
    assert contents(out) == {"new/a": "two"}


@pytest.mark.parametrize("name", ["EPERM", "EXDEV", "ENOTSUP", "EMLINK", "EOPNOTSUPP", "ENOSYS"])
def test_gather_copies_where_links_are_refused(store, tmp_path, monkeypatch, capsys, name):
    """With one line that says so, however many files there are."""
    number = getattr(errno, name)
    unit = store.make("1", writing(a="one", b="two"))

    def refuse(source, target):
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr(units.os, "link", refuse)
    out = tmp_path / "out"
    gather({"block": unit, "": unit}, out, {})
    assert contents(out) == {"block/a": "one", "block/b": "two", "a": "one", "b": "two"}
    assert not os.path.samefile(out / "block/a", unit.folder / "a")
    reason = os.strerror(number)
    assert capsys.readouterr().err == f"warning: {out}: files are copied, not hardlinked ({reason})\n"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_gather_does_not_take_another_error_for_a_disk_without_links(store, tmp_path, monkeypatch, capsys, number):
    unit = store.make("1", writing(a="one"))

    def fail(source, target):
        raise OSError(number, os.strerror(number), source, None, target)

    monkeypatch.setattr(units.os, "link", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        gather({"block": unit}, tmp_path / "out", {})
    assert capsys.readouterr().err == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_unit_on_a_disk_without_fsync(store, monkeypatch, number):
    def unable(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", unable)
    assert store.make("1", writing(a="one")) == store.find("1")


def test_a_failed_gather_keeps_the_old_out_and_leaves_nothing_else(store, tmp_path):
    out = tmp_path / "out"
    unit = store.make("1", writing(a="one"))
    gather({"old": unit}, out, {})
    with pytest.raises(FileNotFoundError):
        gather({"new": unit, "lost": Unit(store.root / "never made", "")}, out, {})
    assert contents(out) == {"old/a": "one"}
    assert {path.name for path in tmp_path.iterdir()} == {"units", "out"}


def test_scratch_ends_with_its_block_or_with_the_next_sweep(store):
    with store.scratch() as folder:
        (folder / "large").write_text("a")
    assert not folder.exists()
    left = store.scratch()
    folder = left.__enter__()  # and then the process is killed
    store.sweep()
    assert not folder.exists()
