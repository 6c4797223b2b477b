"""Reading ahead asks for the right bytes, in another thread, and never fails."""

import os
import threading

import pytest

from stepquant.storage.read_ahead import read_ahead


@pytest.fixture
def asked(monkeypatch):
    """Every request: file name, first byte, count, advice, and the thread that made it."""
    requests = []

    def record(descriptor, start, count, advice):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        requests.append((name, start, count, advice, threading.current_thread()))

    monkeypatch.setattr(os, "posix_fadvise", record)
    return requests


def test_every_range_is_asked_for_in_the_background(tmp_path, asked):
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").write_bytes(b"0123456789")
    thread = read_ahead([(tmp_path / "a", 3, 4), (tmp_path / "b", 0, 0)])
    thread.join()
    assert [request[:4] for request in asked] == [
        ("a", 3, 4, os.POSIX_FADV_WILLNEED),
        ("b", 0, 0, os.POSIX_FADV_WILLNEED),
    ]
    assert thread.daemon and all(request[4] is thread for request in asked)


def test_a_missing_file_is_left_to_its_reader(tmp_path, asked):
    (tmp_path / "b").write_bytes(b"0")
    read_ahead([(tmp_path / "a", 0, 0), (tmp_path / "b", 0, 0)]).join()
    assert [request[0] for request in asked] == ["b"]


def test_a_system_without_the_call(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    (tmp_path / "a").write_bytes(b"0")
    thread = read_ahead([(tmp_path / "a", 0, 0)])
    thread.join(timeout=10)
    assert not thread.is_alive()
