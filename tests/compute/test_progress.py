import io
import re
import sys

from stepquant.compute.progress import track


def test_a_log_gets_one_line_per_item(capsys):
    assert list(track(["a", "b", "c"], "capture@low_noise")) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"capture@low_noise: {i}/3" for i in (1, 2, 3)]
    assert all(re.fullmatch(r".*: \d/3, \d+\.\d\d s each, \d+ s left", line) for line in lines)
    assert lines[-1].endswith(", 0 s left")


def test_an_item_is_reported_once_it_is_done(capsys):
    items = track([1, 2], "x")
    next(items)
    assert capsys.readouterr().err == ""
    next(items)
    assert capsys.readouterr().err.startswith("x: 1/2, ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track(range(3), "gptq")) == [0, 1, 2]
    assert "gptq" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert "s each" not in terminal.getvalue()


def test_no_items_no_lines(capsys):
    assert list(track([], "x")) == []
    assert capsys.readouterr().err == ""
